"""Whole sampling loops: against diffusers' schedulers, against each other, and on data whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from tiny import tiny_config, tiny_network
from torch import Tensor

from diffusion_core.config import SampleConfig
from diffusion_core.diffusion.denoiser import Denoiser, DenoiserFunction, clipped
from diffusion_core.diffusion.sampling_steps import SamplingSteps
from diffusion_core.diffusion.schedule import KARRAS_START, PURE_NOISE_LEVEL, NoiseSchedule, build_schedule
from diffusion_core.registries import SAMPLERS
from diffusion_core.sampling.samplers import (
    build_sampler,
    ddim,
    ddpm,
    dpmpp_2m,
    euler,
    euler_ancestral,
    evaluations,
    heun,
)

T = 50
LINEAR = build_schedule(tiny_config(diffusion__schedule="linear", diffusion__timesteps=T).diffusion)
THEIR_BETAS = {"trained_betas": (1 - LINEAR.alphas**2 / torch.cat([torch.ones(1), LINEAR.alphas[:-1] ** 2])).tolist()}
LABELS = torch.tensor([0, 3, 9, 5])


SEED = 1
Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def tape() -> Iterator[Tensor]:
    """The same noise for us and for them: the start, then one per step."""
    source = torch.Generator().manual_seed(SEED)
    while True:
        yield torch.randn(4, 1, 8, 8, generator=source)


def network() -> Network:
    """A network whose outputs are of the size of noise, like those of a trained one; others would amplify rounding."""
    net = tiny_network(tiny_config(diffusion__timesteps=T))
    return lambda x, t, labels: 0.3 * net(x, t, labels) + 0.7 * x


def two_headed(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """A network that also predicts the variance: from -1 to 1 across its pixels."""
    return torch.cat([network()(x, t, labels), torch.sin(3.0 * x + t.view(-1, 1, 1, 1))], dim=1)


def assert_equal(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < tolerance


def assert_nearly_equal(found: Tensor, expected: Tensor) -> None:
    """To 1e-4, and for values beyond 10 to a hundred-thousandth of the largest: float32 holds seven digits.

    With a step or two this network, which is no denoiser, answers in the hundreds.
    """
    assert_equal(found, expected, 1e-4 * max(1.0, expected.abs().max().item() / 10))


def ours(sampler: Callable[..., Tensor], steps: SamplingSteps, **settings: Any) -> Tensor:
    return ours_with(Denoiser(network(), LINEAR), sampler, steps, **settings)


@torch.no_grad()
def ours_with(
    denoiser: DenoiserFunction,
    sampler: Callable[..., Tensor],
    steps: SamplingSteps,
    clip: bool = False,
    **settings: object,
) -> Tensor:
    noises = tape()
    function = clipped(denoiser) if clip else denoiser
    return sampler(function, next(noises), steps, LABELS, noise=lambda: next(noises), **settings)


@torch.no_grad()
def theirs(scheduler: Any, net: Network | None = None, alpha: float = 1.0, **more: object) -> Tensor:
    """The images of a scheduler whose timesteps are set; schedulers that compute in x / alpha start from there.

    Its random draws, if any, are those of the tape: pass ``generator=True``.
    """
    source, net = torch.Generator().manual_seed(SEED), net or network()
    x = torch.randn(4, 1, 8, 8, generator=source) / alpha
    if more.get("generator"):
        more["generator"] = source
    for t in scheduler.timesteps:
        prediction = net(scheduler.scale_model_input(x, t), t.float().expand(4), LABELS)
        x = scheduler.step(prediction, t, x, **more).prev_sample
    return x


THEIR_PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


@pytest.mark.parametrize("count", [T, 12])
@pytest.mark.parametrize(
    ("variance", "clip", "prediction"),
    [
        ("fixed_small", False, "eps"),
        ("fixed_small", True, "eps"),
        ("fixed_large", False, "eps"),
        ("fixed_large", True, "eps"),
        ("fixed_small", False, "x0"),
        ("fixed_small", False, "v"),
        ("learned", False, "eps"),
    ],
)
def test_ddpm_equals_diffusers(variance: str, clip: bool, prediction: str, count: int) -> None:
    steps, learned = LINEAR.steps(count), variance == "learned"
    scheduler = DDPMScheduler(
        T,
        variance_type="learned_range" if learned else variance,
        clip_sample=clip,
        prediction_type=THEIR_PREDICTION[prediction],
        **THEIR_BETAS,
    )
    scheduler.set_timesteps(timesteps=list(steps.timesteps))
    net = two_headed if learned else network()
    denoiser = Denoiser(net, LINEAR, prediction, learned_variance=learned)
    sampler = build_sampler(SampleConfig.model_validate({"sampler": "ddpm", "variance": variance}), denoiser)
    assert_equal(ours_with(denoiser, sampler, steps, clip), theirs(scheduler, net, generator=True))


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("count", [T, 10])
def test_ddim_equals_diffusers(eta: float, clip: bool, count: int) -> None:
    scheduler = DDIMScheduler(
        T, clip_sample=clip, set_alpha_to_one=True, timestep_spacing="leading", steps_offset=0, **THEIR_BETAS
    )
    scheduler.set_timesteps(count)
    # 45, 40, .. 0: with "leading" spacing, their rule for what follows t (t - T // count) is the next of the list.
    timesteps = scheduler.timesteps.tolist()
    steps = SamplingSteps(
        tuple(timesteps),
        torch.cat([LINEAR.alphas[timesteps], torch.ones(1).double()]),
        torch.cat([LINEAR.sigmas[timesteps], torch.zeros(1).double()]),
    )
    # Ours derives the noise from the clipped image, which diffusers calls use_clipped_model_output.
    expected = theirs(scheduler, eta=eta, use_clipped_model_output=True, generator=True)
    assert_equal(ours_with(Denoiser(network(), LINEAR), ddim, steps, clip, eta=eta), expected)


@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
@pytest.mark.parametrize("count", [T, 9, 1])
def test_ddim_with_eta_1_is_ddpm_with_the_small_variance(spacing: Any, count: int) -> None:
    steps = LINEAR.steps(count, spacing)
    one, other = ours(ddpm, steps, variance="fixed_small"), ours(ddim, steps, eta=1.0)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("fraction", "variance"), [(0.0, "fixed_small"), (1.0, "fixed_large")])
def test_the_learned_variance_lies_between_the_fixed_ones(fraction: float, variance: str) -> None:
    steps = LINEAR.steps(12)
    expected = ours(ddpm, steps, variance=variance)
    everywhere = torch.full((4, 1, 8, 8), fraction)
    found = ours(ddpm, steps, variance="learned", fraction=lambda: everywhere)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    half = ours(ddpm, steps, variance="learned", fraction=lambda: everywhere * 0 + 0.5)
    assert (half - expected).abs().max() > 1e-3


def test_ddim_from_pure_noise_equals_diffusers() -> None:
    """Zero terminal SNR, trailing timesteps and v, the combination of Lin et al. 2023."""
    scheduler = DDIMScheduler(
        T,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        **THEIR_BETAS,
    )
    scheduler.set_timesteps(10)
    changes = {"schedule": "linear", "timesteps": T, "prediction": "v", "zero_terminal_snr": True}
    ending = build_schedule(tiny_config(**{f"diffusion__{key}": value for key, value in changes.items()}).diffusion)
    steps = ending.steps(10, "trailing")
    assert list(steps.timesteps) == scheduler.timesteps.tolist()
    assert_equal(ours_with(Denoiser(network(), ending, "v"), ddim, steps), theirs(scheduler))


# The samplers that diffusers runs in x / alpha ("VE" scale): it starts from x / alpha and scales the network's input.


@pytest.mark.parametrize("count", [T, 12, 1])
@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
def test_euler_equals_diffusers(count: int, spacing: Any) -> None:
    steps = LINEAR.steps(count, spacing)
    scheduler = EulerDiscreteScheduler(T, **THEIR_BETAS)
    scheduler.set_timesteps(timesteps=list(steps.timesteps))
    assert_equal(ours(euler, steps), theirs(scheduler, alpha=float(steps.alphas[0])))


def test_euler_at_karras_levels_equals_diffusers() -> None:
    """Steps between the timesteps: same levels, same positions, same images."""
    steps = LINEAR.steps(9, "karras")
    scheduler = EulerDiscreteScheduler(T, use_karras_sigmas=True, sigma_max=KARRAS_START, **THEIR_BETAS)
    scheduler.set_timesteps(9)
    torch.testing.assert_close(torch.tensor(steps.timesteps).float(), scheduler.timesteps, rtol=0, atol=1e-3)
    # Positions agree to 1e-3, as just shown.
    assert_equal(ours(euler, steps), theirs(scheduler, alpha=float(steps.alphas[0])), 1e-3)


GENTLE = build_schedule(
    tiny_config(diffusion__schedule="linear", diffusion__timesteps=T, diffusion__beta_end=0.015).diffusion
)
"""LINEAR starts from so much noise that Heun's first step is Euler's; this one does not."""


@pytest.mark.parametrize("count", [T, 12, 5, 1])
@pytest.mark.parametrize("clip", [False, True])
def test_heun_equals_diffusers(count: int, clip: bool) -> None:
    """From levels below that at which ours takes an Euler step, which diffusers does not.

    Nor with two steps: from pure noise to a level of 0.04 at once, either amplifies its rounding a thousand times.
    """
    assert 50 < GENTLE.levels[-1] < PURE_NOISE_LEVEL < LINEAR.levels[-1]
    steps = GENTLE.steps(count)
    betas = (1 - GENTLE.alphas**2 / torch.cat([torch.ones(1), GENTLE.alphas[:-1] ** 2])).tolist()
    scheduler = HeunDiscreteScheduler(T, clip_sample=clip, trained_betas=betas)
    scheduler.set_timesteps(timesteps=list(steps.timesteps))
    assert len(scheduler.timesteps) == evaluations(SampleConfig(sampler="heun", steps=count), GENTLE) == 2 * count - 1
    expected = theirs(scheduler, alpha=float(steps.alphas[0]))
    assert_nearly_equal(ours_with(Denoiser(network(), GENTLE), heun, steps, clip), expected)


@pytest.mark.parametrize("spacing", ["uniform", "trailing", "quadratic"])
@torch.no_grad()
def test_heun_takes_an_euler_step_from_lost_images_and_its_own_from_there(spacing: Any) -> None:
    steps, denoiser, start = LINEAR.steps(9, spacing), Denoiser(network(), LINEAR), next(tape())
    kept: list[Tensor] = []
    euler(denoiser, start, steps, LABELS, noise=tape().__next__, callback=lambda i, x, x0: kept.append(x))
    rest = SamplingSteps(steps.timesteps[1:], steps.alphas[1:], steps.sigmas[1:])
    expected = heun(denoiser, kept[1], rest, LABELS, noise=tape().__next__)
    found = heun(denoiser, start, steps, LABELS, noise=tape().__next__)
    assert torch.equal(found, expected)
    assert not torch.equal(found, euler(denoiser, start, steps, LABELS, noise=tape().__next__))


@pytest.mark.parametrize(
    ("count", "spacing", "their_spacing"),
    [(T, "uniform", "linspace"), (8, "uniform", "linspace"), *((n, "trailing", "trailing") for n in (25, 10, 1))],
)
def test_euler_ancestral_equals_diffusers(count: int, spacing: Any, their_spacing: str) -> None:
    """At counts where "linspace" meets whole timesteps: between them diffusers interpolates, and ours rounds."""
    steps = LINEAR.steps(count, spacing)
    scheduler = EulerAncestralDiscreteScheduler(T, timestep_spacing=their_spacing, **THEIR_BETAS)
    scheduler.set_timesteps(count)
    assert scheduler.timesteps.tolist() == list(steps.timesteps)
    expected = theirs(scheduler, alpha=float(steps.alphas[0]), generator=True)
    assert_equal(ours(euler_ancestral, steps), expected)


@pytest.mark.parametrize("count", [T, 20, 9, 2, 1])
@pytest.mark.parametrize("kind", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
def test_dpmpp_2m_equals_diffusers(count: int, kind: str, spacing: Any) -> None:
    steps = LINEAR.steps(count, spacing)
    scheduler = DPMSolverMultistepScheduler(
        T, algorithm_type=kind, solver_order=2, solver_type="midpoint", final_sigmas_type="zero", **THEIR_BETAS
    )
    scheduler.set_timesteps(timesteps=list(steps.timesteps))
    stochastic = kind.startswith("sde")
    assert_nearly_equal(ours(partial(dpmpp_2m, stochastic=stochastic), steps), theirs(scheduler, generator=stochastic))


@pytest.mark.parametrize(("count", "spacing"), [(40, "uniform"), (9, "karras")])
@torch.no_grad()
def test_edm_equals_diffusers(count: int, spacing: Any) -> None:
    """The karras schedule, EDM's preconditioning and Euler steps: one loop of ours, one of EDMEulerScheduler.

    The conventions differ in what the network is told of the noise: a quarter of the level's logarithm there, the
    timestep here, as for every schedule. The network below is told ours on both sides.
    """
    config = tiny_config(diffusion__schedule="karras", diffusion__prediction="edm", diffusion__timesteps=40)
    made = build_schedule(config.diffusion)
    steps = made.steps(count, spacing)
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(count)
    torch.testing.assert_close(torch.tensor(steps.levels).float(), scheduler.sigmas, rtol=1e-5, atol=0)
    start, net = next(tape()) * 80.0, network()
    x = start
    for index, told in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, told)
        x = scheduler.step(net(scaled, steps.t(index, x), LABELS), told, x).prev_sample
    found = euler(Denoiser(network(), made, "edm"), start, steps, LABELS, noise=lambda: torch.empty(0))
    assert_equal(found, x)


# Against each other.


@pytest.mark.parametrize("spacing", ["uniform", "trailing", "quadratic", "karras"])
@pytest.mark.parametrize("count", [T, 9, 1])
def test_ddim_without_noise_is_euler(spacing: Any, count: int) -> None:
    steps = LINEAR.steps(count, spacing)
    torch.testing.assert_close(ours(ddim, steps, eta=0.0), ours(euler, steps), rtol=1e-4, atol=1e-4)


ANY_SAMPLER: dict[str, Callable[..., Tensor]] = {
    "ddpm": partial(ddpm, variance="fixed_small"),
    "ddpm large": partial(ddpm, variance="fixed_large"),
    "ddim": ddim,
    "ddim stochastic": partial(ddim, eta=1.0),
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": partial(dpmpp_2m, stochastic=True),
}


@pytest.mark.parametrize("name", ANY_SAMPLER)
def test_a_start_from_pure_noise_is_the_limit_of_starts_from_nearly_pure_noise(name: str) -> None:
    """Where the last timestep has no signal the level is infinite; no sampler may stumble over it."""

    def steps(first_alpha: float) -> SamplingSteps:
        alphas = torch.tensor([first_alpha, 0.2, 0.5, 0.7, 0.9, 1.0], dtype=torch.float64)
        return SamplingSteps((49, 40, 30, 20, 10), alphas, (1 - alphas**2).sqrt())

    def denoise(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return torch.tanh(x) * (1 + t.view(-1, 1, 1, 1) / 50) if t[0] < 45 else torch.zeros_like(x)

    noisy = [ours_with(denoise, ANY_SAMPLER[name], steps(alpha)) for alpha in (0.0, 1e-300)]
    assert torch.isfinite(noisy[0]).all()
    # The multistep samplers come near as the logarithm of the level grows, which is 690 here.
    assert (noisy[0] - noisy[1]).abs().max() < (2e-3 if "dpmpp" in name else 1e-5)


@pytest.mark.parametrize("name", ANY_SAMPLER)
def test_samplers_do_not_care_for_the_scale_of_the_schedule(name: str) -> None:
    """The same levels, once variance preserving and once exploding: the same images (Karras et al. 2022, section 2)."""
    steps = LINEAR.steps(9)
    exploding = SamplingSteps(steps.timesteps, torch.ones(10).double(), steps.sigmas / steps.alphas)

    def denoise(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """Sees x / alpha."""
        return torch.tanh(x) * (1 + t.view(-1, 1, 1, 1) / 50)

    def scaled(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        alpha, _ = LINEAR.at(t, x)
        return denoise(x / alpha, t, labels)

    sampler = ANY_SAMPLER[name]
    if name == "ddpm large":
        pytest.skip("beta is the variance of a step of the preserving process, and depends on the scale")
    noises = [tape(), tape()]
    starts = [next(noises[0]), next(noises[1]) / steps.alphas[0].float()]
    one = sampler(scaled, starts[0], steps, None, noise=noises[0].__next__)
    other = sampler(denoise, starts[1], exploding, None, noise=noises[1].__next__)
    assert (one - other).abs().max() < 1e-4


MEAN, DEVIATION = 0.4, 0.3


def gaussian_denoiser(schedule: NoiseSchedule) -> DenoiserFunction:
    """The best denoiser for data drawn from N(MEAN, DEVIATION^2): its posterior mean, in closed form."""

    def denoise(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        alpha, sigma = schedule.at(t, x)
        gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
        return MEAN + gain * (x - alpha * MEAN)

    return denoise


def test_ddim_without_noise_follows_the_probability_flow_of_gaussian_data() -> None:
    """For Gaussian data, the ODE keeps an image's place in the distribution: what starts z deviations off ends so."""
    schedule = build_schedule(tiny_config(diffusion__schedule="cosine", diffusion__timesteps=1000).diffusion)
    z = torch.linspace(-2, 2, 9).view(9, 1, 1, 1)
    alpha, sigma = schedule.alphas[-1].item(), schedule.sigmas[-1].item()
    start = alpha * MEAN + math.sqrt(alpha**2 * DEVIATION**2 + sigma**2) * z
    found = ddim(gaussian_denoiser(schedule), start, schedule.steps(1000), None, noise=lambda: torch.empty(0))
    assert (found - (MEAN + DEVIATION * z)).abs().max() < 0.01


