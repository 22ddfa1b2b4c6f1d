"""The objectives of step distillation and the consistency sampler, against the papers' formulas in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, pseudo_huber
from tiny import TINY, tiny_batches, tiny_network
from torch import Tensor

from diffusion_core.config import FORMULATIONS, ConfigError, CoreConfig, StepsConfig, build
from diffusion_core.diffusion.denoiser import Denoiser
from diffusion_core.diffusion.draws import Draws
from diffusion_core.diffusion.sampling_steps import Spacing
from diffusion_core.diffusion.schedule import NoiseSchedule, build_schedule
from diffusion_core.model.unet import NO_LABEL, UNet
from diffusion_core.sampling.samplers import build_sampler, steps_of
from diffusion_core.step_distillation.consistency import ConsistencyDistillation, ConsistencyTuning, lower_level
from diffusion_core.step_distillation.methods import halved
from diffusion_core.step_distillation.progressive import ProgressiveDistillation
from diffusion_core.step_distillation.teaching import CLEAN, Lesson, distance, follow

Array = np.ndarray
KNOWN = ("eps", "v", "x0", "EDM", "zero terminal SNR")
"""Formulations whose clean image this file computes itself."""


def config_of(name: str, **knobs: Any) -> CoreConfig:
    return build(CoreConfig, TINY, {"sample.clip_x0": False, "train.label_dropout": 0.2}, FORMULATIONS[name], knobs)


def lesson(
    config: CoreConfig, steps: StepsConfig, count: int = 2, guidance: float = 1.0, teacher: Any = None
) -> Lesson:
    return Lesson(config, steps, 0, 80, count, guidance, None, teacher)


def amplitudes(schedule: NoiseSchedule, t: Array) -> tuple[Array, Array]:
    """alpha and sigma at timesteps between which the logarithm of the level is linear; 1 and 0 below timestep 0."""
    levels = np.log(schedule.levels.numpy().clip(max=np.exp(schedule.log_levels[-1].item())))
    level = np.exp(np.interp(t, np.arange(len(levels)), levels))
    alpha = 1.0 / np.sqrt(1.0 + level**2) if schedule.variance_preserving else np.ones_like(level)
    alpha, sigma = np.where(t < 0, 1.0, alpha), np.where(t < 0, 0.0, level * alpha)
    return alpha.reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1)


def clean_image(network: UNet, config: CoreConfig, schedule: NoiseSchedule) -> Callable[[Array, Array, Tensor], Array]:
    """The network's clean images, from its output and the definitions of the parametrisations."""

    def clean(x: Array, t: Array, labels: Tensor) -> Array:
        alpha, sigma = amplitudes(schedule, t)
        edm = config.diffusion.prediction == "edm"
        level = sigma / alpha
        inputs = x / alpha / np.sqrt(level**2 + 0.25) if edm else x
        with torch.no_grad():
            answer = network(torch.tensor(inputs).float(), torch.tensor(t).float(), labels).double().numpy()
        return {
            "eps": lambda: (x - sigma * answer) / alpha,
            "x0": lambda: answer,
            "v": lambda: alpha * x - sigma * answer,
            "edm": lambda: 0.25 / (level**2 + 0.25) * x / alpha + level * 0.5 / np.sqrt(level**2 + 0.25) * answer,
        }[config.diffusion.prediction]()

    return clean


def drawn(objective: Any, config: CoreConfig, step: int = 3) -> tuple[Draws, dict[str, Array]]:
    draws = objective.draw(step, tiny_batches(config), build_schedule(config.diffusion))
    names = {"x0": draws.x0_BCHW, "noise": draws.noise_BCHW, "t": draws.t_B, "later": draws.later_BS}
    return draws, {name: tensor.double().numpy() for name, tensor in names.items() if tensor is not None}


