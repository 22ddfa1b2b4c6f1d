"""A Diffusers model becomes a checkpoint. Nothing in its files is run."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffusion_core.checkpoint import write_checkpoint
from diffusion_core.config import ConfigError, CoreConfig, build, flatten
from diffusion_core.diffusers_io.names import (
    CLASSES_FILE,
    EXTRA,
    INDEX_FILE,
    UNET_DEFAULTS,
    UNET_FILE,
    WEIGHTS_FILES,
    modern_tensors,
    unet_knobs,
)
from diffusion_core.diffusers_io.networks import compare, compare_schedules, describe, diffusers_network, our_network
from diffusion_core.diffusers_io.scheduler import SCHEDULER_DEFAULTS, SCHEDULER_FILE, fewer_steps, scheduler_knobs
from diffusion_core.diffusers_io.values import unknown_keys
from diffusion_core.messages import one_line
from diffusion_core.model.unet import NO_LABEL

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HO_SCHEDULER = {"_class_name": "DDPMScheduler", "variance_type": "fixed_large"}
"""What a network without a scheduler is taken to be trained with: Ho et al. 2020."""


@dataclass(frozen=True)
class DiffusersModel:
    """What was read of a Diffusers model: two configurations, the weights under today's names, the classes."""

    unet: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    class_names: tuple[str, ...]
    has_null_class: bool
    notes: list[str] = field(default_factory=list)


def import_model(name: str, folder: Path, *, null_class: bool = False) -> Iterator[str]:
    """Write the checkpoint of a Diffusers model into ``folder``; yields what is to be told, the network first.

    Args:
        name: a folder on disk, or the model's name on the hub.
        folder: an empty folder.
        null_class: whether the last class stands for "no class", where no file says so.

    Raises:
        ConfigError: if it cannot be had, or is what ours cannot be; the message names the key that is to blame.
    """
    source = read_diffusers(find_source(name), null_class)
    knobs = unet_knobs(source.unet) | scheduler_knobs(source.scheduler)
    if source.class_names and not source.has_null_class:
        knobs["train.label_dropout"] = 0.0
    config = build(CoreConfig, knobs)
    theirs, unexpected = diffusers_network(source.unet, source.tensors)
    network = our_network(config, len(source.class_names), source.tensors, has_null_class=source.has_null_class)
    labels = [*range(len(source.class_names)), *([NO_LABEL] if source.has_null_class else [])]
    difference = compare(network, theirs, labels)
    compare_schedules(config, source.scheduler)

    metadata = {
        "config": flatten(config),
        "image_shape": [network.in_channels, network.image_size, network.image_size],
        "num_classes": network.num_classes,
        "class_names": list(source.class_names),
        "structure": {},
        "figures": {},
        "best": None,
        "ema_updates": 0,
        "extra": {EXTRA: {"source": name, **fewer_steps(SCHEDULER_DEFAULTS | dict(source.scheduler))}},
    }
    tensors = dict(network.state_dict())
    written = write_checkpoint(folder / "writing", 0, metadata, {"ema": tensors, "model": tensors})
    for path in written.path.iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(folder / "writing")

    yield f"{describe(network)}; differs from Diffusers by at most {difference:.1e}"
    for note in source.notes:
        yield f"note: {note}"
    if unexpected:
        yield f"note: weights that UNet2DModel does not know were passed over: {', '.join(unexpected)[:300]}"
    if source.class_names and not source.has_null_class:
        yield 'note: there is no "no class": sample it with labels; guidance needs train.label_dropout above 0'


