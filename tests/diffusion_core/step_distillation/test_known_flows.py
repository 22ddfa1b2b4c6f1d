"""Step distillation where the flow is known: on a Gaussian and on a mixture, the student meets the exact endpoints.

Images have one pixel. In one dimension a flow keeps the order of points, so it maps quantiles to quantiles: the exact
endpoint of the mixture's flow is where both distribution functions agree (scipy).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm
from tiny import TINY
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from diffusion_core.config import CoreConfig, StepsConfig, build
from diffusion_core.diffusion.denoiser import Denoiser
from diffusion_core.diffusion.objective import Objective
from diffusion_core.diffusion.schedule import NoiseSchedule, build_schedule
from diffusion_core.randomness import Purpose, Streams, streams
from diffusion_core.sampling.samplers import build_sampler, steps_of
from diffusion_core.step_distillation.consistency import ConsistencyDistillation, ConsistencyTuning
from diffusion_core.step_distillation.methods import halved
from diffusion_core.step_distillation.progressive import ProgressiveDistillation
from diffusion_core.step_distillation.teaching import Lesson

SHARES = np.array([0.3, 0.7])
CENTRES = np.array([-0.5, 0.4])
DEVIATIONS = np.array([0.2, 0.3])
MEAN, DEVIATION = 0.3, 0.4
T = 64
STARTS = np.linspace(-2.0, 2.0, 41)


@dataclass
class Source:
    """Batches of images that are drawn, not read."""

    sample: Callable[[np.random.Generator, int], np.ndarray]
    batch_size: int = 1024
    share: slice = field(default_factory=lambda: slice(None))

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        drawn = self.sample(np.random.default_rng(step), self.batch_size)
        return torch.tensor(drawn, dtype=torch.float32).view(-1, 1, 1, 1), torch.zeros(self.batch_size).long()

    def stream(self, purpose: Purpose, step: int) -> Streams:
        return streams(2, [(0, purpose, step)])


def gaussian(source: np.random.Generator, count: int) -> np.ndarray:
    return MEAN + DEVIATION * source.standard_normal(count)


def mixture(source: np.random.Generator, count: int) -> np.ndarray:
    which = (source.random(count) < SHARES[1]).astype(int)
    return CENTRES[which] + DEVIATIONS[which] * source.standard_normal(count)


def settings(**knobs: Any) -> CoreConfig:
    fixed = {
        "diffusion.prediction": "x0",
        "diffusion.schedule": "cosine",
        "diffusion.timesteps": T,
        "sample.clip_x0": False,
        "train.label_dropout": 0.0,
    }
    return build(CoreConfig, TINY, fixed, knobs)


class Affine(nn.Module):
    """``a(t) x + b(t)`` with a value at each timestep, linear between them: the optimal denoiser of a Gaussian."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        alpha, sigma = schedule.alphas, schedule.sigmas
        slope = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
        self.slope = nn.Parameter(slope.float())
        self.offset = nn.Parameter((MEAN * (1.0 - slope * alpha)).float())

    def forward(self, x: Tensor, t: Tensor, _labels: Tensor | None) -> Tensor:
        below = t.float().floor().long()
        above = (below + 1).clamp(max=len(self.slope) - 1)
        share = t.float() - below
        slope, offset = (torch.lerp(table[below], table[above], share) for table in (self.slope, self.offset))
        return slope[:, None, None, None] * x + offset[:, None, None, None]


class Optimal(nn.Module):
    """The optimal denoiser of the mixture: posterior means of the components, by their posterior shares."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, x: Tensor, t: Tensor, _labels: Tensor | None) -> Tensor:
        alpha, sigma = self.schedule.at(t, x)
        means, logs = [], []
        for share, centre, deviation in zip(SHARES, CENTRES, DEVIATIONS, strict=True):
            variance = alpha**2 * float(deviation) ** 2 + sigma**2
            gap = x - alpha * float(centre)
            means.append(float(centre) + alpha * float(deviation) ** 2 / variance * gap)
            logs.append(float(np.log(share)) - 0.5 * (gap**2 / variance + variance.log()))
        return (torch.stack(logs).softmax(dim=0) * torch.stack(means)).sum(dim=0)


class Corrected(nn.Module):
    """The optimal denoiser and a small network that corrects it, which starts at zero."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.optimal, self.schedule = Optimal(schedule), schedule
        end = nn.Linear(64, 1)
        nn.init.zeros_(end.weight)
        nn.init.zeros_(end.bias)
        self.net = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), end)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        clean = self.optimal(x, t, labels)
        at = (t.float() / T).view(-1, 1)
        inputs = torch.cat([x.flatten(1), clean.flatten(1), at, at.square()], dim=1)
        # As in EDM's preconditioning: what has no noise is not corrected.
        alpha, sigma = self.schedule.at(t, x)
        level = sigma / alpha
        return clean + level * (level.square() + 0.25).rsqrt() * self.net(inputs).view(-1, 1, 1, 1)


