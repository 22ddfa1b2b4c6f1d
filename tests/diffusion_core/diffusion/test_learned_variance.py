"""The variational bound against textbook formulas, written down anew: Ho et al. 2020, Nichol & Dhariwal 2021."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from tiny import tiny_config, tiny_network
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from diffusion_core.diffusion.denoiser import Denoiser
from diffusion_core.diffusion.losses import diffusion_loss, discretised_log_likelihood, variational_bound
from diffusion_core.diffusion.schedule import build_schedule

T = 50


def betas(kind: str) -> np.ndarray:
    """As the papers define them, for T = 50."""
    if kind == "linear":
        return np.linspace(20 * 1e-4, 20 * 0.02, T)
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


def settings(kind: str = "cosine", **changes: Any) -> Any:
    return tiny_config(diffusion__schedule=kind, diffusion__timesteps=T, model__learned_variance=True, **changes)


def step_of_the_reverse_process(
    beta: np.ndarray, t: int, x0: Tensor, x: Tensor, clean: Tensor, fraction: Tensor
) -> tuple[Normal, Normal]:
    """q(x_{t-1} | x_t, x_0) (Ho et al., eq. 6, 7) and p(x_{t-1} | x_t) with its variance (Nichol et al., eq. 15)."""
    alpha_bar = np.cumprod(1 - beta)
    before = alpha_bar[t - 1] if t else 1.0
    posterior_variance = (1 - before) / (1 - alpha_bar[t]) * beta[t]

    def mean(image: Tensor) -> Tensor:
        return (
            math.sqrt(before) * beta[t] / (1 - alpha_bar[t]) * image
            + math.sqrt(1 - beta[t]) * (1 - before) / (1 - alpha_bar[t]) * x
        )

    # The posterior's variance at t = 0 is zero: theirs at t = 1 stands in for it.
    low = posterior_variance if t else (1 - alpha_bar[0]) / (1 - alpha_bar[1]) * beta[1]
    variance = torch.exp(fraction * math.log(beta[t]) + (1 - fraction) * math.log(low))
    return Normal(mean(x0), math.sqrt(max(posterior_variance, 1e-30))), Normal(mean(clean), variance.sqrt())


def draws() -> tuple[Tensor, ...]:
    source = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (T, 1, 3, 3), generator=source)
    x0 = levels.double() / 127.5 - 1
    noise, away = (torch.randn(x0.shape, generator=source).double() for _ in range(2))
    return x0, noise, x0 + 0.3 * away, torch.rand(x0.shape, generator=source).double()


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_bound_is_the_divergence_of_two_normals(kind: str) -> None:
    schedule = build_schedule(settings(kind).diffusion)
    x0, noise, clean, fraction = draws()
    t = torch.arange(T)
    x = schedule.add_noise(x0, noise, t)
    found = variational_bound(schedule, x0, x, clean, fraction, t)
    beta = betas(kind)
    for step in range(1, T):
        true, model = step_of_the_reverse_process(beta, step, *(part[step] for part in (x0, x, clean, fraction)))
        expected = kl_divergence(true, model).mean().item() / math.log(2)
        assert found[step].item() == pytest.approx(expected, rel=2e-4, abs=1e-6), step


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_at_the_last_step_it_is_the_likelihood_of_the_image(kind: str) -> None:
    """Ho et al., eq. 13: the mass of the normal between half a level below and above, tails at the ends."""
    schedule = build_schedule(settings(kind).diffusion)
    x0, noise, _, fraction = (part[:1] for part in draws())
    x0 = x0.clone()
    x0[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])
    t = torch.zeros(1).long()
    x = schedule.add_noise(x0, noise, t)
    clean = x0 + 0.01 * noise
    found = variational_bound(schedule, x0, x, clean, fraction, t)
    _, model = step_of_the_reverse_process(betas(kind), 0, x0[0], x[0], clean[0], fraction[0])
    mean, std, image = (np.asarray(part) for part in (model.mean, model.stddev, x0[0]))
    upper = np.where(image > 0.999, 1.0, norm.cdf(image + 1 / 255, mean, std))
    lower = np.where(image < -0.999, 0.0, norm.cdf(image - 1 / 255, mean, std))
    expected = -np.log(np.maximum(upper - lower, 1e-12)).mean() / math.log(2)
    assert found.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("std", [0.002, 0.05, 0.7])
@pytest.mark.parametrize("mean", [-1.2, -0.5, 0.31, 1.0])
def test_the_likelihoods_of_all_levels_add_up_to_one(mean: float, std: float) -> None:
    levels = (torch.arange(256).double() / 127.5 - 1).view(1, 1, 16, 16)
    log_std = torch.full_like(levels, math.log(std))
    likelihoods = discretised_log_likelihood(levels, torch.full_like(levels, mean), log_std).exp()
    assert likelihoods.sum().item() == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize("std", [0.002, 0.05])
@pytest.mark.parametrize("away", [0.0, 3.0, 12.0, 300.0])
def test_the_likelihood_has_a_value_and_a_gradient_in_the_tails(std: float, away: float) -> None:
    """Against scipy's logarithms, in standard deviations from the mean; at both ends of the range as well."""
    for level, sides in ((127, (-1, 1)), (0, (1,)), (255, (-1,))):
        for side in sides:
            x0 = torch.tensor([level / 127.5 - 1.0], dtype=torch.float64)
            mean = (x0 + side * away * std).requires_grad_(True)
            log_std = torch.tensor([math.log(std)], dtype=torch.float64, requires_grad=True)
            found = discretised_log_likelihood(x0, mean, log_std)
            found.sum().backward()
            bounds = [(float(x0 - mean.detach()) + sign / 255) / std for sign in (-1, 1)]
            if level == 0:
                expected = norm.logcdf(bounds[1])
            elif level == 255:
                expected = norm.logsf(bounds[0])
            else:
                lower, upper = sorted(-abs(bound) if away * std > 1 / 255 else bound for bound in bounds)
                expected = norm.logcdf(upper) + np.log(-np.expm1(norm.logcdf(lower) - norm.logcdf(upper)))
            assert found.item() == pytest.approx(expected, rel=1e-6)
            assert mean.grad is not None
            assert log_std.grad is not None
            assert torch.isfinite(mean.grad).all()
            assert torch.isfinite(log_std.grad).all()
            if away >= 12.0:  # Towards the image, and towards a wider distribution.
                assert mean.grad.item() * side < 0.0
                assert log_std.grad.item() > 0.0