def find_source(source: str) -> Path:
    """The folder of a model that is on disk, or else is downloaded from the hub (or found in its cache).

    Raises:
        ConfigError: if there is neither.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or not HUB_NAME.fullmatch(source):
        raise ConfigError(f"SOURCE = {source!r}: expected a folder, or a hub name such as google/ddpm-cifar10-32")
    import huggingface_hub

    settings = [f"{folder}{name}" for folder in ("", "unet/", "scheduler/") for name in (UNET_FILE, SCHEDULER_FILE)]
    try:
        for weights in WEIGHTS_FILES:  # The second only where there is no first.
            wanted = [INDEX_FILE, CLASSES_FILE, *settings, weights, f"unet/{weights}"]
            folder = Path(huggingface_hub.snapshot_download(source, allow_patterns=wanted))
            if any((folder / name).is_file() for name in (weights, f"unet/{weights}")):
                break
    except Exception as error:  # Of many kinds: the hub's, of HTTP, of the disk.
        reason = one_line(error)
        raise ConfigError(f"SOURCE = {source!r}: no such folder, and not to be had from the hub: {reason}") from None
    return folder


def read_diffusers(folder: Path, null_class: bool) -> DiffusersModel:
    """Read a pipeline's folder, or that of a UNet2DModel; published pipelines of old have all files in one folder.

    Raises:
        ConfigError: if it holds something else.
    """
    notes = []
    if (folder / INDEX_FILE).is_file():
        parts = {key for key in read_json(folder / INDEX_FILE) if not key.startswith("_")}
        if parts != {"unet", "scheduler"}:
            raise ConfigError(
                f"{str(folder / INDEX_FILE)!r}: a pipeline of {', '.join(sorted(parts))}; expected unet and scheduler"
            )
    place = folder / "unet" if (folder / "unet" / UNET_FILE).is_file() else folder
    if not (place / UNET_FILE).is_file():
        raise ConfigError(f"SOURCE = {str(folder)!r}: no Diffusers model here (expected {INDEX_FILE} or {UNET_FILE})")
    unet = read_json(place / UNET_FILE)
    if unet.get("_class_name") != "UNet2DModel":
        found = unet.get("_class_name")
        raise ConfigError(f"{str(place / UNET_FILE)!r}: _class_name = {found!r}: expected 'UNet2DModel'")
    try:
        unet_knobs(unet)
    except ConfigError as error:
        raise ConfigError(f"{str(place / UNET_FILE)!r}: {error}") from None

    scheduler_file = folder / "scheduler" / SCHEDULER_FILE
    if not scheduler_file.is_file():
        scheduler_file = folder / SCHEDULER_FILE
    scheduler: Mapping[str, Any] = HO_SCHEDULER
    if scheduler_file.is_file():
        scheduler = read_json(scheduler_file)
        try:
            scheduler_knobs(scheduler)
        except ConfigError as error:
            raise ConfigError(f"{str(scheduler_file)!r}: {error}") from None
    else:
        notes.append(f"no {SCHEDULER_FILE}: took that of Ho et al. 2020 (linear, 1000 timesteps, predicts the noise)")
    unknown = unknown_keys(unet, UNET_DEFAULTS) + unknown_keys(scheduler, SCHEDULER_DEFAULTS)
    if unknown:
        notes.append(f"keys that Diffusers does not know were passed over: {', '.join(unknown)[:300]}")

    embeddings = unet.get("num_class_embeds") or 0
    class_names, has_null_class = read_classes(folder, embeddings, null_class)
    return DiffusersModel(unet, scheduler, read_weights(place, notes), class_names, has_null_class, notes)


def read_classes(folder: Path, embeddings: int, null_class: bool) -> tuple[tuple[str, ...], bool]:
    """The classes' names, and whether one more embedding stands for "no class"."""
    if null_class and embeddings < 2:
        raise ConfigError(f"--null-class: the model has num_class_embeds = {embeddings}; expected at least 2")
    file = folder / CLASSES_FILE
    if not embeddings or not file.is_file():
        return tuple(map(str, range(embeddings - null_class))), null_class
    content = read_json(file)
    names, has_null_class = content.get("classes"), content.get("null_class")
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(name, str) for name in names)
        or not isinstance(has_null_class, bool)
        or len(names) + has_null_class != embeddings
    ):
        raise ConfigError(f"{str(file)!r}: does not name the classes of num_class_embeds = {embeddings}; delete it")
    return tuple(names), has_null_class


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ConfigError(f"{str(file)!r}: cannot be read as a JSON object")
    return content


def read_weights(folder: Path, notes: list[str]) -> dict[str, Tensor]:
    """The weights of a UNet2DModel in float32, under today's names; nothing in the file is run."""
    file = next((folder / name for name in WEIGHTS_FILES if (folder / name).is_file()), None)
    if file is None:
        raise ConfigError(f"{str(folder)!r}: no weights here (expected {' or '.join(WEIGHTS_FILES)})")
    try:
        if file.suffix == ".safetensors":
            tensors = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = one_line(error)
        raise ConfigError(f"{str(file)!r}: cannot be read as weights: {reason}") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ConfigError(f"{str(file)!r}: cannot be read as weights: expected tensors by name")
    try:
        modern = modern_tensors(tensors)
    except ConfigError as error:
        raise ConfigError(f"{str(file)!r}: {error}") from None
    kinds = sorted({str(tensor.dtype) for tensor in modern.values()} - {"torch.float32"})
    if kinds:
        notes.append(f"weights of type {', '.join(kinds)} become torch.float32")
    return {name: tensor.float().contiguous() for name, tensor in modern.items()}