@given(level=st.floats(1e-4, 1e5), doubling=st.integers(1, 20))
def test_the_lower_level_is_that_of_the_paper(level: float, doubling: int) -> None:
    expected = max(0.0, level * (1.0 - (1.0 + 8.0 * expit(-level)) / 2.0**doubling))
    assert lower_level(torch.tensor([level]).double(), doubling).item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_the_levels_come_closer_in_equal_stages() -> None:
    config = config_of("v")
    objective = ConsistencyTuning(lesson(config, StepsConfig(method="consistency", doublings=4)))
    assert [objective.doubling(step) for step in (0, 19, 20, 79, 80)] == [1, 1, 2, 4, 4]


@pytest.mark.parametrize("step", [0, 79])
def test_pairs_are_in_order_and_at_least_a_timestep_apart(step: int) -> None:
    config = config_of("v", **{"train.batch_size": 64})
    objective = ConsistencyTuning(lesson(config, StepsConfig(method="consistency", doublings=20)))
    _, arrays = drawn(objective, config, step)
    later, t = arrays["later"][:, 0], arrays["t"]
    assert ((later == CLEAN) | (later >= 0)).all()
    assert (t - later >= 1.0 - 1e-6).all()
    if step:  # The last stage: the timestep before.
        assert np.array_equal(later, np.maximum(t - 1.0, CLEAN))


@pytest.mark.parametrize("weighting", ["auto", "uniform", "difference", "truncated_snr"])
@pytest.mark.parametrize("loss", ["l2", "pseudo_huber"])
def test_distances_and_weights(loss: str, weighting: str) -> None:
    check_consistency("v", StepsConfig(method="consistency", loss=loss, weighting=weighting, huber_c=0.1))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", KNOWN)
def test_the_consistency_loss_is_that_of_the_paper(name: str) -> None:
    check_consistency(name, StepsConfig(method="consistency", loss="l2", weighting="difference"))


def check_consistency(name: str, steps: StepsConfig) -> None:
    config = config_of(name)
    schedule, network = build_schedule(config.diffusion), tiny_network(config)
    objective = ConsistencyTuning(lesson(config, steps))
    draws, of = drawn(objective, config, 40)
    ours = objective.loss(Denoiser.from_config(network, config.diffusion, config.model, torch.device("cpu")), draws)
    clean, later = clean_image(network, config, schedule), of["later"][:, 0]
    alpha, sigma = amplitudes(schedule, of["t"])
    alpha_later, sigma_later = amplitudes(schedule, later)
    student = clean(alpha * of["x0"] + sigma * of["noise"], of["t"], draws.labels_B)
    target = clean(alpha_later * of["x0"] + sigma_later * of["noise"], np.maximum(later, 0.0), draws.labels_B)
    target = np.where(later.reshape(-1, 1, 1, 1) < 0, of["x0"], target)
    norm = np.sqrt(((student - target) ** 2).sum(axis=(1, 2, 3)))
    expected = norm**2 / 64 if steps.loss == "l2" else pseudo_huber(0.1, norm) / 0.1
    level, level_later = (sigma / alpha).ravel(), (sigma_later / alpha_later).ravel()
    weight = {
        "auto": np.ones(8),
        "uniform": np.ones(8),
        "difference": 1.0 / (level - level_later),
        "truncated_snr": np.maximum(level**-2, 1.0),
    }
    expected = expected * weight[steps.weighting]
    assert ours.detach().numpy() == pytest.approx(expected, rel=2e-3, abs=1e-6)


def test_a_pseudo_huber_distance_is_per_image() -> None:
    """A large error in one pixel and a small one in all others count together, not pixel by pixel."""
    one, other = torch.zeros(2, 1, 8, 8), torch.full((2, 1, 8, 8), 0.1)
    other[:, 0, 0, 0] = 2.0
    norm = math.sqrt(63 * 0.01 + 4.0)
    c = 0.00054 * 8.0
    found = distance(one, other, StepsConfig(loss="pseudo_huber"))
    assert found.tolist() == pytest.approx([pseudo_huber(c, norm) / c] * 2, rel=1e-5)
    assert distance(one, other, StepsConfig(loss="pseudo_huber", huber_c=0.0)).tolist() == pytest.approx([norm] * 2)


