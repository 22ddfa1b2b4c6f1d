"""Find the checkpoint that a run resumes from; check that its configuration and its classes are the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, Any, TypeVar

from diffusion_core.checkpoint import Checkpoint, CheckpointError, damaged_after, list_checkpoints, newest_checkpoint
from diffusion_core.config import ConfigError, CoreConfig, DataConfig, flatten
from diffusion_core.data.classes import in_order, same_classes, shown_classes
from diffusion_core.randomness import drawn_as
from diffusion_core.redact import redacted
from diffusion_core.training.measured import check_measured

if TYPE_CHECKING:
    from diffusion_core.data.datasets import Dataset
    from diffusion_core.training.trainer import Callback, TrainState

NEEDED = ("model",)
"""Parts that resuming needs. The best checkpoint may have been downloaded without them."""

FREE_TO_CHANGE = (
    "train.device",
    "train.accumulation",
    "data.path",
    "log.",
    "checkpoint.",
    "sample.",
    "upsample.sample_noise",
    "eval.",
    "preset",
)
"""Knobs that may change when a run resumes. All others decide what is trained. See also :mod:`.measured`."""


LENGTH = "train.steps"

UNFINISHED = "unfinished"
"""Key of a checkpoint's metadata: the row of its step so far, if a signal stopped the evaluation after that step."""

Config = TypeVar("Config", bound=CoreConfig)


LOOK_AGAIN_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Pauses before processes look again which found different checkpoints. Network disks show new files seconds later."""


def find_checkpoint(
    config: CoreConfig, folder: Path, *, longer: bool = False, together: bool = False
) -> Checkpoint | None:
    """Return the newest checkpoint to resume from, after a check of its configuration. None if there is none.

    Args:
        config: configuration of the run.
        folder: folder of the run's checkpoints.
        longer: whether ``train.steps`` may have grown.
        together: whether all processes call this and must find the same (:func:`found_by_all`).

    Raises:
        ConfigError: if there are checkpoints and ``checkpoint.resume`` is false, or a knob that decides what is trained
            differs, or, together, if processes find different checkpoints.
        CheckpointError: if all checkpoints are damaged.
    """
    if together:
        return found_by_all(lambda: find_checkpoint(config, folder, longer=longer), folder)
    if not config.checkpoint.resume:
        if list_checkpoints(folder):
            raise ConfigError(
                f"checkpoint.resume = False: {str(folder)!r} holds checkpoints already; choose another log.dir"
            )
        return None
    checkpoint = newest_checkpoint(folder, NEEDED)
    if checkpoint is not None:
        check_same_run(config, checkpoint.metadata["config"], folder.parent, longer=longer)
    return checkpoint


def found_by_all(find: Callable[[], Checkpoint | None], folder: Path) -> Checkpoint | None:
    """Return the checkpoint that all processes find, which call this together. Without it they would train different
    networks, or wait for each other for ever.

    Args:
        find: looks for a checkpoint; its errors are raised if all processes have one.
        folder: where, for messages.

    Raises:
        ConfigError: in all processes, if they find different ones.
    """
    from diffusion_core.distributed import gather_objects  # It imports PyTorch.

    for pause in (*LOOK_AGAIN_S, None):
        found: Checkpoint | None = None
        error: ConfigError | CheckpointError | None = None
        try:
            found = find()
        except (ConfigError, CheckpointError) as raised:
            error = raised
        step = "no checkpoint to resume from" if found is None else f"step {found.step}"
        answers = gather_objects((step, f"in {gethostname()}:{folder.absolute()}", str(error) if error else ""))
        if len({(step, bool(problem)) for step, _, problem in answers}) == 1:
            if error is not None:
                raise error
            return found
        if pause is not None:
            time.sleep(pause)
    said = (
        f"process {rank} finds {step} {where}" + (f" ({problem})" if problem else "")
        for rank, (step, where, problem) in enumerate(answers)
    )
    raise ConfigError(f"log.dir = {str(folder.parent)!r}: {', '.join(said)}; choose a folder that all processes share")


def drawing_as(config: Config, then: Mapping[str, Any]) -> Config:
    """Return a configuration with the random draws of a run, unless it chooses them and the run knew versions of them.

    Args:
        config: configuration to resume with.
        then: configuration that the run was started with, by dotted key.
    """
    chosen = "draws" in then and "draws" in config.model_fields_set
    return config if chosen else config.model_copy(update={"draws": drawn_as(then)})


def kept_knobs(config: CoreConfig, then: Mapping[str, Any]) -> dict[str, Any]:
    """Return knobs that a resumed run keeps whatever this machine would choose, by dotted key.

    Args:
        config: configuration to resume with, as the user gave it.
        then: configuration that the run was started with, by dotted key.
    """
    kept = ["train.batch_size"] if config.train.batch_size == "auto" else []
    return {"draws": drawn_as(then)} | {key: then[key] for key in kept}


def check_same_run(config: CoreConfig, then: Mapping[str, Any], folder: Path, *, longer: bool = False) -> None:
    """Check that a run may resume with a configuration.

    Args:
        config: configuration to resume with.
        then: configuration that the run was started with, by dotted key.
        folder: the run's folder, for messages.
        longer: whether ``train.steps`` may have grown.

    Raises:
        ConfigError: if a knob that decides what is trained differs, or how a figure was measured that the run has.
    """
    grown = longer and is_longer(config, then)
    for key, value in redacted(flatten(drawing_as(config, then))).items():
        if key in then and then[key] != value and not key.startswith(FREE_TO_CHANGE) and not (grown and key == LENGTH):
            hint = "; it may only grow" if longer and key == LENGTH else ""
            raise ConfigError(
                f"{key} = {value!r}: the run in {str(folder)!r} was started with {then[key]!r}{hint}; choose another "
                f"log.dir, or set it back to continue"
            )
    check_measured(config, then, folder)


def with_labels_of(checkpoint: Checkpoint, config: DataConfig, dataset: Dataset) -> Dataset:
    """Return the images with the labels of the checkpoint that a run resumes from.

    The order of classes may have been another one when the run was started; it stays.

    Raises:
        ConfigError: if the classes are not those of the checkpoint, and the model knows them.
    """
    if checkpoint.metadata["num_classes"] and not same_classes(dataset.class_names, checkpoint.class_names):
        key, value = ("data.path", config.path) if config.path else ("data.name", config.name)
        raise ConfigError(
            f"{key} = {value!r}: holds {shown_classes(dataset.class_names)}; the run was started with "
            f"{shown_classes(checkpoint.class_names)} ({str(checkpoint.path)!r}); choose another log.dir, or the "
            "images of the run"
        )
    from diffusion_core.data.datasets import in_recorded_order  # It imports PyTorch.

    return in_recorded_order(dataset, config, checkpoint.class_names)


def check_same_labels(source: Checkpoint, teacher: Checkpoint) -> None:
    """Check that a label means the same class for the network to start from and for its teacher.

    Raises:
        ConfigError: if they know the same classes in different orders.
    """
    names = teacher.class_names
    if in_order(names, source.class_names) != tuple(names):
        raise ConfigError(
            f"distill.checkpoint = {str(teacher.path)!r}: knows {shown_classes(names)}, in another order than "
            f"{str(source.path)!r}; choose a teacher that was trained with the same order"
        )


def unfinished_row(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the row of the checkpoint's step so far, if a signal stopped the evaluation after that step. Else None."""
    row = checkpoint.metadata.get(UNFINISHED)
    return None if row is None else dict(row)


