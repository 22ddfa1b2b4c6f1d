"""Find and read a Diffusers model. No code in its files is run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_core.config import ConfigError
from diffusion_core.diffusers_io.scheduler import scheduler_defaults, scheduler_knobs
from diffusion_core.diffusers_io.unet import unet_knobs
from diffusion_core.diffusers_io.values import defaults, errors_of, read_json
from diffusion_core.diffusers_io.weights import WEIGHTS_FILES, read_weights, weights_of, with_shards
from diffusion_core.messages import one_line

INDEX_FILE = "model_index.json"
UNET_FILE = "config.json"
SCHEDULER_FILE = "scheduler_config.json"
CLASSES_FILE = "classes.json"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HO_SCHEDULER = {"_class_name": "DDPMScheduler", "variance_type": "fixed_large"}
"""The scheduler of a network that comes without one: that of Ho et al. 2020."""


@dataclass(frozen=True)
class DiffusersModel:
    """A Diffusers model.

    Attributes:
        unet: configuration of the network.
        scheduler: configuration of the scheduler.
        knobs: our knobs for both.
        tensors: weights by name, in float32.
        class_names: one per class; empty without classes.
        has_null_class: whether the last embedding stands for "no class".
        notes: remarks for the user.
    """

    unet: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    knobs: dict[str, Any]
    tensors: Mapping[str, Tensor]
    class_names: tuple[str, ...]
    has_null_class: bool
    notes: list[str] = field(default_factory=list)


def find_source(source: str) -> Path:
    """Return the folder of a model on disk, or download it from the hub (or use the hub's cache).

    Raises:
        ConfigError: if it is neither on disk nor on the hub.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or not HUB_NAME.fullmatch(source):
        raise ConfigError(f"SOURCE = {source!r}: expected a folder, or a hub name such as google/ddpm-cifar10-32")
    import huggingface_hub

    settings = [f"{folder}{name}" for folder in ("", "unet/", "scheduler/") for name in (UNET_FILE, SCHEDULER_FILE)]
    try:
        for weights in WEIGHTS_FILES:  # Each further format only if those before it are missing.
            files = [f"{place}{name}" for place in ("", "unet/") for name in with_shards(weights)]
            wanted = [INDEX_FILE, CLASSES_FILE, *settings, *files]
            folder = Path(huggingface_hub.snapshot_download(source, allow_patterns=wanted))
            if weights_of(folder) or weights_of(folder / "unet"):
                break
    except Exception as error:  # Errors of the hub, of HTTP, of the disk.
        reason = one_line(error)
        raise ConfigError(
            f"SOURCE = {source!r}: no such folder, and the download from the hub failed: {reason}"
        ) from None
    return folder


def read_diffusers(folder: Path, null_class: bool, image_size: int | None = None) -> DiffusersModel:
    """Read the folder of a pipeline or of a UNet2DModel; old pipelines have all files in one folder.

    Args:
        folder: a folder on disk.
        null_class: whether the last embedding stands for "no class" if no file says so.
        image_size: height and width in pixels, if the model does not say.

    Raises:
        ConfigError: if a file is missing or damaged, or holds something that we cannot represent.
    """
    from diffusers import UNet2DModel

    if (folder / INDEX_FILE).is_file():
        parts = {key for key in read_json(folder / INDEX_FILE) if not key.startswith("_")}
        if parts != {"unet", "scheduler"}:
            found = ", ".join(sorted(parts))
            raise ConfigError(f"{str(folder / INDEX_FILE)!r}: a pipeline of {found}; expected unet and scheduler")
    place = folder / "unet" if (folder / "unet" / UNET_FILE).is_file() else folder
    if not (place / UNET_FILE).is_file():
        raise ConfigError(f"SOURCE = {str(folder)!r}: no Diffusers model here (expected {INDEX_FILE} or {UNET_FILE})")
    unet = read_json(place / UNET_FILE)
    with errors_of(place / UNET_FILE):
        if unet.get("_class_name") != "UNet2DModel":
            raise ConfigError(f"_class_name = {unet.get('_class_name')!r}: expected 'UNet2DModel'")
        knobs = unet_knobs(unet, image_size)

    notes = []
    files = [path for path in (folder / "scheduler" / SCHEDULER_FILE, folder / SCHEDULER_FILE) if path.is_file()]
    scheduler: Mapping[str, Any] = read_json(files[0]) if files else HO_SCHEDULER
    if not files:
        notes.append(f"no {SCHEDULER_FILE}: assuming Ho et al. 2020 (linear, 1000 timesteps, predicts the noise)")
    with errors_of(files[0] if files else folder):
        knobs |= scheduler_knobs(scheduler)
    known = defaults(UNet2DModel) | scheduler_defaults()
    unknown = [key for key in [*unet, *scheduler] if key not in known and not key.startswith("_")]
    if unknown:
        notes.append(f"keys that Diffusers does not know are ignored: {', '.join(unknown)[:300]}")

    class_names, has_null_class = read_classes(folder, unet.get("num_class_embeds") or 0, null_class)
    return DiffusersModel(unet, scheduler, knobs, read_weights(place, notes), class_names, has_null_class, notes)


def read_classes(folder: Path, embeddings: int, null_class: bool) -> tuple[tuple[str, ...], bool]:
    """Return the class names, and whether one more embedding stands for "no class"."""
    if null_class and embeddings < 2:
        raise ConfigError(f"--null-class: the model has num_class_embeds = {embeddings}; expected at least 2")
    file = folder / CLASSES_FILE
    if not embeddings or not file.is_file():
        return tuple(map(str, range(embeddings - null_class))), null_class
    content = read_json(file)
    names, has_null_class = content.get("classes") or [], content.get("null_class")
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not are_names or not isinstance(has_null_class, bool) or not names or len(names) + has_null_class != embeddings:
        raise ConfigError(f"{str(file)!r}: does not name the classes of num_class_embeds = {embeddings}; delete it")
    return tuple(names), has_null_class
