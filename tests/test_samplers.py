"""Whole sampling loops: against diffusers' schedulers, against each other, and on data whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from tiny import tiny_config, tiny_network
from torch import Tensor

from diffusion_core.config import SampleConfig
from diffusion_core.denoiser import Denoiser, DenoiserFunction, clipped
from diffusion_core.samplers import build_sampler, ddim, ddpm
from diffusion_core.schedule import NoiseSchedule, SamplingSteps, build_schedule

T = 50
LINEAR = build_schedule(tiny_config(diffusion__schedule="linear", diffusion__timesteps=T).diffusion)
THEIR_BETAS = {"trained_betas": (1 - LINEAR.alphas**2 / torch.cat([torch.ones(1), LINEAR.alphas[:-1] ** 2])).tolist()}
LABELS = torch.tensor([0, 3, 9, 5])


SEED = 1


def tape() -> Iterator[Tensor]:
    """The same noise for us and for them: the start, then one a step."""
    source = torch.Generator().manual_seed(SEED)
    while True:
        yield torch.randn(4, 1, 8, 8, generator=source)


def network() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A network whose answers are of the size of noise, as a trained one's are; a wild one would amplify rounding."""
    net = tiny_network(tiny_config(diffusion__timesteps=T))
    return lambda x, t, labels: 0.3 * net(x, t, labels) + 0.7 * x


@torch.no_grad()
def ours(sampler: Callable[..., Tensor], steps: SamplingSteps, clip: bool, **settings: object) -> Tensor:
    denoiser: DenoiserFunction = Denoiser(network(), LINEAR)
    noises = tape()
    return sampler(
        clipped(denoiser) if clip else denoiser,
        next(noises),
        steps,
        LABELS,
        noise=lambda: next(noises),
        **settings,
    )


@torch.no_grad()
def theirs_ddpm(timesteps: list[int], clip: bool, variance: str) -> Tensor:
    scheduler = DDPMScheduler(T, variance_type=variance, clip_sample=clip, **THEIR_BETAS)
    scheduler.set_timesteps(timesteps=timesteps)
    source, net = torch.Generator().manual_seed(SEED), network()
    x = torch.randn(4, 1, 8, 8, generator=source)
    for t in timesteps:  # A step draws its noise from the generator, as the tape does.
        x = scheduler.step(net(x, torch.full((4,), t), LABELS), t, x, generator=source).prev_sample
    return x


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("count", [T, 12])
def test_ddpm_equals_diffusers(variance: str, clip: bool, count: int) -> None:
    steps = LINEAR.steps(count)
    expected = theirs_ddpm(list(steps.timesteps), clip, variance)
    found = ours(ddpm, steps, clip, variance=variance)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("count", [T, 10])
@torch.no_grad()
def test_ddim_equals_diffusers(eta: float, clip: bool, count: int) -> None:
    scheduler = DDIMScheduler(
        T, clip_sample=clip, set_alpha_to_one=True, timestep_spacing="leading", steps_offset=0, **THEIR_BETAS
    )
    scheduler.set_timesteps(count)
    # 45, 40, .. 0: with "leading" spacing, their rule for what follows t (t - T // count) is the next of the list.
    timesteps = scheduler.timesteps.tolist()
    noises = tape()
    x, net = next(noises), network()
    for t in timesteps:
        eps = net(x, torch.full((4,), t), LABELS)
        drawn = next(noises) if eta > 0 and t > 0 else None
        # Ours derives the noise from the clipped image, which diffusers calls use_clipped_model_output.
        x = scheduler.step(
            eps, t, x, eta=eta if t > 0 else 0.0, use_clipped_model_output=True, variance_noise=drawn
        ).prev_sample

    steps = SamplingSteps(
        tuple(timesteps),
        torch.cat([LINEAR.alphas[timesteps], torch.ones(1).double()]),
        torch.cat([LINEAR.sigmas[timesteps], torch.zeros(1).double()]),
    )
    found = ours(ddim, steps, clip, eta=eta)
    assert x.std() > 0.1
    assert (found - x).abs().max() < 1e-4


@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
@pytest.mark.parametrize("count", [T, 9, 1])
def test_ddim_with_eta_1_is_ddpm_with_the_small_variance(spacing: str, count: int) -> None:
    steps = LINEAR.steps(count, spacing)
    one, other = ours(ddpm, steps, False, variance="fixed_small"), ours(ddim, steps, False, eta=1.0)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