def finish_step(state: TrainState, resumed: Checkpoint | None, callbacks: Sequence[Callback]) -> None:
    """Call what is due after a checkpoint's step, if a signal stopped the evaluation after that step."""
    row = None if resumed is None else unfinished_row(resumed)
    if row is not None:
        for callback in callbacks:
            callback(state, row)


def is_longer(config: CoreConfig, then: Mapping[str, Any]) -> bool:
    """Return whether a run is to be trained for more steps than it was started with."""
    before = then.get(LENGTH)
    return type(before) is int and config.train.steps > before


def describe_resumed(config: CoreConfig, resumed: Checkpoint) -> str:
    """Return one line on where a run continues, and on newer checkpoints that are damaged."""
    where = describe_longer(config, resumed) or f"continues from step {resumed.step}"
    return "; ".join([*damaged_after(resumed), where])


def describe_longer(config: CoreConfig, resumed: Checkpoint) -> str | None:
    """Return one line on how a run continues whose ``train.steps`` has grown. None if it has not."""
    then = resumed.metadata["config"]
    if not is_longer(config, then):
        return None
    how = "the learning rate goes on as before"
    if config.train.lr_schedule == "cosine":
        how = (
            "from there the cosine of the learning rate follows the new length, which one long run would not have done"
        )
    return (
        f"{LENGTH} = {config.train.steps}: the run was started with {then[LENGTH]} and continues from step "
        f"{resumed.step}; {how}"
    )
