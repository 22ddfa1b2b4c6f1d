"""Start a run from the weights of a checkpoint, which may be pruned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_core.checkpoint import STUDENT, Checkpoint, CheckpointError
from diffusion_core.config import ConfigError, CoreConfig, StepsConfig, flatten, list_knobs
from diffusion_core.data.datasets import Dataset, in_recorded_order
from diffusion_core.data.fingerprint import RECORDED, describe_data
from diffusion_core.redact import redact, redacted
from diffusion_core.registries import STEP_METHODS
from diffusion_core.runs.inputs import PARENT_KEY, TEACHER_KEY
from diffusion_core.training.trainer import TrainState
from pruning.config import PruneConfig, steps_start
from pruning.consistency import inherit_dense_images
from pruning.masks.mask import MASKS_PART
from pruning.pruner import RECORD_KEY, inherit

FREE_TO_DIFFER = frozenset({"model.dropout"})
"""Knobs of the model that do not change the meaning of its weights."""


@dataclass(frozen=True)
class Source:
    """A checkpoint to start from.

    Attributes:
        checkpoint: the checkpoint on disk.
        artifact: the artifact that it was downloaded from, ``ENTITY/PROJECT/NAME:VERSION``, or None.
        option: prefix of the option that named it: ``init.``, ``distill.`` or ``--``. For messages.
    """

    checkpoint: Checkpoint
    artifact: str | None
    option: str

    def parent(self) -> dict[str, Any]:
        """Describe the checkpoint, for the metadata of those that follow from it."""
        return {
            "checkpoint": redact(str(self.checkpoint.path)),
            "artifact": self.artifact,
            "step": self.checkpoint.step,
            "sha256": self.checkpoint.metadata["files"]["ema.safetensors"]["sha256"],
        }


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        source: the checkpoint whose weights it takes; None: new weights.
        teacher: the checkpoint that it learns from, or None.
    """

    source: Source | None
    teacher: Source | None

    def check(self, config: CoreConfig, num_classes: int, weights: str) -> None:
        """Check that a run can start from these checkpoints.

        Raises:
            ConfigError: if one of them has another architecture.
            CheckpointError: if the source lacks the wanted weights.
        """
        if self.source is not None:
            check_source(self.source, config, num_classes, weights)
        if self.teacher is not None:
            check_architecture(self.teacher, config, num_classes)

    def taken(self, config: CoreConfig, dataset: Dataset) -> dict[str, Any]:
        """Describe what a new run takes from outside, as the metadata of its checkpoints will."""
        used = {PARENT_KEY: self.source, TEACHER_KEY: self.teacher}
        for source in filter(None, used.values()):
            dataset = in_recorded_order(dataset, config.data, source.checkpoint.class_names)
        return {
            "config": redacted(flatten(config)),
            "class_names": redacted(list(dataset.class_names)),
            RECORDED: describe_data(config.data.name, dataset),
            "extra": {key: source.parent() for key, source in used.items() if source is not None},
        }


def start_from(source: Source, config: CoreConfig, num_classes: int, weights: str, device: torch.device) -> TrainState:
    """Return a state at step 0 with the network of a checkpoint, new averages and a new optimizer.

    Args:
        source: the checkpoint.
        config: configuration of the new run.
        num_classes: number of classes of the new run.
        weights: the part to take: ``ema`` or ``model``.
        device: device of the new network.

    Raises:
        ConfigError: if the checkpoint has another architecture, or images of another kind.
        CheckpointError: if the checkpoint lacks these weights, or they do not fit.
    """
    checkpoint = source.checkpoint
    check_source(source, config, num_classes, weights)
    state = TrainState.start(checkpoint.network(weights).to(device), config.train, config.ema)
    masks = checkpoint.tensors(MASKS_PART) if MASKS_PART in checkpoint.parts else None
    try:
        inherit(state, checkpoint.metadata["extra"].get(RECORD_KEY, []), masks)
        inherit_dense_images(state, checkpoint)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{str(checkpoint.path)!r}: cannot start from it: {error}") from None
    state.extra_metadata[PARENT_KEY] = source.parent()
    return state