MEAN, DEVIATION = 0.4, 0.3


def gaussian_denoiser(schedule: NoiseSchedule) -> DenoiserFunction:
    """The best denoiser for data drawn from N(MEAN, DEVIATION^2): its posterior mean, in closed form."""

    def denoise(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        alpha, sigma = schedule.at(t, x)
        gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
        return MEAN + gain * (x - alpha * MEAN)

    return denoise


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize(
    "config",
    [
        SampleConfig(sampler="ddim", eta=0.0),
        SampleConfig(sampler="ddim", eta=1.0),
        SampleConfig(sampler="ddpm", variance="fixed_small"),
        SampleConfig(sampler="ddpm", variance="fixed_large"),
    ],
    ids=lambda config: f"{config.sampler}-{config.eta}-{config.variance}",
)
def test_data_of_known_distribution_is_sampled_from_it(kind: str, config: SampleConfig) -> None:
    schedule = build_schedule(tiny_config(diffusion__schedule=kind, diffusion__timesteps=1000).diffusion)
    count = 16_384
    source = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(count, 1, 1, 1, generator=source)

    found = build_sampler(config)(gaussian_denoiser(schedule), noise(), schedule.steps(1000), None, noise=noise)
    # The last step answers with the posterior mean, which lacks what noise is left: sigma_0, here 0.01.
    assert found.mean().item() == pytest.approx(MEAN, abs=5 * DEVIATION / math.sqrt(count))
    assert found.std().item() == pytest.approx(DEVIATION, rel=0.03)


def test_ddim_without_noise_follows_the_probability_flow_of_gaussian_data() -> None:
    """For Gaussian data, the ODE keeps an image's place in the distribution: what starts z deviations off ends so."""
    schedule = build_schedule(tiny_config(diffusion__schedule="cosine", diffusion__timesteps=1000).diffusion)
    z = torch.linspace(-2, 2, 9).view(9, 1, 1, 1)
    alpha, sigma = schedule.alphas[-1].item(), schedule.sigmas[-1].item()
    start = alpha * MEAN + math.sqrt(alpha**2 * DEVIATION**2 + sigma**2) * z
    found = ddim(gaussian_denoiser(schedule), start, schedule.steps(1000), None, noise=lambda: torch.empty(0))
    assert (found - (MEAN + DEVIATION * z)).abs().max() < 0.01


@pytest.mark.parametrize(("sampler", "draws"), [(ddpm, 6), (ddim, 0)])
def test_the_callback_is_called_once_a_step_before_it(sampler: Callable[..., Tensor], draws: int) -> None:
    steps = LINEAR.steps(7)
    seen: list[tuple[int, Tensor, Tensor]] = []
    asked: list[tuple[list[int], Tensor | None]] = []
    drawn: list[Tensor] = []

    def denoiser(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        asked.append((t.tolist(), labels))
        return 0.5 * x

    noises = tape()
    start = next(noises)

    def noise() -> Tensor:
        drawn.append(next(noises))
        return drawn[-1]

    result = sampler(denoiser, start, steps, LABELS, noise=noise, callback=lambda *call: seen.append(call))
    assert [index for index, _, _ in seen] == list(range(7))
    assert all(x.shape == x0.shape == start.shape for _, x, x0 in seen)
    assert torch.equal(seen[0][1], start)
    assert all(torch.equal(x0, 0.5 * x) for _, x, x0 in seen)
    assert torch.equal(result, seen[-1][2])  # The last step ends at the clean image.
    assert [t for t, _ in asked] == [[t] * 4 for t in steps.timesteps]
    assert all(labels is LABELS for _, labels in asked)
    assert len(drawn) == draws


def test_build_sampler_binds_the_settings() -> None:
    steps = LINEAR.steps(6)
    found = ours(build_sampler(SampleConfig(sampler="ddpm", variance="fixed_large")), steps, False)
    assert torch.equal(found, ours(ddpm, steps, False, variance="fixed_large"))
    assert not torch.equal(found, ours(ddpm, steps, False, variance="fixed_small"))
    found = ours(build_sampler(SampleConfig(sampler="ddim", eta=0.7)), steps, False)
    assert torch.equal(found, ours(ddim, steps, False, eta=0.7))
    assert not torch.equal(found, ours(ddim, steps, False, eta=0.0))
