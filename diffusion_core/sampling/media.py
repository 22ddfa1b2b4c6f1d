"""Draw grids of images with a row per class, and write GIFs of sampling, with Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 2
MOST_PIXELS = 16_384
"""Most pixels of the height of a picture with a row an image. All frames of its GIF are in memory at once."""
SHOWN_SIZE = 48
"""Size in pixels below which images are enlarged by an integer factor, by repeating pixels."""

TITLES = ("noisy image", "expected image")
"""What the two sides of an animation show."""
TITLE_SIZE, BETWEEN = 12, 12

FRAME_MS = 60
LAST_FRAME_MS = 1500
GIF_FRAMES = 40
GIF_ROWS, GIF_COLUMNS = 10, 4


def image(pixels_CHW: Tensor) -> Image.Image:
    """Convert a uint8 tensor, ``(C, H, W)`` with 1 or 3 channels, to a Pillow image."""
    array = pixels_CHW.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def enlarged(pixels_CHW: Tensor) -> Image.Image:
    """Return an image, enlarged by repeating pixels if it is smaller than ``SHOWN_SIZE``."""
    height, width = pixels_CHW.shape[1:]
    factor = factor_of(height, width)
    return image(pixels_CHW).resize((width * factor, height * factor), Image.Resampling.NEAREST)


def factor_of(height: int, width: int) -> int:
    """Return the integer factor by which images of a size in pixels are enlarged."""
    return max(1, math.ceil(SHOWN_SIZE / min(height, width)))


def most_rows(size: int) -> int:
    """Return how many rows of images of a size fit in ``MOST_PIXELS``; at least 1."""
    return max(1, (MOST_PIXELS - GAP) // (size * factor_of(size, size) + GAP))


def grid(images_NCHW: Tensor, columns: int, row_names: Sequence[str] = ()) -> Image.Image:
    """Draw images in rows of ``columns``, with the names of the rows at the left.

    Args:
        images_NCHW: uint8 images, row by row; the last row may be incomplete.
        columns: images per row.
        row_names: names of the rows; empty: no names.
    """
    height, width = images_NCHW.shape[2:]
    factor = factor_of(height, width)
    cell_h, cell_w = height * factor + GAP, width * factor + GAP
    rows = math.ceil(len(images_NCHW) / columns)
    font = ImageFont.load_default(size=14)
    margin = max((math.ceil(font.getlength(name)) for name in row_names), default=-2 * GAP) + 2 * GAP
    canvas = Image.new("RGB", (margin + columns * cell_w + GAP, rows * cell_h + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for row, name in enumerate(row_names):
        draw.text((GAP, GAP + row * cell_h + cell_h // 2), name, fill="black", font=font, anchor="lm")
    for index, pixels_CHW in enumerate(images_NCHW):
        canvas.paste(enlarged(pixels_CHW), (margin + index % columns * cell_w + GAP, index // columns * cell_h + GAP))
    return canvas


def beside(low_NChw: Tensor, *columns: Tensor) -> Tensor:
    """Return small images, with repeated pixels, and the images that belong to them, in turn.

    Args:
        low_NChw: uint8 small images.
        columns: uint8 images, each ``(N, C, H, W)``.

    Returns:
        ``((1 + columns) * N, C, H, W)`` uint8 on the CPU: small image, images; next small image, ...
    """
    factor = columns[0].shape[2] // low_NChw.shape[2]
    wide_NCHW = low_NChw.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    return torch.stack([images.cpu() for images in (wide_NCHW, *columns)], dim=1).flatten(0, 1)


def animation(
    noisy: Sequence[Tensor], expected: Sequence[Tensor], columns: int, row_names: Sequence[str] = ()
) -> list[Image.Image]:
    """Draw the frames of a sampling: at the left the noisy images, at the right the images that the network expects.

    Args:
        noisy: frames of uint8 images, each ``(N, C, H, W)``, row by row.
        expected: the network's estimates of the clean images, likewise.
        columns: images per row on each side.
        row_names: names of the rows.
    """
    return [
        _side_by_side(grid(left_NCHW, columns, row_names), grid(right_NCHW, columns))
        for left_NCHW, right_NCHW in zip(noisy, expected, strict=True)
    ]


def _side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Put two grids of equal height beside each other, each below its title at its right edge."""
    font = ImageFont.load_default(size=TITLE_SIZE)
    top = math.ceil(TITLE_SIZE * 1.5)
    # A title may be wider than its grid.
    widths = [max(half.width, math.ceil(font.getlength(title)) + 2 * GAP)
              for half, title in zip((left, right), TITLES, strict=True)]  # fmt: skip
    canvas = Image.new("RGB", (sum(widths) + BETWEEN, top + left.height), "white")
    draw = ImageDraw.Draw(canvas)
    for half, title, end in zip((left, right), TITLES, (widths[0], sum(widths) + BETWEEN), strict=True):
        canvas.paste(half, (end - half.width, top))
        draw.text((end - GAP, top // 2), title, fill="black", font=font, anchor="rm")
    return canvas


def save_gif(frames: Sequence[Image.Image], path: Path) -> None:
    """Write a GIF that repeats endlessly and pauses at the last frame."""
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    # One palette for all frames, from the noise and the last frame, so that colours do not flicker.
    both = np.concatenate([np.asarray(frames[0].convert("RGB")), np.asarray(frames[-1].convert("RGB"))])
    palette = Image.fromarray(both).quantize(256)
    indexed = [frame.convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    indexed[0].save(path, save_all=True, append_images=indexed[1:], duration=durations, loop=0)


def spread(count: int, frames: int = GIF_FRAMES) -> set[int]:
    """Return at most ``frames`` of the indices 0..count-1, evenly spaced, including both ends."""
    return {round(i) for i in np.linspace(0, count - 1, min(count, frames))}