def check_source(source: Source, config: CoreConfig, num_classes: int, weights: str) -> None:
    """Check that a run can start from a checkpoint. For the arguments and errors, see :func:`start_from`."""
    check_architecture(source, config, num_classes)
    if weights not in source.checkpoint.parts:
        parts = ", ".join(source.checkpoint.parts)
        raise CheckpointError(f"{source.option}weights = {weights!r}: {str(source.checkpoint.path)!r} holds {parts}")


def check_architecture(source: Source, config: CoreConfig, num_classes: int) -> None:
    """Check that a configuration describes the network of a checkpoint.

    Raises:
        ConfigError: at the first difference.
    """
    for problem in differences(source.checkpoint, config, num_classes):
        raise ConfigError(f"{problem} as in {source.option}checkpoint = {str(source.checkpoint.path)!r}")


SCHEDULE_KNOBS = (
    "diffusion.schedule",
    "diffusion.timesteps",
    "diffusion.beta_start",
    "diffusion.beta_end",
    "diffusion.logsnr_shift",
    "diffusion.zero_terminal_snr",
    "diffusion.sigma_min",
    "diffusion.sigma_max",
)
"""Knobs that decide what a timestep means."""


def check_step_teacher(source: Source, config: CoreConfig, steps: StepsConfig, prune: PruneConfig) -> None:
    """Check that step distillation can start from a checkpoint, if it does so without training first.

    Raises:
        ConfigError: if the checkpoint has another noise schedule, or is itself a student of other steps.
    """
    if not steps.wanted or steps_start(steps, prune, config.train.steps, from_parent=True):
        return
    named = f"of the teacher, {source.option}checkpoint = {str(source.checkpoint.path)!r}"
    now, then = flatten(config), flatten(source.checkpoint.config())
    for key in SCHEDULE_KNOBS:
        if now[key] != then[key]:
            raise ConfigError(f"{key} = {now[key]!r}: expected {then[key]!r}, {named}")
    record = source.checkpoint.metadata["extra"].get(STUDENT)
    if record is None:
        return
    sampler, count = then["sample.sampler"], then["sample.steps"]
    method = STEP_METHODS[steps.method]
    guidance = config.sample.guidance if steps.guidance is None else steps.guidance
    # The clean image of a consistency student is the end of a path, not the mean that a teacher needs.
    teaches = sampler == "consistency" and method.has_teacher(guidance)
    if teaches or sampler != method.sampler or (sampler == "ddim" and count != steps.start):
        raise ConfigError(
            f"steps.method = {steps.method!r}: the teacher is a student already, of {count} steps with {sampler}; "
            f"expected a teacher of many steps, or one that this method continues (steps.start = {count} with "
            f"progressive)"
        )


def refuse_student(source: Source) -> None:
    """Check that a network predicts what it was trained to predict at all noise levels, as methods of pruning assume.

    Raises:
        ConfigError: if it is a student of step distillation.
    """
    if STUDENT in source.checkpoint.metadata["extra"]:
        sample = source.checkpoint.config().sample
        raise ConfigError(
            f"{source.option}checkpoint = {str(source.checkpoint.path)!r}: is a student of {sample.steps} steps with "
            f"{sample.sampler}; prune its teacher, then distil the pruned model"
        )


MEANING = ("diffusion.prediction", "upsample.factor")
"""Knobs besides those of the model that decide what its inputs and outputs mean."""


def differences(checkpoint: Checkpoint, config: CoreConfig, num_classes: int) -> Iterator[str]:
    """Yield the differences between a configuration and a checkpoint's network, as the start of a message."""
    now, then = flatten(config), {"upsample.factor": None} | checkpoint.metadata["config"]
    for key, _ in list_knobs(CoreConfig):
        if key in FREE_TO_DIFFER or not (key.startswith("model.") or key in MEANING):
            continue
        if key in then and now[key] != then[key]:
            yield f"{key} = {now[key]!r}: expected {then[key]!r},"
    if config.data.image_shape != checkpoint.shape_CHW:
        channels, size, _ = checkpoint.shape_CHW
        yield (
            f"data.image_size = {config.data.image_shape[1]}: with {config.data.image_shape[0]} channels; expected "
            f"{size}, with {channels} channels,"
        )
    if config.model.class_conditional and num_classes != checkpoint.metadata["num_classes"]:
        yield (
            f"data.name = {config.data.name!r}: has {num_classes} classes; expected "
            f"{checkpoint.metadata['num_classes']} classes,"
        )