def train(
    network: nn.Module, objective: Objective, source: Any, steps: range, schedule: NoiseSchedule, lr: float
) -> None:
    """Train with a falling learning rate. The network becomes the average of its last quarter of steps."""
    denoiser = Denoiser(network, schedule, "x0")
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    average = AveragedModel(network)
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = lr * (1.0 - (step - steps.start) / len(steps))
        objective.loss(denoiser, objective.draw(step, source, schedule)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= steps.stop - len(steps) // 4:
            average.update_parameters(network)
    network.load_state_dict(average.module.state_dict())


@torch.no_grad()
def endpoints(network: nn.Module, schedule: NoiseSchedule, config: CoreConfig) -> np.ndarray:
    """Where the sampler leads from ``STARTS``."""
    start = torch.tensor(STARTS, dtype=torch.float32).view(-1, 1, 1, 1)
    steps = steps_of(config.sample, schedule)
    sampler = build_sampler(config.sample)
    return (
        sampler(Denoiser(network, schedule, "x0"), start, steps, None, noise=lambda: torch.randn(start.shape))
        .flatten()
        .numpy()
    )


def mixture_flow(schedule: NoiseSchedule) -> np.ndarray:
    """The exact endpoints of the mixture's flow from ``STARTS`` at the last timestep."""
    alpha, sigma = float(schedule.alphas[-1]), float(schedule.sigmas[-1])

    def share_below(x: float, alpha: float, sigma: float) -> float:
        spread = np.sqrt(alpha**2 * DEVIATIONS**2 + sigma**2)
        return float((SHARES * norm.cdf((x - alpha * CENTRES) / spread)).sum())

    def endpoint(start: float) -> float:
        share = share_below(start, alpha, sigma)
        return float(brentq(lambda x: share_below(x, 1.0, 0.0) - share, -5.0, 5.0))

    return np.array([endpoint(start) for start in STARTS])


def gaussian_flow(schedule: NoiseSchedule) -> np.ndarray:
    alpha, sigma = float(schedule.alphas[-1]), float(schedule.sigmas[-1])
    return MEAN + DEVIATION * (STARTS - alpha * MEAN) / np.sqrt(alpha**2 * DEVIATION**2 + sigma**2)


ONE_STEP = {"sample.sampler": "consistency", "sample.steps": 1, "sample.spacing": "trailing"}


def lesson(config: CoreConfig, steps: StepsConfig, end: int, count: int, teacher: Any = None, start: int = 0) -> Lesson:
    return Lesson(config, steps, start, end, count, 1.0, None, teacher)


@pytest.mark.slow
def test_consistency_tuning_on_a_gaussian_meets_the_flow() -> None:
    config = settings(**ONE_STEP)
    schedule = build_schedule(config.diffusion)
    network = Affine(schedule)
    exact = gaussian_flow(schedule)
    before = np.abs(endpoints(network, schedule, config) - exact).mean()
    steps = StepsConfig(method="consistency", loss="l2", weighting="uniform", doublings=8)
    train(network, ConsistencyTuning(lesson(config, steps, 1200, 1)), Source(gaussian), range(1200), schedule, 1e-2)
    after = np.abs(endpoints(network, schedule, config) - exact).mean()
    assert before > 0.3  # One step of the untuned denoiser leads to the mean.
    assert after < 0.05  # Four seeds: 0.026 to 0.041.


@pytest.mark.slow
def test_consistency_tuning_on_a_mixture_meets_the_flow() -> None:
    config = settings(**ONE_STEP)
    schedule = build_schedule(config.diffusion)
    network = Corrected(schedule)
    exact = mixture_flow(schedule)
    before = np.abs(endpoints(network, schedule, config) - exact).mean()
    steps = StepsConfig(method="consistency", loss="l2", weighting="uniform", doublings=6)
    train(network, ConsistencyTuning(lesson(config, steps, 1200, 1)), Source(mixture), range(1200), schedule, 3e-3)
    after = np.abs(endpoints(network, schedule, config) - exact).mean()
    assert before > 0.3
    assert after < 0.06


@pytest.mark.slow
def test_consistency_distillation_on_a_mixture_meets_the_flow() -> None:
    config = settings(**ONE_STEP)
    schedule = build_schedule(config.diffusion)
    network = Corrected(schedule)
    exact = mixture_flow(schedule)
    before = np.abs(endpoints(network, schedule, config) - exact).mean()
    steps = StepsConfig(method="consistency_distillation", loss="l2", weighting="uniform", doublings=4)
    taught = lesson(config, steps, 800, 1, copy.deepcopy(network))
    train(network, ConsistencyDistillation(taught), Source(mixture), range(800), schedule, 3e-3)
    after = np.abs(endpoints(network, schedule, config) - exact).mean()
    assert before > 0.3
    assert after < 0.06


@pytest.mark.slow
def test_progressive_distillation_on_a_mixture_meets_the_flow() -> None:
    config = settings(**(ONE_STEP | {"sample.sampler": "ddim"}))
    schedule = build_schedule(config.diffusion)
    network: nn.Module = Corrected(schedule)
    exact = mixture_flow(schedule)
    before = np.abs(endpoints(network, schedule, config) - exact).mean()
    steps = StepsConfig(method="progressive", start=32, target=1)
    for index, count in enumerate(halved(32, 1)):
        span = range(400 * index, 400 * (index + 1))
        teacher = copy.deepcopy(network)
        stage = lesson(config, steps, span.stop, count, teacher, span.start)
        train(network, ProgressiveDistillation(stage), Source(mixture), span, schedule, 3e-3)
    after = np.abs(endpoints(network, schedule, config) - exact).mean()
    assert before > 0.3
    assert after < 0.06
