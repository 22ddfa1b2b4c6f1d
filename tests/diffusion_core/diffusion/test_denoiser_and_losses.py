"""The parametrisation and the loss, against their formulas in numpy; guidance, a wrapper around a denoiser."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_network
from torch import Tensor

from diffusion_core.config import DiffusionConfig
from diffusion_core.diffusion.denoiser import Denoiser, clipped
from diffusion_core.diffusion.losses import diffusion_loss, noise_error
from diffusion_core.diffusion.schedule import build_schedule
from diffusion_core.model.unet import NO_LABEL
from diffusion_core.registries import PREDICTIONS
from diffusion_core.sampling.guidance import guided

SCHEDULE = build_schedule(tiny_config().diffusion)
T = SCHEDULE.timesteps


def draws(batch: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(3)
    x0 = torch.rand(batch, 1, 8, 8, generator=source) * 2 - 1
    return x0, torch.randn(x0.shape, generator=source), torch.linspace(0, T - 1, batch).long()


def loss(kind: str, **changes: object) -> DiffusionConfig:
    return tiny_config(diffusion__loss=kind).diffusion.model_copy(update=changes)


def answering(answer: Tensor) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    return lambda x, t, labels: answer


def test_x0_follows_from_the_predicted_noise() -> None:
    x, eps, t = draws()
    found = Denoiser(answering(eps), SCHEDULE)(x, t, None).numpy()
    alphas_bar = SCHEDULE.alphas.numpy()[t] ** 2
    expected = (x.numpy() - np.sqrt(1 - alphas_bar)[:, None, None, None] * eps.numpy()) / np.sqrt(alphas_bar)[
        :, None, None, None
    ]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_the_network_sees_images_timesteps_and_labels_as_given() -> None:
    seen = []

    def network(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        seen.append((x, t, labels))
        return torch.zeros_like(x, dtype=torch.bfloat16)

    x, _, t = draws()
    labels = torch.arange(6)
    answer = Denoiser(network, SCHEDULE)(x, t, labels)
    assert seen[0] == (x, t, labels)
    assert answer.dtype == torch.float32  # Whatever the network computed in.


def test_clipped() -> None:
    denoiser = clipped(answering(torch.tensor([-3.0, -1.0, 0.25, 1.5]).view(1, 1, 2, 2)))
    assert denoiser(torch.zeros(1, 1, 2, 2), torch.zeros(1), None).flatten().tolist() == [-1.0, -1.0, 0.25, 1.0]


def huber(error: np.ndarray) -> np.ndarray:
    """Squared up to 0.5, then linear with the slope that it has there."""
    return np.where(np.abs(error) <= 0.5, error**2, np.abs(error) - 0.25)


@pytest.mark.parametrize(("kind", "distance"), [("l2", np.square), ("l1", np.abs), ("huber", huber)])
def test_loss_is_the_formula_in_numpy(kind: str, distance: Callable[[np.ndarray], np.ndarray]) -> None:
    network = tiny_network()
    x0, noise, t = draws()
    labels = torch.tensor([0, 1, 2, NO_LABEL, 8, 9])
    with torch.no_grad():
        found = diffusion_loss(Denoiser(network, SCHEDULE), x0, noise, t, labels, loss(kind))
        alphas_bar = (SCHEDULE.alphas**2)[t].numpy()[:, None, None, None]
        noisy = np.sqrt(alphas_bar) * x0.numpy() + np.sqrt(1 - alphas_bar) * noise.numpy()
        predicted = network(torch.from_numpy(noisy).float(), t, labels).numpy()
    expected = distance(predicted - noise.numpy()).mean(axis=(1, 2, 3))
    assert found.shape == (6,)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


@torch.no_grad()
def test_loss_is_per_sample() -> None:
    denoiser = Denoiser(tiny_network(), SCHEDULE)
    x0, noise, t = draws()
    labels = torch.arange(6)
    together = diffusion_loss(denoiser, x0, noise, t, labels, loss("l2"))
    for i in range(6):
        one = slice(i, i + 1)
        alone = diffusion_loss(denoiser, x0[one], noise[one], t[one], labels[one], loss("l2"))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-6)
    changed = x0.clone()
    changed[2] += 0.5
    found = diffusion_loss(denoiser, changed, noise, t, labels, loss("l2"))
    assert (found != together).nonzero().flatten().tolist() == [2]


def test_a_perfect_prediction_has_no_loss_and_zero_prediction_that_of_the_noise() -> None:
    x0, noise, t = draws()
    for kind in ("l2", "l1", "huber"):
        assert not diffusion_loss(Denoiser(answering(noise), SCHEDULE), x0, noise, t, None, loss(kind)).any()
    zero = Denoiser(answering(torch.zeros_like(noise)), SCHEDULE)
    torch.testing.assert_close(
        diffusion_loss(zero, x0, noise, t, None, loss("l2")), noise.square().mean(dim=(1, 2, 3)), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_error_of_the_noise_is_the_same_for_every_parametrisation(prediction: str) -> None:
    """Of outputs that imply the same noise, which is known here."""
    x0, noise, t = draws()
    t = t.clamp(max=40)  # In nearly pure noise, x0 is the rounding of x_t divided by a tiny alpha.
    wrong = noise + 0.1 * torch.randn(noise.shape, generator=torch.Generator().manual_seed(8))
    alpha, sigma = SCHEDULE.at(t, x0)
    estimate = (alpha * x0 + sigma * noise - sigma * wrong) / alpha
    formulas = {
        "eps": wrong,
        "x0": estimate,
        "v": alpha * wrong - sigma * estimate,
        # Karras et al. 2022, eq. 7, with sigma_data = 0.5: D = c_skip x + c_out F.
        "edm": (estimate - 0.25 / (0.25 + (sigma / alpha) ** 2) * (x0 + sigma / alpha * noise))
        / (0.5 * sigma / alpha * (0.25 + (sigma / alpha) ** 2) ** -0.5),
    }
    denoiser = Denoiser(answering(formulas[prediction]), SCHEDULE, prediction)
    found = noise_error(denoiser, x0, noise, t, None)
    torch.testing.assert_close(found, (wrong - noise).square().mean(dim=(1, 2, 3)), rtol=1e-3, atol=1e-6)


class Counted:
    """A denoiser that keeps its calls."""

    def __init__(self) -> None:
        self.network = Denoiser(tiny_network(), SCHEDULE)
        self.calls: list[tuple[int, list[int] | None]] = []

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        self.calls.append((len(x), None if labels is None else labels.tolist()))
        return self.network(x, t, labels)


def test_guidance_of_scale_1_is_the_denoiser_itself() -> None:
    denoiser = Counted()
    assert guided(denoiser, 1.0) is denoiser


def test_guidance_of_scale_0_ignores_labels_and_costs_one_pass() -> None:
    denoiser = Counted()
    x, _, t = draws()
    found = guided(denoiser, 0.0)(x, t, torch.arange(6))
    assert torch.equal(found, denoiser(x, t, None))
    assert denoiser.calls[0][0] == 6


@pytest.mark.parametrize("scale", [0.5, 2.0, 7.5])
def test_guidance_is_linear_in_one_batch(scale: float) -> None:
    denoiser = Counted()
    x, _, t = draws()
    t = t.clamp(max=40)  # In nearly pure noise, x0 is the rounding of x_t divided by a tiny alpha.
    labels = torch.arange(6)
    found = guided(denoiser, scale)(x, t, labels)
    assert denoiser.calls == [(12, [*range(6), *[NO_LABEL] * 6])]
    with_label, without = denoiser(x, t, labels), denoiser(x, t, None)
    assert (with_label - without).abs().max() > 0.01
    torch.testing.assert_close(found, (1 - scale) * without + scale * with_label, rtol=1e-4, atol=1e-4)


def test_guiding_x0_is_guiding_the_noise() -> None:
    """Ho & Salimans 2022, eq. 6, for the noise: (1 + w) eps(label) - w eps(no label), with w = scale - 1."""
    scale = 3.0
    denoiser = Counted()
    x, _, t = draws()
    t = t.clamp(max=40)  # In nearly pure noise, x0 is the rounding of x_t divided by a tiny alpha.
    labels = torch.arange(6)
    alpha, sigma = SCHEDULE.at(t, x)
    x0 = guided(denoiser, scale)(x, t, labels)
    with torch.no_grad():
        eps = scale * denoiser.network.network(x, t, labels) - (scale - 1) * denoiser.network.network(x, t, None)
    torch.testing.assert_close(alpha * x0 + sigma * eps, x, rtol=1e-4, atol=1e-4)


def test_guidance_without_labels_is_unconditional() -> None:
    denoiser = Counted()
    x, _, t = draws()
    assert torch.equal(guided(denoiser, 4.0)(x, t, None), denoiser(x, t, None))