def test_likelihoods_that_are_not_used_leave_gradients_finite() -> None:
    """The bound computes them at every timestep, also where estimates are far off, and drops all but the first."""
    mean = torch.tensor([1e6, -1e6, 0.3], requires_grad=True)
    log_std = torch.tensor([-12.0, 0.0, 3.0], requires_grad=True)
    discretised_log_likelihood(torch.tensor([0.1, 1.0, -1.0]), mean, log_std).sum().backward()
    assert mean.grad is not None
    assert log_std.grad is not None
    assert torch.isfinite(mean.grad).all()
    assert torch.isfinite(log_std.grad).all()


def test_the_bound_is_smallest_where_the_model_is_right() -> None:
    schedule = build_schedule(settings().diffusion)
    x0, noise, _, _ = draws()
    t = torch.arange(T)
    x = schedule.add_noise(x0, noise, t)
    right = variational_bound(schedule, x0, x, x0, torch.zeros_like(x0), t)
    assert right[1:].abs().max() < 1e-5
    assert (variational_bound(schedule, x0, x, x0 + 0.1, torch.zeros_like(x0), t)[1:] > right[1:]).all()
    assert (variational_bound(schedule, x0, x, x0, torch.ones_like(x0), t)[1:] > right[1:]).all()


class TwoHeads(torch.nn.Module):
    """A network whose two halves of answers are parameters of their own."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(4)
        self.mean = torch.nn.Parameter(torch.randn(batch, 1, 4, 4, generator=source))
        self.between = torch.nn.Parameter(torch.randn(batch, 1, 4, 4, generator=source))

    def forward(self, *_: Any) -> Tensor:
        return torch.cat([self.mean, self.between], dim=1)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "edm"])
def test_the_bound_trains_the_variance_alone(prediction: str) -> None:
    config = settings(diffusion__prediction=prediction, diffusion__vlb_weight=0.5).diffusion
    schedule = build_schedule(config)
    source = torch.Generator().manual_seed(5)
    x0, noise = torch.rand(6, 1, 4, 4, generator=source) * 2 - 1, torch.randn(6, 1, 4, 4, generator=source)
    t = torch.tensor([0, 1, 10, 25, 40, 48])

    network = TwoHeads(6)
    denoiser = Denoiser(network, schedule, prediction, learned_variance=True)
    hybrid = diffusion_loss(denoiser, x0, noise, t, None, config)
    hybrid.sum().backward()
    plain = TwoHeads(6)
    simple = diffusion_loss(Denoiser(lambda *_: plain.mean, schedule, prediction), x0, noise, t, None, config)
    simple.sum().backward()
    assert network.mean.grad is not None
    assert network.between.grad is not None
    assert plain.mean.grad is not None
    assert torch.equal(network.mean.grad, plain.mean.grad)
    assert network.between.grad.flatten(1).abs().amax(dim=1).min() > 0

    x = schedule.add_noise(x0, noise, t)
    with torch.no_grad():
        clean = denoiser.clean(network.mean, x, t)
        bound = variational_bound(schedule, x0, x, clean, (network.between + 1) / 2, t)
    # L_hybrid = L_simple + lambda * T * L_t, as t is drawn evenly (Nichol & Dhariwal, eq. 16, and their code).
    torch.testing.assert_close(hybrid.detach(), simple.detach() + 0.5 * T * bound, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_network_says_the_fraction_by_its_second_half() -> None:
    config = settings()
    network = tiny_network(config)
    denoiser = Denoiser.from_config(network, config.diffusion, config.model, torch.device("cpu"))
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, labels = torch.tensor([0, 20, 49]), torch.tensor([1, 5, -1])
    raw = network(x, t, labels)
    output, fraction = denoiser.predict(x, t, labels)
    assert raw.shape == (3, 2, 8, 8)
    assert torch.equal(output, raw[:, :1])
    torch.testing.assert_close(fraction, raw[:, 1:] / 2 + 0.5)
    assert denoiser(x, t, labels).shape == x.shape
    assert denoiser.fraction_BCHW is not None
    assert fraction is not None
    assert torch.equal(denoiser.fraction_BCHW, fraction)
