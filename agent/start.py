"""What a run starts from: nothing, or the weights of a checkpoint on disk or in W&B."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from agent.config import TrialConfig
from agent.tracking.artifacts import download_model
from diffusion_core.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from diffusion_core.config import ConfigError, flatten, list_knobs
from diffusion_core.data.datasets import Dataset
from diffusion_core.distributed import first_process_first
from diffusion_core.model.unet import build_network
from diffusion_core.tracking import Tracker
from diffusion_core.training.teacher import keep_teacher
from diffusion_core.training.trainer import TrainState
from pruning.consistency import inherit_dense_images
from pruning.masks.mask import MASKS_PART
from pruning.pruner import RECORD_KEY, inherit

PARENT_KEY = "parent"
"""Where checkpoints say what their run started from."""

FREE_TO_DIFFER = frozenset({"model.dropout"})
"""Of the model's knobs those that do not change its weights' meaning."""


@dataclass(frozen=True)
class Source:
    """A checkpoint to start from.

    Attributes:
        checkpoint: on disk.
        artifact: the artifact that it was downloaded from, ``ENTITY/PROJECT/NAME:VERSION``, or None.
    """

    checkpoint: Checkpoint
    artifact: str | None

    def parent(self) -> dict[str, Any]:
        """What a checkpoint says of the one that it comes from."""
        return {
            "checkpoint": str(self.checkpoint.path),
            "artifact": self.artifact,
            "step": self.checkpoint.step,
            "sha256": self.checkpoint.metadata["files"]["ema.safetensors"]["sha256"],
        }


def open_source(checkpoint: str | None, artifact: str | None, option: str) -> Source | None:
    """The checkpoint that is named, or None if none is.

    Args:
        checkpoint: its path.
        artifact: or its artifact.
        option: the section of both knobs, or ``--``, for messages.

    Raises:
        CheckpointError: if it cannot be had.
    """
    if artifact is not None:
        model = download_model(artifact, f"{option}artifact", f"{option}checkpoint")
        return Source(read_checkpoint(model.path), model.name)
    return Source(read_checkpoint(Path(checkpoint)), None) if checkpoint is not None else None


def start_state(config: TrialConfig, dataset: Dataset, tracker: Tracker, accelerator: Accelerator) -> TrainState:
    """The state in which a run's first step finds everything: untrained, or from the checkpoint that ``init.*`` names.

    Raises:
        ConfigError: if that checkpoint, or the teacher's, is one of another architecture.
        CheckpointError: if one of them cannot be had.
    """
    with first_process_first(accelerator):  # The first process downloads, the others find it there.
        source = open_source(config.init.checkpoint, config.init.artifact, "init.")
        teacher = open_source(config.distill.checkpoint, config.distill.artifact, "distill.")
    if source is None:
        network = build_network(config, dataset.num_classes).to(accelerator.device)
        state = TrainState.start(network, config)
    else:
        state = start_from(source, config, dataset.num_classes, config.init.weights, accelerator.device, "init.")
    if teacher is not None:
        _check(teacher, config, dataset.num_classes, "distill.")
        keep_teacher(state, teacher.checkpoint.network(), config.model)
    for used in (source, teacher):
        if used is not None and used.artifact is not None:
            tracker.use(used.artifact)
    return state


def start_from(
    source: Source, config: TrialConfig, num_classes: int, weights: str, device: torch.device, option: str
) -> TrainState:
    """A state at step 0 with the network of a checkpoint, fresh averages and a fresh optimizer.

    Args:
        source: the checkpoint.
        config: the new run's.
        num_classes: the new run's.
        weights: the part to take: ``ema`` or ``model``.
        device: where to.
        option: as in :func:`open_source`.

    Raises:
        ConfigError: if the checkpoint is one of another architecture, or of images of another kind.
        CheckpointError: if it does not hold these weights, or they do not fit.
    """
    checkpoint = source.checkpoint
    _check(source, config, num_classes, option)
    if weights not in checkpoint.parts:
        raise CheckpointError(
            f"{option}weights = {weights!r}: {str(checkpoint.path)!r} holds {', '.join(checkpoint.parts)}"
        )
    state = TrainState.start(checkpoint.network(weights).to(device), config)
    masks = checkpoint.tensors(MASKS_PART) if MASKS_PART in checkpoint.parts else None
    try:
        inherit(state, checkpoint.metadata["extra"].get(RECORD_KEY, []), masks)
        inherit_dense_images(state, checkpoint)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{str(checkpoint.path)!r}: cannot start from it: {error}") from None
    state.extra_metadata[PARENT_KEY] = source.parent()
    return state


def _check(source: Source, config: TrialConfig, num_classes: int, option: str) -> None:
    """Raise a ConfigError where a configuration and a checkpoint's network are not the same."""
    for problem in disagreements(source.checkpoint, config, num_classes):
        raise ConfigError(f"{problem} of {option}checkpoint = {str(source.checkpoint.path)!r}")


def disagreements(checkpoint: Checkpoint, config: TrialConfig, num_classes: int) -> Iterator[str]:
    """Where a configuration and a checkpoint's network are not the same, each as the start of a line for the user."""
    now, then = flatten(config), checkpoint.metadata["config"]
    for key, _ in list_knobs(TrialConfig):
        if key in FREE_TO_DIFFER or not (key.startswith("model.") or key == "diffusion.prediction"):
            continue
        if key in then and now[key] != then[key]:
            yield f"{key} = {now[key]!r}: expected {then[key]!r}, which is that"
    if config.data.image_shape != checkpoint.shape_CHW:
        channels, size, _ = checkpoint.shape_CHW
        yield (
            f"data.image_size = {config.data.image_shape[1]}: with {config.data.image_shape[0]} channels; expected "
            f"{size}, with {channels} channels, which are those"
        )
    if config.model.class_conditional and num_classes != checkpoint.metadata["num_classes"]:
        yield (
            f"data.name = {config.data.name!r}: has {num_classes} classes; expected "
            f"{checkpoint.metadata['num_classes']}, which are those"
        )
