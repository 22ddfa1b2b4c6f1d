"""Noise schedules against diffusers and the papers; the timesteps that samplers visit; the forward process."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from diffusion_core.config import DiffusionConfig
from diffusion_core.schedule import NoiseSchedule, build_schedule, cosine_betas, linear_betas, spaced_timesteps

KINDS = ["linear", "cosine"]


def schedule(kind: str = "linear", timesteps: int = 1000) -> NoiseSchedule:
    return build_schedule(DiffusionConfig(schedule=kind, timesteps=timesteps))


@pytest.mark.parametrize(("kind", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_equals_diffusers(kind: str, theirs: str) -> None:
    scheduler = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule=theirs)
    betas = linear_betas(1000, 1e-4, 0.02) if kind == "linear" else cosine_betas(1000)
    torch.testing.assert_close(betas.float(), scheduler.betas, rtol=1e-5, atol=1e-7)
    # diffusers multiplies a thousand factors in float32; ours is the more exact one.
    torch.testing.assert_close(schedule(kind).alphas.square().float(), scheduler.alphas_cumprod, rtol=2e-4, atol=1e-9)


def test_linear_schedule_has_the_end_points_of_the_paper() -> None:
    linear = schedule()
    assert linear.alphas[0].square().item() == pytest.approx(1 - 1e-4, abs=1e-12)
    assert linear.alphas[-1].square().item() == pytest.approx(4.04e-5, rel=0.01)  # Ho et al.: prior KL about 1e-5.


def test_linear_schedule_keeps_its_total_noise_for_other_lengths() -> None:
    full, short = schedule(timesteps=1000), schedule(timesteps=250)
    assert math.log(short.alphas[-1]) == pytest.approx(math.log(full.alphas[-1]), rel=0.05)


@pytest.mark.parametrize("timesteps", [10, 100, 1000])
def test_cosine_schedule_is_the_formula_of_the_paper(timesteps: int) -> None:
    def f(t: int) -> float:
        return math.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    found = schedule("cosine", timesteps).alphas.square()
    for t in range(timesteps - 1):  # The last beta is capped at 0.999.
        assert found[t].item() == pytest.approx(f(t + 1) / f(0), rel=1e-9)
    assert found[-1].item() == pytest.approx(0.001 * found[-2].item(), rel=1e-9)


@given(kind=st.sampled_from(KINDS), timesteps=st.integers(2, 2000))
def test_every_schedule_goes_from_image_to_noise(kind: str, timesteps: int) -> None:
    made = schedule(kind, timesteps)
    assert made.alphas.dtype == made.sigmas.dtype == torch.float64
    assert made.timesteps == len(made.alphas) == len(made.sigmas) == timesteps
    torch.testing.assert_close(made.alphas**2 + made.sigmas**2, torch.ones(timesteps).double(), rtol=0, atol=1e-12)
    assert (made.alphas.diff() < 0).all()
    assert (made.sigmas.diff() >= 0).all()  # Near pure noise, sigma is 1 to the last bit.
    assert (made.alphas > 0).all()
    assert (made.sigmas > 0).all()


@given(data=st.data(), spacing=st.sampled_from(["uniform", "quadratic"]), timesteps=st.integers(1, 400))
def test_spaced_timesteps(data: st.DataObject, spacing: str, timesteps: int) -> None:
    count = data.draw(st.integers(1, timesteps))
    check_spacing(timesteps, count, spacing)


@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
def test_spaced_timesteps_for_every_count_of_small_lengths(spacing: str) -> None:
    for timesteps in range(1, 33):
        for count in range(1, timesteps + 1):
            check_spacing(timesteps, count, spacing)


def check_spacing(timesteps: int, count: int, spacing: str) -> None:
    chosen = spaced_timesteps(timesteps, count, spacing)
    assert len(chosen) == count
    assert all(isinstance(t, int) for t in chosen)
    assert chosen[0] == timesteps - 1  # Sampling starts from pure noise.
    assert chosen == sorted(set(chosen), reverse=True)
    assert chosen[-1] >= 0
    if count > 1 and spacing == "uniform":
        assert chosen[-1] == 0
        gaps = [a - b for a, b in itertools.pairwise(chosen)]
        assert max(gaps) - min(gaps) <= 1
    if count == timesteps:
        assert chosen == list(range(timesteps))[::-1]


def test_quadratic_spacing_is_denser_near_the_image() -> None:
    chosen = spaced_timesteps(1000, 50, "quadratic")
    gaps = [a - b for a, b in itertools.pairwise(chosen)]
    assert gaps[-1] < 5 < 25 < gaps[1]
    assert chosen[-1] == 0
    assert chosen[1] == 800  # Song et al. 2021: the squares end at 0.8 T.
    assert chosen[25] == int((24 * math.sqrt(800) / 48) ** 2)


@pytest.mark.parametrize("count", [0, -1, 11])
def test_impossible_counts_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=r"sample.steps = .* expected 1 to diffusion.timesteps = 10"):
        spaced_timesteps(10, count, "uniform")


def test_steps_carry_the_amplitudes_of_their_timesteps_and_end_at_the_image() -> None:
    made = schedule("cosine", 40)
    steps = made.steps(5)
    assert len(steps) == 5
    assert steps.timesteps == (39, 29, 20, 10, 0)
    for index, t in enumerate(steps.timesteps):
        assert steps.alphas[index] == made.alphas[t]
        assert steps.sigmas[index] == made.sigmas[t]
    assert steps.alphas[-1] == 1.0
    assert steps.sigmas[-1] == 0.0
    assert len(steps.alphas) == len(steps.sigmas) == 6


@pytest.mark.parametrize("t", [0, 300, 999])
def test_forward_process_has_the_moments_of_the_paper(t: int) -> None:
    """q(x_t | x_0) is normal with mean sqrt(alphas_bar) x_0 and variance 1 - alphas_bar (Ho et al. 2020, eq. 4)."""
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    alpha_bar = math.prod(1 - beta for beta in betas[: t + 1])
    count = 20_000
    source = torch.Generator().manual_seed(t)
    x0 = torch.tensor([-1.0, 0.25, 0.8]).repeat(count, 1)[:, None, None, :]
    noise = torch.randn(x0.shape, generator=source)
    noisy = schedule().add_noise(x0, noise, torch.full((count,), t))
    deviation = math.sqrt(1 - alpha_bar)
    for column, value in enumerate((-1.0, 0.25, 0.8)):
        drawn = noisy[..., column]
        assert drawn.mean().item() == pytest.approx(math.sqrt(alpha_bar) * value, abs=5 * deviation / math.sqrt(count))
        assert drawn.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * count))


def test_each_sample_has_its_own_timestep() -> None:
    made = schedule("cosine", 10)
    alpha, sigma = made.at(torch.tensor([9, 0, 4]), torch.zeros(3, 1, 2, 2))
    assert alpha.shape == sigma.shape == (3, 1, 1, 1)
    assert alpha.dtype == torch.float32
    assert alpha.flatten().tolist() == made.alphas[[9, 0, 4]].float().tolist()
    assert sigma.flatten().tolist() == made.sigmas[[9, 0, 4]].float().tolist()
