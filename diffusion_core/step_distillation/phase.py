"""The last part of a run, in which a student is distilled that samples in few steps.

Each stage starts as a run of its own would: from the averaged weights, with new averages, a new optimizer and its own
learning rate schedule. The record of the stage and the teacher are in every checkpoint, so a resumed run equals an
unbroken one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from diffusion_core.checkpoint import STUDENT, CheckpointError
from diffusion_core.config import CoreConfig, StepsConfig
from diffusion_core.data.batches import Batches
from diffusion_core.diffusion.schedule import build_schedule
from diffusion_core.messages import one_line
from diffusion_core.model.unet import UNet
from diffusion_core.registries import PREDICTIONS, STEP_METHODS
from diffusion_core.step_distillation.methods import StepMethod
from diffusion_core.step_distillation.progressive import SPACING
from diffusion_core.step_distillation.teaching import Lesson
from diffusion_core.training.evaluation import STAGE, TEACHER
from diffusion_core.training.learning_rate import Phase
from diffusion_core.training.trainer import Callback, TrainState, train

TEACHER_PART = "steps_teacher"
"""The checkpoint's part with the weights of a stage's teacher."""

UNCLEAR_FROM = 10.0
"""Noise level at which a student starts whose network cannot tell the image from pure noise: its error is multiplied by
that level."""


@dataclass(frozen=True)
class Stage:
    """A stage: its number, the steps an image of its student, and the optimizer steps before it and at its end."""

    index: int
    count: int
    start: int
    end: int


def stages(steps: StepsConfig, first: int, last: int) -> list[Stage]:
    """Return the stages between two optimizer steps, of equal length but for rounding.

    Raises:
        ValueError: if ``steps.start`` does not halve to ``steps.target``.
    """
    method: StepMethod = STEP_METHODS[steps.method]
    counts = method.stages(steps)
    ends = [first + (last - first) * index // len(counts) for index in range(len(counts) + 1)]
    return [Stage(index, count, ends[index], ends[index + 1]) for index, count in enumerate(counts)]


def start_level(config: CoreConfig, steps: StepsConfig) -> float | None:
    """Return the noise level at which a student starts; None: the last one."""
    if steps.start_level is not None:
        return steps.start_level
    record = PREDICTIONS[config.diffusion.prediction]
    if record.at_pure_noise or record.inputs is not None:
        return None
    return UNCLEAR_FROM if float(build_schedule(config.diffusion).levels[-1]) > UNCLEAR_FROM else None


def is_student(state: TrainState) -> bool:
    """Return whether step distillation has begun."""
    return STUDENT in state.extra_metadata


def figures_prefix(state: TrainState, steps: StepsConfig) -> str:
    """Return what is put before the names of a state's figures, so that only those of the last student are plain.

    ``TEACHER`` before step distillation, ``STAGE`` with the steps of the student in all stages but the last.
    """
    if not steps.wanted:
        return ""
    if not is_student(state):
        return TEACHER
    count = state.extra_metadata[STUDENT]["sampling"]["steps"]
    return "" if count == steps.target else STAGE.format(count)


def distil_steps(
    state: TrainState,
    batches: Batches,
    config: CoreConfig,
    steps: StepsConfig,
    first: int,
    callbacks: Sequence[Callback],
    accelerator: Accelerator,
    on_stage: Callable[[], None] = lambda: None,
) -> None:
    """Train the students of all stages that are left, up to ``train.steps``.

    Args:
        state: a trained network, or a student that is being trained. Changed in place.
        batches: the images of each step.
        config: every knob of the core.
        steps: the knobs of step distillation.
        first: optimizer steps before the first stage.
        callbacks: called after every step.
        accelerator: processes and devices.
        on_stage: called after the start of each stage that this call starts.

    Raises:
        CheckpointError: if the teacher of a restored state does not fit.
        TrainingDiverged: if the loss is not finite.
    """
    for stage in _remaining(state, stages(steps, first, config.train.steps)):
        if not is_student(state) or state.extra_metadata[STUDENT]["stage"] < stage.index:
            start_stage(state, config, steps, stage)
            on_stage()
        lesson = lesson_of(state, config, steps, stage.end)
        warmup = min(config.train.warmup_steps, (lesson.end - lesson.start) // 10)
        train(
            state,
            batches,
            config,
            callbacks,
            accelerator=accelerator,
            until=stage.end,
            objective=STEP_METHODS[steps.method].objective(lesson),
            phase=Phase(lesson.start, lesson.end, steps.lr or config.train.lr, warmup),
        )


def _remaining(state: TrainState, planned: Sequence[Stage]) -> Iterator[Stage]:
    """Yield the stages from the one that a state is in."""
    reached = state.extra_metadata[STUDENT]["stage"] if is_student(state) else 0
    yield from planned[reached:]


def start_stage(state: TrainState, config: CoreConfig, steps: StepsConfig, stage: Stage) -> None:
    """Make the averaged network the student and, if the method needs one, the teacher of a stage."""
    method: StepMethod = STEP_METHODS[steps.method]
    guidance = config.sample.guidance if steps.guidance is None else steps.guidance
    guidance = guidance if stage.index == 0 else 1.0  # Later teachers have learned it.
    level = start_level(config, steps)
    weights = {name: tensor.clone() for name, tensor in state.ema.network.state_dict().items()}
    state.network.load_state_dict(weights)
    for averaged in state.ema.networks.values():
        averaged.load_state_dict(weights)
    state.ema.updates = 0
    state.optimizer.state.clear()  # In place: masks are held by its hooks.
    state.revision += 1
    state.extra_parts.pop(TEACHER_PART, None)
    if method.has_teacher(guidance):
        state.extra_parts[TEACHER_PART] = weights
    state.extra_metadata[STUDENT] = {
        "method": steps.method,
        "target": steps.target,
        "stage": stage.index,
        "start": state.step,
        "guidance": guidance,
        "start_level": level,
        "sampling": _sampling(method.sampler, stage.count, level),
    }


def _sampling(sampler: str, count: int, level: float | None) -> dict[str, Any]:
    """Return the knobs of ``sample.*`` with which a student is sampled."""
    return {
        "sampler": sampler,
        "steps": count,
        "spacing": SPACING,
        "start_level": level,
        "eta": 0.0,
        "guidance": 1.0,
        "guidance_interval": None,
    }


def lesson_of(state: TrainState, config: CoreConfig, steps: StepsConfig, end: int) -> Lesson:
    """Return the stage that a state is in.

    Raises:
        CheckpointError: if its record or its teacher does not fit the network.
    """
    try:
        record = state.extra_metadata[STUDENT]
        return Lesson(
            config,
            steps,
            start=record["start"],
            end=end,
            count=record["sampling"]["steps"],
            guidance=record["guidance"],
            start_level=record["start_level"],
            teacher=_teacher(state),
        )
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"cannot resume the step distillation: {one_line(error)}") from None


def _teacher(state: TrainState) -> UNet | None:
    """Return the network whose weights a state keeps as teacher, or None."""
    if TEACHER_PART not in state.extra_parts:
        return None
    teacher = copy.deepcopy(state.ema.network)
    teacher.load_state_dict(state.extra_parts[TEACHER_PART])
    return teacher.eval().requires_grad_(False)