@pytest.mark.parametrize("c", [None, 0.0])
def test_equal_images_have_no_distance_and_a_finite_gradient(c: float | None) -> None:
    ours = torch.ones(1, 1, 8, 8, requires_grad=True)
    found = distance(ours, torch.ones(1, 1, 8, 8), StepsConfig(loss="pseudo_huber", huber_c=c))
    found.sum().backward()
    assert found.item() == pytest.approx(0.0, abs=1e-15)
    assert ours.grad is not None
    assert torch.isfinite(ours.grad).all()


@pytest.mark.parametrize("name", KNOWN)
def test_a_student_that_is_its_own_teacher_loses_nothing(name: str) -> None:
    """At equal noise levels, the student's answer is its target."""
    config = config_of(name)
    objective = ConsistencyTuning(lesson(config, StepsConfig(method="consistency", weighting="uniform")))
    draws, _ = drawn(objective, config)
    same = Draws(draws.x0_BCHW, draws.noise_BCHW, draws.t_B, draws.labels_B, None, draws.t_B[:, None])
    denoiser = Denoiser.from_config(tiny_network(config), config.diffusion, config.model, torch.device("cpu"))
    scale = denoiser(draws.noise_BCHW, draws.t_B, draws.labels_B).abs().max().item()
    assert objective.loss(denoiser, same).max().item() < 1e-3 * max(1.0, scale)


def test_guidance_moves_the_image_by_what_it_adds_to_the_teacher() -> None:
    config = config_of("v")
    schedule, network = build_schedule(config.diffusion), tiny_network(config)
    teacher = tiny_network(config, seed=1)
    steps = StepsConfig(method="consistency", loss="l2", weighting="uniform")
    objective = ConsistencyTuning(lesson(config, steps, guidance=3.0, teacher=teacher))
    draws, of = drawn(objective, config, 40)
    ours = objective.loss(Denoiser.from_config(network, config.diffusion, config.model, torch.device("cpu")), draws)
    clean, taught = clean_image(network, config, schedule), clean_image(teacher, config, schedule)
    later, labels = of["later"][:, 0], draws.labels_B
    alpha, sigma = amplitudes(schedule, of["t"])
    alpha_later, sigma_later = amplitudes(schedule, later)
    x = alpha * of["x0"] + sigma * of["noise"]
    without = taught(x, of["t"], torch.full_like(labels, NO_LABEL))
    image = of["x0"] + 2.0 * (taught(x, of["t"], labels) - without)
    noise = (x - alpha * image) / sigma
    target = clean(alpha_later * image + sigma_later * noise, np.maximum(later, 0.0), labels)
    target = np.where(later.reshape(-1, 1, 1, 1) < 0, image, target)
    expected = ((clean(x, of["t"], labels) - target) ** 2).mean(axis=(1, 2, 3))
    assert (labels != NO_LABEL).any()
    assert ours.detach().numpy() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("name", KNOWN)
