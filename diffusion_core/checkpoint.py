"""Checkpoints: a folder of safetensors files and one JSON file, written atomically, read without running any code.

    step-00005000/
        checkpoint.json                format, step, configuration, shapes, figures, size and SHA-256 of each file
        ema.safetensors                averaged weights: what is sampled from
        model.safetensors              weights as trained
        optimizer.safetensors          moments of AdamW
        masks.safetensors              pruning masks, if there are any

The first two files are all that sampling needs. Metadata is read without importing PyTorch, which takes seconds and
half a gigabyte.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from diffusion_core.config import ConfigError, CoreConfig, build, list_knobs
from diffusion_core.config.plugins import missing_plugins
from diffusion_core.files import first_not_finite, replaced_folder, restore_replaced, sha256, sha256_of_file
from diffusion_core.messages import UserError, one_line, reason_of
from diffusion_core.randomness import drawn_as
from diffusion_core.redact import redact

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion_core.model.unet import UNet

FORMAT = 1
METADATA_FILE = "checkpoint.json"
FILE_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}\.safetensors")
MAX_CLASSES = 1_000_000
MAX_METADATA_BYTES = 100_000_000
SAMPLING_PARTS = ("ema",)
"""What goes into the `model` artifact; all other parts go into the `training-state` artifact."""


STUDENT = "steps"
"""Key of a checkpoint's extra metadata for the record of its step distillation, if it holds a student."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read or used; the message is one line meant for the user.

    Attributes:
        errno: code of the system's error, if that is the cause.
    """

    errno: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose metadata was read and whose files were verified.

    Attributes:
        path: its folder.
        metadata: the content of ``checkpoint.json``.
        chosen: which one it is and why it was chosen, in one line, if there was a choice.
    """

    path: Path
    metadata: Mapping[str, Any]
    chosen: str = field(default="", compare=False)

    @property
    def step(self) -> int:
        """Optimizer step at which the checkpoint was written."""
        return self.metadata["step"]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return tuple(self.metadata["class_names"])

    @property
    def shape_CHW(self) -> tuple[int, int, int]:
        """Shape of one image: channels, height, width."""
        channels, height, width = self.metadata["image_shape"]
        return channels, height, width

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that it holds, such as ``model``, ``ema`` and ``optimizer``."""
        return tuple(name.removesuffix(".safetensors") for name in self.metadata["files"])

    def config(self) -> CoreConfig:
        """The core's part of the configuration that the model was trained with.

        Its ``sample.*`` are those of the trained model: a student of step distillation is sampled in few steps.
        """
        known = {key for key, _ in list_knobs(CoreConfig)}
        stored = self.metadata["config"]
        try:
            student = student_knobs(self.metadata["extra"])
            known_values = {key: value for key, value in stored.items() if key in known}
            return build(CoreConfig, {"draws": drawn_as(stored)}, known_values, student)
        except ConfigError as error:
            reason = missing_plugins(stored) or f"its configuration cannot be used: {error}"
            raise CheckpointError(f"{str(self.path)!r}: {reason}") from None

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of a part (``ema``, ``model``, ``optimizer``, ``masks``), on the CPU.

        Raises:
            CheckpointError: if the file cannot be read, or a value in it is not finite.
        """
        from safetensors.torch import load_file

        try:
            tensors = load_file(self.path / f"{part}.safetensors")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{str(self.path)!r}: cannot read its part {part!r}: {error}") from None
        if bad := first_not_finite(tensors):
            raise CheckpointError(
                f"{str(self.path)!r}: its {part} {bad!r} holds values that are not finite; take another checkpoint"
            )
        return tensors

    def network(self, part: str = "ema") -> UNet:
        """The network with the weights of a part, in evaluation mode, on the CPU.

        Raises:
            CheckpointError: if the weights do not fit the network that the metadata describes.
        """
        import torch

        from diffusion_core.model.structure import resize
        from diffusion_core.model.unet import UNet

        channels, size, _ = self.shape_CHW
        config, tensors = self.config(), self.tensors(part)
        try:
            # Without memory until the sizes are known to be those of the tensors, and to go together.
            with torch.device("meta"):
                given = config.upsample.channels(channels)
                network = UNet(config.model, size, channels, self.metadata["num_classes"], given)
                resize(network, self.metadata["structure"])
                network(torch.empty(1, network.input_channels, size, size), torch.empty(1, dtype=torch.long))
            network.load_state_dict({name: tensor.float().clone() for name, tensor in tensors.items()}, assign=True)
        except (ValueError, RuntimeError) as error:
            reason = one_line(error)
            raise CheckpointError(f"{str(self.path)!r}: its weights do not fit its network: {reason}") from None
        return network.eval()


