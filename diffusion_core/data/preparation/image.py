"""Prepare one image: decode, check, crop, scale, and write it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from PIL import Image

from diffusion_core.data.image_files import ImageFileError, ImageTooLarge, read_rgb, square
from diffusion_core.data.preparation.records import UNREADABLE, Job, Result, Settings
from diffusion_core.files import replaced_file

JPEG_OPTIONS = {"quality": 95, "subsampling": 0}
LONGEST_SIDE = 65_500
"""Pixels; the limit of JPEG. Without cropping, the long side of a very flat image has no other limit."""


def make_image(job: Job, *, settings: Settings, target: Path, write: bool) -> Result:
    """Prepare an image. The result depends on the job and the settings only."""
    result = Result(job.source, job.target, job.stamp)
    if job.pixels is not None:
        image = Image.fromarray(job.pixels)
    else:
        assert settings.size is not None
        assert settings.min_size is not None
        try:
            image = read_rgb(Path(settings.source) / job.source)
        except ImageTooLarge as error:
            return replace(result, dropped="too large", detail=str(error))
        except ImageFileError as error:
            return replace(result, dropped="corrupt", detail=str(error))
        except OSError as error:
            return replace(result, dropped=UNREADABLE, detail=str(error.strerror))
        shape = f"{image.width}x{image.height}"
        if min(image.size) < settings.min_size:
            return replace(result, dropped="too small", detail=f"{shape}, expected {settings.min_size} or more")
        if settings.duplicates == "drop":
            digest = hashlib.blake2b(shape.encode() + image.tobytes(), digest_size=16)
            result = replace(result, pixels=digest.hexdigest())
        if settings.crop == "center":
            image = square(image, settings.size)
        else:
            width, height = (round(side * settings.size / min(image.size)) for side in image.size)
            if max(width, height) > LONGEST_SIDE:
                return replace(result, dropped="too long", detail=f"{shape} would become {width}x{height}")
            image = image.resize((width, height), Image.Resampling.LANCZOS)
    return replace(result, bytes=save(image, target / job.target, settings.format)) if write else result


def save(image: Image.Image, path: Path, kind: str) -> int:
    """Write an image atomically; returns the size of the file in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path, flush=False) as temporary:
        image.save(temporary, format=kind, **(JPEG_OPTIONS if kind == "jpeg" else {}))
        return temporary.stat().st_size
