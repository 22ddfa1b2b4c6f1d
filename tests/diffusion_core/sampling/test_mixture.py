"""Every sampler on data whose best denoiser is known: a mixture of Gaussians is sampled to its mean and covariance."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from diffusion_core.config import DiffusionConfig, SampleConfig
from diffusion_core.diffusion.denoiser import DenoiserFunction
from diffusion_core.diffusion.schedule import NoiseSchedule, build_schedule
from diffusion_core.registries import SAMPLERS
from diffusion_core.sampling.samplers import build_sampler

COUNT = 8192
SHARES = torch.tensor([0.3, 0.7])
CENTRES_KCHW = torch.tensor([[0.6, -0.5, 0.1, 0.4], [-0.4, 0.3, 0.5, -0.1]]).view(2, 1, 2, 2)
DEVIATIONS = torch.tensor([0.1, 0.25])
SCHEDULES = {
    "linear": build_schedule(DiffusionConfig(schedule="linear")),
    "cosine": build_schedule(DiffusionConfig(schedule="cosine")),
    "karras": build_schedule(DiffusionConfig(schedule="karras", prediction="edm")),
}


def true_moments() -> tuple[Tensor, Tensor]:
    """Mean ``(4,)`` and covariance ``(4, 4)`` of the mixture."""
    centres = CENTRES_KCHW.flatten(1).double()
    mean = SHARES.double() @ centres
    second = sum(
        share * (deviation**2 * torch.eye(4).double() + torch.outer(centre, centre))
        for share, deviation, centre in zip(SHARES.double(), DEVIATIONS.double(), centres, strict=True)
    )
    return mean, second - torch.outer(mean, mean)


def mixture_denoiser(schedule: NoiseSchedule) -> DenoiserFunction:
    """E[x0 | x_t] in closed form: the posterior means of the components, weighted by the posterior shares."""

    def denoise(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        alpha, sigma = schedule.at(t[:1], x)
        means, logs = [], []
        for share, centre, deviation in zip(SHARES, CENTRES_KCHW, DEVIATIONS, strict=True):
            variance = alpha**2 * deviation**2 + sigma**2
            gap = x - alpha * centre
            means.append(centre + alpha * deviation**2 / variance * gap)
            logs.append(share.log() - 0.5 * (gap**2 / variance + variance.log()).sum(dim=(1, 2, 3)))
        posterior = torch.stack(logs).softmax(dim=0)
        return (posterior[..., None, None, None] * torch.stack(means)).sum(dim=0)

    return denoise


def sampled(config: SampleConfig, schedule: NoiseSchedule) -> Tensor:
    source = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(COUNT, 1, 2, 2, generator=source)

    steps = schedule.steps(config.steps, config.spacing)
    start = noise() * (1.0 if schedule.variance_preserving else float(steps.sigmas[0]))
    return build_sampler(config)(mixture_denoiser(schedule), start, steps, None, noise=noise)


def check(found: Tensor, slack: float) -> None:
    """Within Monte Carlo error, and a slack for what so many steps leave."""
    mean, covariance = true_moments()
    flat = found.flatten(1).double()
    error = covariance.diagonal().sqrt() / math.sqrt(COUNT)
    assert ((flat.mean(dim=0) - mean).abs() < 4 * error + slack).all()
    # Its standard error, if it were Gaussian; that of a mixture of two is smaller.
    variances = torch.outer(covariance.diagonal(), covariance.diagonal())
    error = ((variances + covariance**2) / COUNT).sqrt()
    assert ((flat.T.cov() - covariance).abs() < 4 * error + slack).all()
    first = (flat - CENTRES_KCHW.flatten(1)[0]).norm(dim=1) < (flat - CENTRES_KCHW.flatten(1)[1]).norm(dim=1)
    assert first.double().mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / COUNT) + slack)


@pytest.mark.parametrize("kind", SCHEDULES)
# The consistency sampler is exact for a student, whose estimate is the end of the flow, and not for a denoiser.
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "consistency"])
def test_every_sampler_reproduces_a_mixture(name: str, kind: str) -> None:
    found = sampled(SampleConfig(sampler=name, steps=250, variance="fixed_small"), SCHEDULES[kind])
    check(found, slack=0.006)


@pytest.mark.parametrize(
    "config",
    [
        SampleConfig(sampler="ddim", eta=1.0, steps=250),
        SampleConfig(sampler="ddpm", variance="fixed_large", steps=1000),
    ],
    ids=["ddim-1", "ddpm-large"],
)
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_other_noises_do_too(config: SampleConfig, kind: str) -> None:
    check(sampled(config, SCHEDULES[kind]), slack=0.006)


@pytest.mark.parametrize("spacing", get_args(SampleConfig.model_fields["spacing"].annotation))
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("name", ["dpmpp_2m", "heun"])
def test_every_spacing_does_too(name: str, spacing: Any, kind: str) -> None:
    check(sampled(SampleConfig(sampler=name, spacing=spacing, steps=60), SCHEDULES[kind]), slack=0.01)


def test_the_oracle_is_strict_enough_to_see_a_wrong_variance() -> None:
    with pytest.raises(AssertionError):
        check(1.06 * sampled(SampleConfig(sampler="heun", steps=60), SCHEDULES["cosine"]), slack=0.006)
    mean, covariance = true_moments()
    torch.manual_seed(0)
    draws = torch.distributions.Categorical(SHARES).sample((200_000,))
    exact = CENTRES_KCHW.flatten(1)[draws] + DEVIATIONS[draws, None] * torch.randn(200_000, 4)
    torch.testing.assert_close(exact.mean(dim=0).double(), mean, rtol=0, atol=0.006)
    torch.testing.assert_close(exact.double().T.cov(), covariance, rtol=0, atol=0.006)
