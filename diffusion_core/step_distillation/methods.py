"""The methods of step distillation that ``steps.method`` chooses: one record each in ``STEP_METHODS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from diffusion_core.config import StepsConfig
from diffusion_core.diffusion.objective import Objective
from diffusion_core.registries import STEP_METHODS
from diffusion_core.step_distillation.consistency import ConsistencyDistillation, ConsistencyTuning
from diffusion_core.step_distillation.progressive import ProgressiveDistillation
from diffusion_core.step_distillation.teaching import Lesson


@dataclass(frozen=True)
class StepMethod:
    """A method of step distillation.

    Attributes:
        objective: returns what a student is trained for in one stage.
        help: what it does, and its source.
        sampler: how its students are sampled, a key of ``SAMPLERS``.
        stages: returns the steps of the student of each stage, in order; the last are ``steps.target``.
        knobs: the knobs ``steps.*`` that it uses, besides those that all methods use.
        has_teacher: whether a stage needs a teacher network, given the guidance that the student is to learn.
    """

    objective: Callable[[Lesson], Objective]
    help: str
    sampler: str
    stages: Callable[[StepsConfig], list[int]]
    knobs: frozenset[str]
    has_teacher: Callable[[float], bool]


def halved(start: int, target: int) -> list[int]:
    """Return ``start`` halved again and again down to ``target``: 16 and 2 give 8, 4, 2.

    Raises:
        ValueError: if that does not lead there.
    """
    counts = [start // 2]
    while counts[-1] > target:
        counts.append(counts[-1] // 2)
    if counts[-1] != target or start != target * 2 ** len(counts):
        doubles = ", ".join(str(target * 2**count) for count in range(1, 6))
        raise ValueError(
            f"steps.start = {start}: does not halve to steps.target = {target}; expected one of {doubles}, ..."
        )
    return counts


STEP_METHODS["consistency"] = StepMethod(
    ConsistencyTuning,
    "the clean images of neighbouring noise levels become equal (Song et al. 2023; tuning: Geng et al. 2024)",
    sampler="consistency",
    stages=lambda steps: [steps.target],
    knobs=frozenset({"doublings"}),
    has_teacher=lambda guidance: guidance != 1.0,
)
STEP_METHODS["consistency_distillation"] = StepMethod(
    ConsistencyDistillation,
    "the same along the paths of a teacher, which scatter less than those of the data (Song et al. 2023)",
    sampler="consistency",
    stages=lambda steps: [steps.target],
    knobs=frozenset({"doublings"}),
    has_teacher=lambda guidance: True,
)
STEP_METHODS["progressive"] = StepMethod(
    ProgressiveDistillation,
    "a step of the student replaces two of its teacher, again and again (Salimans & Ho 2022)",
    sampler="ddim",
    stages=lambda steps: halved(steps.start, steps.target),
    knobs=frozenset({"start"}),
    has_teacher=lambda guidance: True,
)
