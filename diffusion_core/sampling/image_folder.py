"""A folder of sampled images: names of its files, and a check that all images have the same settings."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_core.checkpoint import Checkpoint
from diffusion_core.config import ConfigError, CoreConfig
from diffusion_core.files import replaced_file, write_json
from diffusion_core.hardware import Precision
from diffusion_core.model.unet import NO_LABEL
from diffusion_core.sampling import media
from diffusion_core.sampling.generation import Request

SETTINGS_FILE = "samples.json"
PNG_END = b"IEND\xaeB`\x82"
"""The last bytes of each PNG file."""


def file_name(request: Request) -> str:
    """Return ``{label}-{index}.png``, or ``none-{index}.png`` for a model without labels."""
    return f"{'none' if request.label == NO_LABEL else request.label}-{request.index}.png"


def request_of(name: str) -> Request:
    """Return the request whose image has a file name, the inverse of :func:`file_name`.

    Raises:
        ValueError: if it is another name.
    """
    label, _, index = name.removesuffix(".png").partition("-")
    return Request(NO_LABEL if label == "none" else int(label), int(index))


def settings(
    mode: str, checkpoint: Checkpoint, guide: Checkpoint | None, config: CoreConfig, weights: str, precision: Precision
) -> dict[str, Any]:
    """Return everything that determines an image of a model, except its label and index, and what it upsamples."""
    ignored = {"every", "per_class", "batch_size", "cuda_graphs"}
    if config.sample.start_level is None:  # Folders of older versions do not mention it.
        ignored.add("start_level")
    upsampling = {"upsample": config.upsample.model_dump()} if config.upsample.wanted else {}
    return upsampling | {
        "mode": mode,
        "weights": checkpoint.metadata["files"][f"{weights}.safetensors"]["sha256"],
        "guide": guide and guide.metadata["files"]["ema.safetensors"]["sha256"],
        "seed": config.seed,
        "precision": precision,
        "sample": config.sample.model_dump(exclude=ignored),
    }


def check_folder(folder: Path, wanted: dict[str, Any]) -> None:
    """Create a folder for images, or accept one that holds images with the same settings.

    Raises:
        ConfigError: if it holds images with other or unknown settings, or cannot be used.
    """
    file = folder / SETTINGS_FILE
    try:
        if file.is_file():
            stored = json.loads(file.read_text(encoding="utf-8"))
            if stored in (wanted, _without_precision(wanted)):
                return
            raise ConfigError(f"--out = {str(folder)!r}: holds images of other settings; choose another folder")
        if any(folder.glob("*.png")):
            raise ConfigError(f"--out = {str(folder)!r}: holds other images already; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, wanted)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"its {SETTINGS_FILE} is damaged"
        raise ConfigError(f"--out = {str(folder)!r}: {reason}; choose another folder") from None


def _without_precision(described: Any) -> Any:
    """Return settings as earlier versions stored them."""
    if isinstance(described, list):
        return [_without_precision(one) for one in described]
    if not isinstance(described, dict):
        return described
    return {key: _without_precision(value) for key, value in described.items() if key != "precision"}


def save_png(pixels_CHW: Tensor, path: Path) -> None:
    """Write an image atomically: an existing file is always a complete image."""
    with replaced_file(path, flush=False) as temporary:
        media.image(pixels_CHW).save(temporary, format="PNG")


def is_whole_png(path: Path) -> bool:
    """Return whether a file is there and ends as a PNG does. After a power failure, it may be empty or cut off."""
    try:
        with path.open("rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:
        return False


def read_png(path: Path) -> Tensor:
    """Read an image as uint8, ``(C, H, W)``."""
    with Image.open(path) as image:
        array = torch.from_numpy(np.asarray(image).copy())
    return array[None] if array.ndim == 2 else array.permute(2, 0, 1)