def student_knobs(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the knobs ``sample.*`` with which a student of step distillation is sampled; empty for other networks.

    Args:
        extra: the metadata ``extra`` of a checkpoint.

    Raises:
        ConfigError: if the record of the distillation is damaged.
    """
    record = extra.get(STUDENT)
    if record is None:
        return {}
    try:
        return {f"sample.{name}": value for name, value in record["sampling"].items()}
    except (AttributeError, KeyError, TypeError):
        raise ConfigError("the record of its step distillation cannot be read; take another checkpoint") from None


def step_folder(step: int) -> str:
    """Name of the folder of a checkpoint. Names sort by step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Return the step of a checkpoint by the name of its folder; None if it has another name."""
    digits = path.name.removeprefix("step-")
    return int(digits) if digits != path.name and digits.isascii() and digits.isdecimal() else None


def write_checkpoint(
    folder: Path, step: int, metadata: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]
) -> Checkpoint:
    """Write a checkpoint below ``folder``: a temporary folder, flushed to disk, then renamed into place.

    Raises:
        CheckpointError: if a weight is not finite, or the disk takes no more; nothing half-written remains.
    """
    from safetensors.torch import save

    for part, tensors in parts.items():
        if bad := first_not_finite(tensors):
            raise CheckpointError(f"step {step}: {part} {bad!r} holds values that are not finite; not saved")
    final = folder / step_folder(step)
    try:
        restore_replaced(folder)
        for unfinished in folder.glob(".step-*.*"):  # A process was killed while it wrote or deleted them.
            shutil.rmtree(unfinished, ignore_errors=True)
        with replaced_folder(final, overwrite=True) as temporary:
            files = {}
            for part, tensors in parts.items():
                content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
                files[f"{part}.safetensors"] = {"bytes": len(content), "sha256": sha256(content)}
                (temporary / f"{part}.safetensors").write_bytes(content)
            described = {"format": FORMAT, "step": step, **metadata, "files": files}
            content = json.dumps(described, indent=1, allow_nan=False).encode()
            (temporary / METADATA_FILE).write_bytes(content)
    except (OSError, SafetensorError, ValueError) as error:
        failed = CheckpointError(f"cannot write checkpoint {str(final)!r}: {reason_of(error)}")
        failed.errno = getattr(error, "errno", None)
        raise failed from None
    return Checkpoint(final, described)


def read_checkpoint(path: Path, *, verify: bool = True) -> Checkpoint:
    """Read a checkpoint's metadata and verify that its files are what was written.

    Accepts the folder of one checkpoint, a folder of checkpoints (the newest is taken), a run's folder, or the
    download of a `model` artifact, which holds the parts for sampling alone.

    Args:
        path: where it is.
        verify: False where this process wrote the files, or read them before.

    Raises:
        CheckpointError: if there is none, or it is damaged, or of an unknown format.
    """
    if not os.path.isfile(path / METADATA_FILE):  # Raises no error, whatever the path is.
        for folder in (path, path / "checkpoints"):
            newest = newest_checkpoint(folder)
            if newest is not None:
                return newest
        raise CheckpointError(f"{str(path)!r}: no checkpoint here (expected a folder with {METADATA_FILE})")
    try:
        if (path / METADATA_FILE).stat().st_size > MAX_METADATA_BYTES:
            raise CheckpointError(f"{str(path)!r}: {METADATA_FILE} is larger than {MAX_METADATA_BYTES:,} bytes")
        metadata = json.loads((path / METADATA_FILE).read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(f"{str(path)!r}: {METADATA_FILE} cannot be read as JSON") from None
    problem = _metadata_problem(metadata)
    if problem:
        raise CheckpointError(f"{str(path)!r}: {METADATA_FILE}: {problem}")
    present = {}
    for name, entry in metadata["files"].items():
        file = path / name
        if not file.is_file():
            if name.removesuffix(".safetensors") in SAMPLING_PARTS:
                raise CheckpointError(f"{str(path)!r}: {name} is missing")
            continue
        if verify and (file.stat().st_size != entry["bytes"] or sha256_of_file(file) != entry["sha256"]):
            raise CheckpointError(f"{str(path)!r}: {name} is damaged (its size or SHA-256 is not what was written)")
        present[name] = entry
    return Checkpoint(path, metadata | {"files": present})


def _metadata_problem(metadata: Any) -> str | None:
    """Why metadata from an untrusted file cannot be used, or None."""
    expected = {
        "step": int,
        "config": dict,
        "image_shape": list,
        "num_classes": int,
        "class_names": list,
        "structure": dict,
        "figures": dict,
        "ema_updates": int,
        "extra": dict,
        "files": dict,
    }
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        return f"not a checkpoint of format {FORMAT}"
    for key, kind in expected.items():
        if not isinstance(metadata.get(key), kind) or isinstance(metadata[key], bool):
            return f"{key} is missing or no {kind.__name__}"
    for key in ("step", "ema_updates"):
        if metadata[key] < 0:
            return f"{key} = {metadata[key]}: expected 0 or more"
    shape = metadata["image_shape"]
    if len(shape) != 3 or not all(type(size) is int and 1 <= size <= 4096 for size in shape) or shape[1] != shape[2]:
        return f"image_shape = {shape!r}: expected channels, height and an equal width"
    if not 0 <= metadata["num_classes"] <= MAX_CLASSES:
        return f"num_classes = {metadata['num_classes']}: expected 0 to {MAX_CLASSES}"
    if not all(isinstance(name, str) for name in metadata["class_names"]):
        return "class_names holds something that is no text"
    if not all(isinstance(widths, dict) for widths in metadata["structure"].values()):
        return "structure holds something that is no mapping"
    for part in SAMPLING_PARTS:
        if f"{part}.safetensors" not in metadata["files"]:
            return f"files does not name {part}.safetensors"
    for name, entry in metadata["files"].items():
        if not FILE_NAME.fullmatch(name):
            return f"files names {redact(name)[:100]!r}, which is not a file of a checkpoint"
        if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int) or "sha256" not in entry:
            return f"files has no size and hash for {name!r}"
    return None


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint. It does not count from the first moment on; the next write deletes what a kill left."""
    doomed = path.with_name(f".{path.name}.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    shutil.rmtree(path.rename(doomed))


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below a folder, oldest first; half-written ones do not count."""
    if not os.path.isdir(folder):
        return []
    restore_replaced(folder)
    return sorted(path for path in folder.glob("step-*") if (path / METADATA_FILE).is_file())


def newest_checkpoint(folder: Path, parts: Collection[str] = SAMPLING_PARTS) -> Checkpoint | None:
    """The newest checkpoint below a folder that is whole and has some parts; others are passed over.

    Raises:
        CheckpointError: if there are damaged ones alone.
    """
    damaged: CheckpointError | None = None
    for path in reversed(list_checkpoints(folder)):
        try:
            checkpoint = read_checkpoint(path)
        except CheckpointError as error:
            damaged = error
            continue
        if set(parts) <= set(checkpoint.parts):
            return checkpoint
    if damaged is not None:
        raise damaged
    return None


def damaged_after(checkpoint: Checkpoint) -> list[str]:
    """Return what is wrong with the newer checkpoints beside one, which were passed over for it, newest first."""
    problems = []
    for path in reversed(list_checkpoints(checkpoint.path.parent)):
        if path.name > checkpoint.path.name:
            try:
                read_checkpoint(path)
            except CheckpointError as error:
                problems.append(str(error))
    return problems
