"""What a network may predict: every target stands for the same clean image, and weightings mean the same for each."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_config
from torch import Tensor

from diffusion_core.config import DiffusionConfig
from diffusion_core.diffusion.denoiser import Denoiser
from diffusion_core.diffusion.losses import diffusion_loss, weight
from diffusion_core.diffusion.predictions import SIGMA_DATA
from diffusion_core.diffusion.schedule import build_schedule

SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"schedule": "linear"},
    "cosine": {"schedule": "cosine"},
    "sigmoid": {"schedule": "sigmoid"},
    "shifted": {"schedule": "cosine", "logsnr_shift": -2.0},
    "karras": {"schedule": "karras", "prediction": "edm"},
}
SCHEDULES = {name: build_schedule(DiffusionConfig(timesteps=200, **changes)) for name, changes in SETTINGS.items()}
PREDICTIONS = ["eps", "x0", "v", "edm"]
PRESERVING = [(name, prediction) for name in SCHEDULES if name != "karras" for prediction in PREDICTIONS]
CASES = [*PRESERVING, ("karras", "edm"), ("karras", "v"), ("karras", "eps"), ("karras", "x0")]


def unused(*_: Any) -> Tensor:
    raise AssertionError("the network is not asked")


@given(
    case=st.sampled_from(CASES),
    t=st.floats(0, 199, width=32),
    x0=st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=4),
    noise=st.lists(st.floats(-4, 4, width=32), min_size=4, max_size=4),
    whole=st.booleans(),
)
def test_every_target_gives_back_the_clean_image(
    case: tuple[str, str], t: float, x0: list[float], noise: list[float], whole: bool
) -> None:
    name, prediction = case
    schedule = SCHEDULES[name]
    denoiser = Denoiser(unused, schedule, prediction)
    # In float64, as float32 rounds x_t, which eps divides by a tiny alpha.
    x0_BCHW, noise_BCHW = (torch.tensor(values, dtype=torch.float64).view(1, 1, 2, 2) for values in (x0, noise))
    t_B = torch.tensor([int(t)]) if whole else torch.tensor([t])
    x_BCHW = schedule.add_noise(x0_BCHW, noise_BCHW, t_B)
    found = denoiser.clean(denoiser.target(x0_BCHW, noise_BCHW, t_B), x_BCHW, t_B)
    assert (found - x0_BCHW).abs().max() < 1e-5


@pytest.mark.parametrize("name", SCHEDULES)
@torch.no_grad()
def test_all_predictions_are_one_denoiser(name: str) -> None:
    """A network of each kind that stands for the same clean images, asked as samplers ask it."""
    schedule = SCHEDULES[name]
    source = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(20, 1, 4, 4, generator=source).clamp(-1, 1) for _ in range(2))
    t = torch.linspace(0, 150 if name == "shifted" else 180, 20).long()
    x = schedule.add_noise(x0, noise, t)
    for prediction in PREDICTIONS:
        answer = Denoiser(unused, schedule, prediction).target(x0, noise, t)
        found = Denoiser(lambda *_, answer=answer: answer, schedule, prediction)(x, t, None)
        assert (found - x0).abs().max() < 1e-4, prediction


def test_edm_scales_what_the_network_sees_and_gives() -> None:
    """Karras et al. 2022, eq. 7 and table 1, with x / alpha in the place of their x."""
    schedule = SCHEDULES["cosine"]
    t = torch.tensor([3, 90, 170])
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []

    def network(inputs: Tensor, told: Tensor, labels: Tensor | None) -> Tensor:
        seen.append(inputs)
        assert torch.equal(told, t)
        return torch.cos(inputs)

    found = Denoiser(network, schedule, "edm")(x, t, None)
    for i in range(3):
        alpha, level = schedule.alphas[t[i]].item(), schedule.levels[t[i]].item()
        total = level**2 + 0.25
        inputs = (x[i] / alpha) / total**0.5
        torch.testing.assert_close(seen[0][i], inputs, rtol=1e-5, atol=1e-6)
        expected = 0.25 / total * x[i] / alpha + level * 0.5 / total**0.5 * torch.cos(inputs)
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-5)


def test_edm_makes_inputs_and_targets_of_unit_variance() -> None:
    """That is what the preconditioning is for, for data of the standard deviation that it assumes."""
    source = torch.Generator().manual_seed(0)
    x0 = SIGMA_DATA * torch.randn(20_000, 1, 1, 1, generator=source)
    noise = torch.randn(20_000, 1, 1, 1, generator=source)
    for name in ("karras", "linear"):
        schedule = SCHEDULES[name]
        for t in (0, 60, 120, 199):
            t_B = torch.full((20_000,), t)
            seen: list[Tensor] = []
            denoiser = Denoiser(lambda x, *_, seen=seen: seen.append(x) or x, schedule, "edm")
            denoiser(schedule.add_noise(x0, noise, t_B), t_B, None)
            assert seen[0].std().item() == pytest.approx(1.0, abs=0.03)
            assert denoiser.target(x0, noise, t_B).std().item() == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize(("name", "prediction"), CASES)
def test_error_scale_is_the_ratio_of_squared_errors(name: str, prediction: str) -> None:
    denoiser = Denoiser(unused, SCHEDULES[name], prediction)
    t = torch.arange(200)
    source = torch.Generator().manual_seed(1)
    x, output, nudge = (torch.randn(200, 1, 3, 3, generator=source, dtype=torch.float64) for _ in range(3))
    moved = denoiser.clean(output + nudge, x, t) - denoiser.clean(output, x, t)
    ratio = nudge.square().mean(dim=(1, 2, 3)) / moved.square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(denoiser.error_scale(t), ratio.float(), rtol=1e-4, atol=0)


WEIGHTINGS = ["min_snr", "p2", "edm"]


def wanted_weight(weighting: str, snr: Tensor) -> Tensor:
    """Of the squared error of the clean image, as the papers have it."""
    if weighting == "min_snr":  # Hang et al. 2023, eq. 6.
        return torch.minimum(snr, torch.tensor(3.0))
    if weighting == "p2":  # Choi et al. 2022, eq. 8: SNR / (1 + SNR)^gamma.
        return snr / (1 + snr) ** 1.5
    return (1 / snr + SIGMA_DATA**2) / (1 / snr * SIGMA_DATA**2)  # Karras et al. 2022: (l^2 + s^2) / (l s)^2.


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("name", ["linear", "cosine", "karras"])
def test_weightings_mean_the_same_for_every_prediction(name: str, weighting: Any) -> None:
    """Networks of each kind that err by as much in the clean image have the same loss: the weight times that error."""
    schedule = SCHEDULES[name]
    config = DiffusionConfig(weighting=weighting, min_snr_gamma=3.0, p2_gamma=1.5)
    t = torch.linspace(0, 150, 16).long()
    source = torch.Generator().manual_seed(2)
    x0, noise, error = (torch.randn(16, 1, 3, 3, generator=source) for _ in range(3))
    expected = wanted_weight(weighting, schedule.levels[t] ** -2) * error.square().mean(dim=(1, 2, 3))
    for prediction in PREDICTIONS:
        x = schedule.add_noise(x0, noise, t)
        helper = Denoiser(unused, schedule, prediction)
        slope = helper.clean(torch.ones_like(x), x, t) - helper.clean(torch.zeros_like(x), x, t)
        wrong = helper.target(x0, noise, t) + error / slope
        found = diffusion_loss(Denoiser(lambda *_, w=wrong: w, schedule, prediction), x0, noise, t, None, config)
        torch.testing.assert_close(
            found, expected.float(), rtol=3e-3, atol=1e-5, msg=partial("{} {}".format, prediction)
        )


@pytest.mark.parametrize("name", SCHEDULES)
def test_edm_weighting_with_edm_prediction_is_one(name: str) -> None:
    denoiser = Denoiser(unused, SCHEDULES[name], "edm")
    found = weight(denoiser, torch.arange(200), DiffusionConfig(weighting="edm"))
    torch.testing.assert_close(found, torch.ones(200), rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_uniform_weighting_is_one_for_every_prediction(prediction: str) -> None:
    denoiser = Denoiser(unused, SCHEDULES["linear"], prediction)
    assert torch.equal(weight(denoiser, torch.arange(200), DiffusionConfig()), torch.ones(200))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_pure_noise_has_a_positive_weight(prediction: str, weighting: Any) -> None:
    schedule = build_schedule(DiffusionConfig(timesteps=50, zero_terminal_snr=True, prediction=prediction))
    denoiser = Denoiser(lambda x, *_: torch.zeros_like(x), schedule, prediction)
    x0, noise = torch.full((2, 1, 2, 2), 0.5), torch.ones(2, 1, 2, 2)
    found = diffusion_loss(denoiser, x0, noise, torch.tensor([49, 10]), None, DiffusionConfig(weighting=weighting))
    assert torch.isfinite(found).all()
    # EDM's weight is 1 / sigma_data^2. That of the others would be 0: they have that of the v loss (Lin et al. 2023).
    assert found[0].item() == pytest.approx((4.0 if weighting == "edm" else 1.0) * 0.25, rel=1e-5)


def test_a_weight_that_underflows_is_not_that_of_pure_noise() -> None:
    """P2 with a large exponent: (1 + SNR)^gamma exceeds float32 at the first timesteps."""
    denoiser = Denoiser(unused, build_schedule(DiffusionConfig()), "eps")
    found = weight(denoiser, torch.tensor([0, 999]), DiffusionConfig(weighting="p2", p2_gamma=10.0))
    assert found[0].item() < 1e-20
    assert found[1].item() == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("delta", [0.1, 0.5, 2.0])
def test_huber_is_the_squared_error_up_to_delta_and_smooth_beyond(delta: float) -> None:
    config = tiny_config(diffusion__loss="huber", diffusion__huber_delta=delta).diffusion
    errors = torch.tensor([0.0, 0.5 * delta, delta, 1.5 * delta, 10 * delta]).view(5, 1, 1, 1)
    zero = Denoiser(lambda x, *_: torch.zeros_like(x), SCHEDULES["linear"], "eps")
    found = diffusion_loss(zero, torch.zeros(5, 1, 1, 1), errors, torch.zeros(5).long(), None, config)
    square = [0.0, 0.25 * delta**2, delta**2]
    linear = [delta * (2 * factor * delta - delta) for factor in (1.5, 10)]
    assert found.tolist() == pytest.approx([*square, *linear], rel=1e-5)