def test_heun_calls_back_once_a_step_though_it_asks_twice() -> None:
    steps = LINEAR.steps(7)
    seen: list[tuple[int, Tensor, Tensor]] = []
    start = next(tape())
    result = heun(lambda x, t, labels: 0.5 * x, start, steps, LABELS, noise=tape().__next__,
                  callback=lambda *call: seen.append(call))  # fmt: skip
    assert [index for index, _, _ in seen] == list(range(7))
    assert torch.equal(seen[0][1], start)
    assert all(torch.equal(x0, 0.5 * x) for _, x, x0 in seen)
    assert torch.equal(result, seen[-1][2])


@pytest.mark.parametrize(
    ("sampler", "draws"),
    [(ddpm, 6), (ddim, 0), (euler, 0), (euler_ancestral, 6), (dpmpp_2m, 0), (partial(dpmpp_2m, stochastic=True), 6)],
)
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
    found = ours(build_sampler(SampleConfig(sampler="ddpm", variance="fixed_large")), steps)
    assert torch.equal(found, ours(ddpm, steps, variance="fixed_large"))
    assert not torch.equal(found, ours(ddpm, steps, variance="fixed_small"))
    found = ours(build_sampler(SampleConfig(sampler="ddim", eta=0.7)), steps)
    assert torch.equal(found, ours(ddim, steps, eta=0.7))
    assert not torch.equal(found, ours(ddim, steps, eta=0.0))


@pytest.mark.parametrize("schedule", [GENTLE, LINEAR], ids=["gentle", "from lost images"])
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_evaluations_are_counted_right(name: str, schedule: NoiseSchedule) -> None:
    config = SampleConfig(sampler=name, steps=7)
    calls: list[int] = []

    def denoiser(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        calls.append(int(t[0]))
        return 0.5 * x

    build_sampler(config)(denoiser, next(tape()), schedule.steps(7), None, noise=tape().__next__)
    assert len(calls) == evaluations(config, schedule)


def test_heun_looks_ahead_at_the_next_timestep() -> None:
    asked: list[int] = []

    def denoiser(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        asked.append(int(t[0]))
        return 0.5 * x

    heun(denoiser, next(tape()), GENTLE.steps(3), None, noise=tape().__next__)
    assert asked == [49, 24, 24, 0, 0]
    asked.clear()
    heun(denoiser, next(tape()), LINEAR.steps(3), None, noise=tape().__next__)
    assert asked == [49, 24, 0, 0]  # The first step is Euler's.
