"""Noise schedules against diffusers and the papers; the timesteps that samplers visit; the forward process."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from hypothesis import given
from hypothesis import strategies as st

from diffusion_core.config import DiffusionConfig
from diffusion_core.diffusion.sampling_steps import karras_levels, spaced_timesteps
from diffusion_core.diffusion.schedule import (
    BEYOND_LAST,
    KARRAS_START,
    NoiseSchedule,
    build_schedule,
    cosine_betas,
    linear_betas,
)

KINDS = ["linear", "cosine", "sigmoid"]


def schedule(kind: str = "linear", timesteps: int = 1000, **settings: object) -> NoiseSchedule:
    return build_schedule(DiffusionConfig.model_validate({"schedule": kind, "timesteps": timesteps} | settings))


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


@given(data=st.data(), spacing=st.sampled_from(["uniform", "trailing", "quadratic"]), timesteps=st.integers(1, 400))
def test_spaced_timesteps(data: st.DataObject, spacing: str, timesteps: int) -> None:
    count = data.draw(st.integers(1, timesteps))
    check_spacing(timesteps, count, spacing)


@pytest.mark.parametrize("spacing", ["uniform", "trailing", "quadratic"])
def test_spaced_timesteps_for_every_count_of_small_lengths(spacing: str) -> None:
    for timesteps in range(1, 33):
        for count in range(1, timesteps + 1):
            check_spacing(timesteps, count, spacing)


def check_spacing(timesteps: int, count: int, spacing: Any) -> None:
    chosen = spaced_timesteps(timesteps, count, spacing)
    assert len(chosen) == count
    assert all(isinstance(t, int) for t in chosen)
    assert chosen[0] == timesteps - 1  # Sampling starts from pure noise.
    assert chosen == sorted(set(chosen), reverse=True)
    assert chosen[-1] >= 0
    if count > 1 and spacing in ("uniform", "trailing"):
        # Trailing: as far from the clean image, which lies at -1, as the timesteps lie from each other.
        assert abs(chosen[-1] - (0 if spacing == "uniform" else timesteps / count - 1)) <= 0.5
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
    for index, t in enumerate((39, 29, 20, 10, 0)):
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


# Beyond Ho et al. and Nichol & Dhariwal.


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_zero_terminal_snr_equals_diffusers(kind: str) -> None:
    plain, found = schedule(kind), schedule(kind, zero_terminal_snr=True)
    alphas_bar = plain.alphas.square()
    betas = 1 - alphas_bar / torch.cat([torch.ones(1).double(), alphas_bar[:-1]])
    expected = torch.cumprod(1 - rescale_zero_terminal_snr(betas), dim=0)
    torch.testing.assert_close(found.alphas.square(), expected, rtol=1e-9, atol=1e-12)
    assert (found.alphas[-1], found.sigmas[-1]) == (0.0, 1.0)
    assert found.levels[-1] == math.inf
    torch.testing.assert_close(found.alphas[0], plain.alphas[0], rtol=1e-12, atol=0)  # The first one stays.
    torch.testing.assert_close(found.alphas**2 + found.sigmas**2, torch.ones(1000).double(), rtol=0, atol=1e-12)


def test_zero_terminal_snr_rescales_the_amplitudes_linearly() -> None:
    """Lin et al. 2023, algorithm 1: what is shifted and scaled is alpha itself, not its square."""
    plain, found = schedule("sigmoid", 100), schedule("sigmoid", 100, zero_terminal_snr=True)
    slope = (found.alphas[1:] - found.alphas[:-1]) / (plain.alphas[1:] - plain.alphas[:-1])
    torch.testing.assert_close(slope, slope[:1].expand(99), rtol=1e-7, atol=0)


@pytest.mark.parametrize("timesteps", [10, 1000])
def test_sigmoid_schedule_is_the_formula_of_the_paper(timesteps: int) -> None:
    """Jabri et al. 2022 as in Chen 2023, algorithm 1, with start -3, end 3, tau 1.

    Diffusers' "sigmoid" is another one (GeoDiff's: it is the betas that follow a sigmoid), and so no oracle for this.
    """

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    found = schedule("sigmoid", timesteps).alphas.square()
    for t in range(timesteps - 1):
        gamma = (sigmoid(3) - sigmoid((t + 1) / timesteps * 6 - 3)) / (sigmoid(3) - sigmoid(-3))
        assert found[t].item() == pytest.approx(gamma, rel=1e-9)
    assert found[-1].item() == pytest.approx(1e-9)  # Where the formula says 0: the paper clips it to this, too.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [-3.0, 0.5, 4.0])
def test_logsnr_shift_is_what_it_says(kind: str, shift: float) -> None:
    plain, found = schedule(kind, 200), schedule(kind, 200, logsnr_shift=shift)
    logsnr = [(made.alphas / made.sigmas).square().log() for made in (plain, found)]
    torch.testing.assert_close(logsnr[1] - logsnr[0], torch.full((200,), shift).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.alphas**2 + found.sigmas**2, torch.ones(200).double(), rtol=0, atol=1e-12)


def test_the_shift_of_simple_diffusion() -> None:
    """Hoogeboom et al. 2023, eq. 4: logsnr = -2 log tan(pi t / 2) + 2 log(64 / size), for 128 pixels."""
    made = schedule("cosine", 1000, logsnr_shift=2 * math.log(64 / 128))
    for t in (199, 499, 799):
        position = ((t + 1) / 1000 + 0.008) / 1.008
        logsnr = 2 * math.log(made.alphas[t] / made.sigmas[t])
        expected = -2 * math.log(math.tan(math.pi / 2 * position)) + 2 * math.log(64 / 128)
        assert logsnr == pytest.approx(expected, abs=0.01)  # Nichol & Dhariwal divide by f(0), which is not quite 1.


@pytest.mark.parametrize("size", [32, 256])
def test_the_shifted_cosine_of_simple_diffusion_is_approximate_near_the_image(size: int) -> None:
    """As documented: theirs has no offset and no cap, so that it begins at and ends in infinity."""
    shift = 2 * math.log(64 / size)
    made = schedule("cosine", 1000, logsnr_shift=shift)
    position = torch.arange(1, 1001).double() / 1000
    theirs = -2 * (math.pi / 2 * position).tan().log() + shift
    off = (made.alphas / made.sigmas).square().log() - theirs
    near = (off.abs() < 0.1).nonzero()[:, 0]
    assert (position[near[0]].item(), position[near[-1]].item()) == pytest.approx((0.134, 0.999))
    assert len(near) == 999 - 134 + 1
    assert off[0].item() == pytest.approx(-2.8, abs=0.05)


def test_shift_and_zero_terminal_snr_together() -> None:
    """The shift comes first; the end stays pure noise."""
    shifted = schedule("cosine", 100, logsnr_shift=-2.0)
    both = schedule("cosine", 100, logsnr_shift=-2.0, zero_terminal_snr=True)
    assert both.alphas[-1] == 0.0
    torch.testing.assert_close(both.alphas[0], shifted.alphas[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("count", [2, 10, 1000])
def test_karras_levels_equal_those_of_diffusers_edm_scheduler(count: int) -> None:
    scheduler = EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0)
    scheduler.set_timesteps(count)
    made = schedule("karras", count, prediction="edm", sigma_min=0.01, sigma_max=50.0)
    assert (made.alphas == 1).all()
    torch.testing.assert_close(made.sigmas.flip(0).float(), scheduler.sigmas[:-1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("count", [2, 7, 50])
def test_karras_spacing_equals_diffusers(kind: str, count: int) -> None:
    """Levels, and the positions between timesteps that have them: the same interpolation."""
    made = schedule(kind, 200)
    alphas_bar = made.alphas.square()
    betas = (1 - alphas_bar / torch.cat([torch.ones(1), alphas_bar[:-1]])).tolist()
    start = min(float(made.levels[-1]), KARRAS_START)  # Theirs is 4,000 for the cosine schedule unless told.
    scheduler = EulerDiscreteScheduler(200, trained_betas=betas, use_karras_sigmas=True, sigma_max=start)
    scheduler.set_timesteps(count)
    steps = made.steps(count, "karras")
    torch.testing.assert_close(torch.tensor(steps.levels).float(), scheduler.sigmas, rtol=2e-4, atol=0)
    torch.testing.assert_close(torch.tensor(steps.timesteps).float(), scheduler.timesteps, rtol=0, atol=0.01)


@pytest.mark.parametrize("timesteps", [50, 1000])
def test_trailing_spacing_equals_diffusers(timesteps: int) -> None:
    scheduler = DDPMScheduler(timesteps, timestep_spacing="trailing")
    for count in (1, 2, 5, 7, 10, 20, 25, 30, 50):
        scheduler.set_timesteps(count)
        assert spaced_timesteps(timesteps, count, "trailing") == scheduler.timesteps.tolist()


# Between timesteps.

ALL = {
    **{kind: schedule(kind, 100) for kind in KINDS},
    "karras": schedule("karras", 100, prediction="edm"),
    "zero terminal": schedule("linear", 100, prediction="v", zero_terminal_snr=True),
    "shifted": schedule("cosine", 100, logsnr_shift=-3.0),
}


@pytest.mark.parametrize("name", ALL)
def test_floats_that_are_timesteps_are_those_timesteps(name: str) -> None:
    made, like = ALL[name], torch.zeros(1, 1, 1, 1)
    last = 99 if name == "zero terminal" else 100
    t = torch.arange(last)
    for whole, between in zip(made.at(t, like), made.at(t.float(), like), strict=True):
        torch.testing.assert_close(between, whole, rtol=2e-7, atol=0)
    if name == "zero terminal":  # No finite level there: it counts as ten times the one before.
        alpha, sigma = made.at(torch.tensor([99.0]), like)
        assert (sigma / alpha).item() == pytest.approx(BEYOND_LAST * made.levels[98].item(), rel=1e-5)
        assert [part.item() for part in made.at(torch.tensor([99]), like)] == [0.0, 1.0]


@pytest.mark.parametrize("name", ALL)
def test_noise_grows_between_timesteps_and_amplitudes_go_together(name: str) -> None:
    made = ALL[name]
    alpha, sigma = made.at(torch.linspace(0, 99, 991), torch.zeros(1, 1))
    assert ((sigma / alpha).diff(dim=0) > 0).all()
    total = alpha**2 + sigma**2 if made.variance_preserving else alpha
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)
    # Half-way between two timesteps lies the geometric mean of their levels.
    alpha, sigma = made.at(torch.tensor([40.5]), torch.zeros(1, 1))
    assert (sigma / alpha).item() == pytest.approx((made.levels[40] * made.levels[41]).sqrt().item(), rel=1e-5)


@given(name=st.sampled_from(list(ALL)), t=st.floats(0, 99, width=32))
def test_position_is_the_inverse_of_at(name: str, t: float) -> None:
    made = ALL[name]
    alpha, sigma = made.at(torch.tensor([t]), torch.zeros(1, 1))
    found = made.position((sigma / alpha).flatten())
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(t, abs=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_positions_beyond_the_ends_are_the_ends(name: str) -> None:
    made = ALL[name]
    beyond = torch.tensor([made.levels[0].item() / 7, made.log_levels[-1].exp().item() * 7])
    assert made.position(beyond).tolist() == [0.0, 99.0]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("spacing", ["uniform", "trailing", "quadratic", "karras"])
@pytest.mark.parametrize("count", [1, 2, 9, 100])
def test_steps_go_down_to_the_image_and_their_amplitudes_are_those_of_their_timesteps(
    name: str, spacing: Any, count: int
) -> None:
    made = ALL[name]
    steps = made.steps(count, spacing)
    assert len(steps) == count
    assert len(steps.levels) == count + 1
    assert all(before > after for before, after in itertools.pairwise(steps.levels))
    if spacing == "karras" and made.variance_preserving and made.levels[-1] > KARRAS_START:
        assert steps.levels[0] == pytest.approx(KARRAS_START)
    else:
        assert steps.timesteps[0] == pytest.approx(99, abs=1e-9)
    assert (steps.alphas[-1], steps.sigmas[-1]) == (1.0, 0.0)
    whole = all(float(value).is_integer() for value in steps.timesteps)
    assert whole or spacing == "karras"
    for index in range(count):
        t = steps.t(index, torch.zeros(3, 1, 2, 2))
        assert t.shape == (3,)
        assert t.dtype == (torch.long if whole else torch.float32)
        alpha, sigma = made.at(t, torch.zeros(1, 1))
        assert alpha[0].item() == pytest.approx(steps.alphas[index].item(), rel=1e-4)
        assert sigma[0].item() == pytest.approx(steps.sigmas[index].item(), rel=1e-4)


def test_karras_spacing_wastes_no_steps_on_lost_images() -> None:
    for made in (schedule("cosine", 1000), schedule("cosine", 1000, prediction="v", zero_terminal_snr=True)):
        assert made.levels[-1] > 20_000
        levels = torch.tensor(made.steps(10, "karras").levels[:-1]).double()
        torch.testing.assert_close(levels.flip(0), karras_levels(10, float(made.levels[0]), KARRAS_START))
    # A schedule that ends in less noise, or has little else, keeps its own ends.
    for made in (schedule("linear", 1000), schedule("linear", 1000, logsnr_shift=-20.0)):
        assert made.steps(10, "karras").timesteps[0] == pytest.approx(999, abs=1e-6)


def test_schedules_know_when_they_are_the_same() -> None:
    assert schedule("cosine", 50).equals(schedule("cosine", 50))
    assert not schedule("cosine", 50).equals(schedule("cosine", 51))
    assert not schedule("cosine", 50).equals(schedule("linear", 50))


def test_forward_process_of_the_karras_schedule_adds_noise_and_keeps_the_image() -> None:
    made = schedule("karras", 10, prediction="edm", sigma_min=0.5, sigma_max=8.0)
    x0, noise = torch.full((2, 1, 1, 1), 0.25), torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    assert made.add_noise(x0, noise, torch.tensor([0, 9])).flatten().tolist() == pytest.approx([0.75, -7.75])
