"""Pictures, read back with Pillow."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from diffusion_core.sampling import media


def flat_images(count: int, size: int = 8, channels: int = 1) -> Tensor:
    """Images of one brightness each, none of them white, black or the same."""
    levels = (torch.arange(count) * 7 % 180 + 40).to(torch.uint8)
    return levels.view(-1, 1, 1, 1).expand(count, channels, size, size).clone()


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    ("size", "channels", "count", "columns", "shown"),
    [(8, 1, 12, 4, 48), (8, 1, 10, 4, 48), (32, 3, 6, 3, 64), (28, 1, 3, 1, 56), (64, 3, 4, 2, 64), (5, 3, 1, 1, 50)],
)
def test_grid_geometry(tmp_path: Path, size: int, channels: int, count: int, columns: int, shown: int) -> None:
    """Every image stands where it should, in one piece, with gaps around it and white where there is none."""
    images = flat_images(count, size, channels)
    path = tmp_path / "grid.png"
    media.grid(images, columns).save(path)
    found = pixels(path)
    gap, rows = media.GAP, -(-count // columns)
    assert found.shape == (rows * (shown + gap) + gap, columns * (shown + gap) + gap, 3)
    expected = np.full_like(found, 255)
    for i in range(count):
        top, left = gap + i // columns * (shown + gap), gap + i % columns * (shown + gap)
        expected[top : top + shown, left : left + shown] = int(images[i, 0, 0, 0])
    np.testing.assert_array_equal(found, expected)


def test_grid_enlarges_pixel_by_pixel_and_keeps_colours() -> None:
    image = torch.randint(0, 256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = np.asarray(media.grid(image, 1))[media.GAP : -media.GAP, media.GAP : -media.GAP]
    expected = image[0].permute(1, 2, 0).numpy().repeat(3, 0).repeat(3, 1)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "names", [["0", "1", "2"], ["airplane", "", "a class of a rather long name"], ["å", "猫", "x"]]
)
def test_row_names_do_not_overlap_images(names: list[str]) -> None:
    images = flat_images(6)
    plain, named = np.asarray(media.grid(images, 2)), np.asarray(media.grid(images, 2, names))
    assert named.shape[0] == plain.shape[0]
    margin = named.shape[1] - plain.shape[1]
    np.testing.assert_array_equal(named[:, margin:], plain)  # All images, untouched.
    for row, name in enumerate(names):
        label = named[row * 50 : (row + 1) * 50, :margin]
        assert (label < 128).any() == bool(name)  # Each name stands in its own row.
        assert (label[:2] == 255).all()
        assert (label[:, :1] == 255).all()


def frames(count: int) -> list[Image.Image]:
    source = np.random.default_rng(0)
    return [
        media.grid(torch.from_numpy(source.integers(0, 256, (4, 1, 8, 8), np.uint8)), 2, ["a", "b"])
        for _ in range(count)
    ]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_gif(tmp_path: Path, count: int) -> None:
    path = tmp_path / "diffusion.gif"
    written = frames(count)
    media.save_gif(written, path)
    with Image.open(path) as gif:
        assert gif.format == "GIF"
        assert gif.size == written[0].size
        assert getattr(gif, "n_frames", 1) == count
        assert gif.info["loop"] == 0 or count == 1  # For ever.
        durations = []
        for index in range(count):
            gif.seek(index)
            durations.append(gif.info.get("duration"))
            difference = np.asarray(gif.convert("RGB")).astype(int) - np.asarray(written[index])
            assert np.abs(difference).max() <= 16  # 256 colours for gray levels of all frames.
    if count > 1:
        assert durations == [60] * (count - 1) + [1500]


def test_gif_of_colours_keeps_the_last_frame_recognisable(tmp_path: Path) -> None:
    source = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (1, 3, 32, 32), generator=source, dtype=torch.uint8)
    picture = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    picture[:, 0, :, :16] = 220
    picture[:, 2, :, 16:] = 180
    media.save_gif([media.grid(noise, 1), media.grid(picture, 1)], tmp_path / "two.gif")
    with Image.open(tmp_path / "two.gif") as gif:
        gif.seek(1)
        found = np.asarray(gif.convert("RGB")).astype(int)
    assert np.abs(found[30, 10] - [220, 0, 0]).max() < 30
    assert np.abs(found[30, 60] - [0, 0, 180]).max() < 30


@given(count=st.integers(1, 2000), limit=st.integers(2, 60))
def test_spread(count: int, limit: int) -> None:
    chosen = media.spread(count, limit)
    assert len(chosen) == min(count, limit)
    assert {0, count - 1} <= chosen
    assert chosen <= set(range(count))
    ordered = sorted(chosen)
    gaps = [b - a for a, b in itertools.pairwise(ordered)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_image() -> None:
    gray = media.image(torch.full((1, 3, 5), 9, dtype=torch.uint8))
    colour = media.image(torch.full((3, 3, 5), 9, dtype=torch.uint8))
    assert (gray.mode, gray.size, colour.mode, colour.size) == ("L", (5, 3), "RGB", (5, 3))


def test_animation_has_the_noisy_grid_at_the_left_and_the_expected_one_at_the_right() -> None:
    noisy, expected = [flat_images(6), flat_images(6) + 20], [flat_images(6) + 40, flat_images(6) + 60]
    names = ["a", "b", "c"]
    drawn = media.animation(noisy, expected, 2, names)
    assert len(drawn) == 2
    for frame, left, right in zip(drawn, noisy, expected, strict=True):
        found = np.asarray(frame)
        one, other = (np.asarray(half) for half in (media.grid(left, 2, names), media.grid(right, 2)))
        height = one.shape[0]
        top = found.shape[0] - height
        assert (found[:top] < 128).any()  # The titles.
        ends = [found.shape[1] - other.shape[1], found.shape[1]]
        np.testing.assert_array_equal(found[top:, ends[0] : ends[1]], other)
        (start,) = [x for x in range(80) if np.array_equal(found[top:, x : x + one.shape[1]], one)]
        assert start + one.shape[1] + media.BETWEEN == ends[0]
        assert (found[top:, start + one.shape[1] : ends[0]] == 255).all()


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_titles_of_an_animation_fit(columns: int) -> None:
    images = [flat_images(4)]
    found = np.asarray(media.animation(images, images, columns)[0])
    for half in (found[:18, : found.shape[1] // 2], found[:18, found.shape[1] // 2 :]):
        assert (half < 128).any()
    assert (found[:18, :1] == 255).all()
    assert (found[:18, -1:] == 255).all()