def test_the_loss_of_consistency_distillation_is_that_of_the_paper(name: str, guidance: float) -> None:
    """Song et al. 2023, algorithm 2: the pair is on the teacher's path, which a step like Heun's follows."""
    config = config_of(name)
    schedule, network, teacher = build_schedule(config.diffusion), tiny_network(config), tiny_network(config, seed=1)
    steps = StepsConfig(method="consistency_distillation", loss="l2", weighting="uniform", doublings=3)
    objective = ConsistencyDistillation(lesson(config, steps, guidance=guidance, teacher=teacher))
    draws, of = drawn(objective, config, 0)
    denoiser = Denoiser.from_config(network, config.diffusion, config.model, torch.device("cpu"))
    ours = objective.loss(denoiser, draws).detach().numpy()
    clean, plain = clean_image(network, config, schedule), clean_image(teacher, config, schedule)
    later, labels = of["later"][:, 0], draws.labels_B
    (alpha, sigma), (alpha_later, sigma_later) = amplitudes(schedule, of["t"]), amplitudes(schedule, later)
    level, level_later = (sigma / alpha).ravel(), (sigma_later / alpha_later).ravel()
    nearest = level * np.maximum(0.0, 1.0 - (1.0 + 8.0 * expit(-level)) / 8.0)
    assert (level_later <= nearest * (1.0 + 1e-4)).all(), "from the first step on as near as at the end"
    x = alpha * of["x0"] + sigma * of["noise"]

    def taught(x: Array, t: Array) -> Array:
        without = plain(x, t, torch.full_like(labels, NO_LABEL))
        return without + guidance * (plain(x, t, labels) - without)

    first = taught(x, of["t"])
    there = alpha_later * first + sigma_later * (x - alpha * first) / sigma
    second = taught(there, np.maximum(later, 0.0))
    image = np.where(later.reshape(-1, 1, 1, 1) < 0, first, (first + second) / 2.0)
    x_later = alpha_later * image + sigma_later * (x - alpha * image) / sigma
    target = clean(x_later, np.maximum(later, 0.0), labels)
    target = np.where(later.reshape(-1, 1, 1, 1) < 0, image, target)
    expected = ((clean(x, of["t"], labels) - target) ** 2).mean(axis=(1, 2, 3))
    assert ours == pytest.approx(expected, rel=3e-3, abs=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("name", KNOWN)
def test_the_progressive_loss_is_that_of_the_paper(name: str, guidance: float) -> None:
    """Salimans & Ho 2022, algorithm 2, with their truncated SNR weighting."""
    config = config_of(name)
    schedule, network, teacher = build_schedule(config.diffusion), tiny_network(config), tiny_network(config, seed=1)
    steps = StepsConfig(method="progressive", loss="l2")
    objective = ProgressiveDistillation(lesson(config, steps, 4, guidance, teacher))
    draws, of = drawn(objective, config)
    denoiser = Denoiser.from_config(network, config.diffusion, config.model, torch.device("cpu"))
    ours = objective.loss(denoiser, draws).detach().numpy()
    clean, plain, labels = (
        clean_image(network, config, schedule),
        clean_image(teacher, config, schedule),
        draws.labels_B,
    )

    def taught(x: Array, t: Array) -> Array:
        without = plain(x, t, torch.full_like(labels, NO_LABEL))
        return without + guidance * (plain(x, t, labels) - without)

    (alpha, sigma), middle, end = amplitudes(schedule, of["t"]), of["later"][:, 0], of["later"][:, 1]
    (alpha1, sigma1), (alpha2, sigma2) = amplitudes(schedule, middle), amplitudes(schedule, end)
    z = alpha * of["x0"] + sigma * of["noise"]
    x = taught(z, of["t"])
    z1 = alpha1 * x + sigma1 / sigma * (z - alpha * x)
    x1 = taught(z1, middle)
    z2 = alpha2 * x1 + sigma2 / sigma1 * (z1 - alpha1 * x1)
    target = (z2 - sigma2 / sigma * z) / (alpha2 - sigma2 / sigma * alpha)
    weight = np.maximum((alpha / sigma).ravel() ** 2, 1.0)
    expected = weight * ((target - clean(z, of["t"], labels)) ** 2).mean(axis=(1, 2, 3))
    assert ours == pytest.approx(expected, rel=5e-3, abs=1e-6)


def test_one_step_with_the_progressive_target_is_two_steps_of_the_teacher() -> None:
    config = config_of("v")
    network = tiny_network(config)
    denoiser = Denoiser.from_config(network, config.diffusion, config.model, torch.device("cpu"))
    objective = ProgressiveDistillation(lesson(config, StepsConfig(method="progressive"), 4, teacher=network))
    draws, _ = drawn(objective, config)
    assert draws.later_BS is not None
    t, middle, end = draws.t_B, draws.later_BS[:, 0], draws.later_BS[:, 1]
    x, schedule = draws.noise_BCHW, denoiser.schedule
    with torch.no_grad():
        target = objective.target(denoiser, x, t, middle, end, draws.labels_B)
        halfway = follow(schedule, x, denoiser(x, t, draws.labels_B), t, middle)
        there = follow(schedule, halfway, denoiser(halfway, middle, draws.labels_B), middle, end)
    assert torch.allclose(follow(schedule, x, target, t, end), there, atol=1e-4)


@settings(deadline=None)
@given(target=st.integers(1, 8), count=st.integers(1, 6), step=st.integers(0, 50))
def test_stages_visit_the_timesteps_that_the_student_is_sampled_at(target: int, count: int, step: int) -> None:
    counts = halved(target * 2**count, target)
    assert (counts[0], counts[-1], len(counts)) == (target * 2 ** (count - 1), target, count)
    config = build(CoreConfig, TINY, {"diffusion.timesteps": 600})
    schedule = build_schedule(config.diffusion)
    objective = ProgressiveDistillation(lesson(config, StepsConfig(method="progressive"), target, teacher=object()))
    draws = objective.draw(step, tiny_batches(config), schedule)
    visited = [*map(float, schedule.steps(target, "trailing").timesteps), CLEAN]
    assert draws.later_BS is not None
    for t, (middle, end) in zip(draws.t_B.tolist(), draws.later_BS.tolist(), strict=True):
        assert end == visited[visited.index(t) + 1]
        assert end < middle < t


@pytest.mark.parametrize(("start", "target"), [(12, 2), (2, 2), (1, 2), (4, 3), (7, 1), (1, 1)])
def test_steps_that_do_not_halve_are_refused(start: int, target: int) -> None:
    with pytest.raises(ValueError, match=rf"steps.start = {start}: does not halve to steps.target = {target}"):
        halved(start, target)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", ["v", "EDM"])
def test_the_consistency_sampler_is_that_of_the_paper(name: str, count: int) -> None:
    """Song et al. 2023, algorithm 1, in the scaling of the schedule."""
    sampling = {"sample.sampler": "consistency", "sample.steps": count, "sample.spacing": "trailing"}
    config = config_of(name, **sampling)
    schedule, network = build_schedule(config.diffusion), tiny_network(config)
    denoiser = Denoiser.from_config(network, config.diffusion, config.model, torch.device("cpu"))
    source = torch.Generator().manual_seed(0)
    noises = [torch.randn(2, 1, 8, 8, generator=source) for _ in range(count)]
    labels, rest = torch.tensor([1, 7]), iter(noises[1:])
    steps = steps_of(config.sample, schedule)
    with torch.no_grad():
        found = build_sampler(config.sample)(denoiser, noises[0], steps, labels, noise=lambda: next(rest))
    assert next(rest, None) is None
    clean = clean_image(network, config, schedule)
    timesteps = [len(schedule.levels) * left / count - 1 for left in range(count, 0, -1)]
    x = image = noises[0].double().numpy()
    for index, at in enumerate(timesteps):
        alpha, sigma = amplitudes(schedule, np.full(2, np.round(at + 1) - 1.0))
        if index:
            x = alpha * image + sigma * noises[index].double().numpy()
        image = clean(x, np.full(2, np.round(at + 1) - 1.0), labels)
    assert found.numpy() == pytest.approx(image, rel=1e-3, abs=1e-3)


def test_a_start_level_leaves_the_noisier_timesteps_out() -> None:
    config = config_of("eps", **{"sample.start_level": 5.0})
    schedule = build_schedule(config.diffusion)
    for spacing in get_args(Spacing):
        visited = schedule.steps(4, spacing, 5.0)
        assert visited.levels[0] <= 5.0 + 1e-9
        assert visited.levels[0] == pytest.approx(max(level for level in schedule.levels.tolist() if level <= 5.0))
    steps = StepsConfig(method="consistency")
    objective = ConsistencyTuning(Lesson(config, steps, 0, 80, 2, 1.0, 5.0))
    t = torch.cat([objective.draw(step, tiny_batches(config), schedule).t_B for step in range(40)])
    assert schedule.level(t).max() <= 5.0
    assert len(t.unique()) > 0.8 * schedule.timesteps_to(5.0)
    with pytest.raises(ConfigError, match=r"the timesteps up to sample\.start_level"):
        schedule.steps(schedule.timesteps_to(5.0) + 1, "trailing", 5.0)
