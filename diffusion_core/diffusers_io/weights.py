"""Find and read the weights of a Diffusers model: one file or shards, safetensors or pickled tensors, any precision."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffusion_core.config import ConfigError
from diffusion_core.diffusers_io.names import modern_tensors
from diffusion_core.diffusers_io.values import errors_of, read_json
from diffusion_core.files import first_not_finite
from diffusion_core.messages import one_line

STEM = "diffusion_pytorch_model"
VARIANTS = ("", ".fp16", ".bf16")
"""Parts of file names by precision; float32 first. Other variants hold other weights, such as those without EMA."""

WEIGHTS_FILES = tuple(f"{STEM}{variant}{ending}" for variant in VARIANTS for ending in (".safetensors", ".bin"))
"""Names of a single file, in the order of preference. A file in shards has an index of the same name and ``.index``."""

UNREADABLE = (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError)
"""Errors that safetensors and torch raise for damaged files."""


def with_shards(name: str) -> list[str]:
    """Return patterns of a file of weights: its name, those of its index, and those of its shards.

    Diffusers has changed where the variant stands in the names of indices and shards.
    """
    stem, variant, ending = _parts(name)
    return [
        name,
        f"{stem}{variant}.{ending}.index.json",
        f"{stem}{variant}-*-of-*.{ending}",
        *([f"{stem}.{ending}.index{variant}.json", f"{stem}-*-of-*{variant}.{ending}"] if variant else []),
    ]


def _parts(name: str) -> tuple[str, str, str]:
    """Return the stem, the variant with its dot, and the ending of a name in ``WEIGHTS_FILES``."""
    stem, *variant, ending = name.split(".")
    return stem, "".join(f".{word}" for word in variant), ending


def weights_of(folder: Path) -> Path | None:
    """Return the file of weights in a folder, or the index of its shards; None without."""
    for name in WEIGHTS_FILES:
        for candidate in with_shards(name):
            if "*" not in candidate and (folder / candidate).is_file():
                return folder / candidate
    return None


def read_weights(folder: Path, notes: list[str]) -> dict[str, Tensor]:
    """Read the weights of a UNet2DModel, in float32 and under current names, without running code of the file.

    Raises:
        ConfigError: if there are none, they are damaged or incomplete, or hold something else.
    """
    file = weights_of(folder)
    if file is None:
        others = sorted(path.name for path in folder.glob(f"{STEM}*"))
        found = f"; found {', '.join(others)[:200]}" if others else ""
        raise ConfigError(f"{str(folder)!r}: no weights here (expected {' or '.join(WEIGHTS_FILES[:2])}{found})")
    with errors_of(file):
        tensors = _read_shards(file) if file.suffix == ".json" else _read_file(file)
        modern = modern_tensors(tensors)
    kinds = sorted({str(tensor.dtype) for tensor in modern.values()} - {"torch.float32"})
    if kinds:
        notes.append(f"weights of type {', '.join(kinds)} become torch.float32")
    return {name: tensor.float().contiguous() for name, tensor in modern.items()}


def _read_file(file: Path) -> dict[str, Tensor]:
    """Read one file of tensors by name."""
    try:
        safe = file.suffix == ".safetensors"
        tensors = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ConfigError(f"cannot be read as weights: {one_line(error)}") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ConfigError("cannot be read as weights: expected tensors by name")
    if bad := first_not_finite(tensors):
        raise ConfigError(f"{bad!r} holds values that are not finite; take another model")
    return tensors


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Read the files that an index names, and check that they hold what it says."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise ConfigError("expected weight_map, the file of each weight")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        # An index must not point out of its folder.
        if Path(name).name != name or Path(name).suffix not in (".safetensors", ".bin"):
            raise ConfigError(f"weight_map names {name!r}; expected names of .safetensors or .bin files in this folder")
        if not (index.parent / name).is_file():
            raise ConfigError(f"the shard {name!r} is missing; download it too")
        with errors_of(Path(name)):
            tensors |= _read_file(index.parent / name)
    if missing := sorted(set(places) - set(tensors)):
        raise ConfigError(f"{missing[0]!r} is in no shard ({len(missing)} are missing)")
    return tensors
