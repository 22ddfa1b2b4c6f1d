"""Images of a large folder are decoded once, and again as soon as a file has changed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_core.cache import VARIABLE
from diffusion_core.config import DataConfig
from diffusion_core.data import decoded, labelled_folder
from diffusion_core.data.datasets import DataError, Dataset, load_data


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve images of two classes, which count as many; the cache is empty."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(decoded, "FROM", 2)
    source = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(6):
            picture(source.integers(256, size=3)).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def picture(colour: np.ndarray) -> Image.Image:
    return Image.fromarray(np.broadcast_to(colour.astype(np.uint8), (8, 8, 3)).copy())


def load(folder: Path) -> Dataset:
    return load_data(DataConfig.model_validate({"name": "folder", "path": str(folder), "image_size": 8}))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    read: list[Path] = []
    real = labelled_folder.read_image

    def noting(path: Path, size: int) -> np.ndarray:
        read.append(path)
        return real(path, size)

    monkeypatch.setattr(labelled_folder, "read_image", noting)
    return read


def equal(one: Dataset, other: Dataset) -> bool:
    pairs = ((one.train, other.train), (one.val, other.val))
    return all(torch.equal(a.images_NCHW, b.images_NCHW) and torch.equal(a.labels_N, b.labels_N) for a, b in pairs)


def test_the_second_time_nothing_is_decoded(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = counted(monkeypatch)
    first = load(images)
    assert len(read) == 12
    assert equal(load(images), first)
    assert len(read) == 12


@pytest.mark.parametrize("restored", [False, True])
def test_a_changed_file_is_decoded(images: Path, restored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even one of the same length whose time of change was set back, as tools that copy files do."""
    before, file = load(images), images / "cat" / "3.png"
    found, old = file.stat(), file.read_bytes()
    picture(np.array([1, 2, 3])).save(file)
    with file.open("ab") as appended:  # Decoders ignore what follows the image.
        appended.write(b"\0" * max(0, len(old) - file.stat().st_size))
    if restored:
        os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (found.st_size, found.st_mtime_ns)
    read = counted(monkeypatch)
    after = load(images)
    assert len(read) == 12
    assert not equal(after, before)
    everything = torch.cat([after.train.images_NCHW, after.val.images_NCHW])
    assert any(image[:, 0, 0].tolist() == [1, 2, 3] for image in everything)


@pytest.mark.parametrize("damage", [b"", b"no array", b"half"])
def test_a_damaged_file_of_the_cache_is_replaced(images: Path, damage: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(images)
    (kept,) = (images.parent / "cache" / "decoded").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2] if damage == b"half" else damage)
    read = counted(monkeypatch)
    assert equal(load(images), first)
    assert len(read) == 12
    assert kept.read_bytes() == whole


def test_few_images_are_not_kept(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded, "FROM", 13)
    load(images)
    assert not (images.parent / "cache" / "decoded").exists()


@pytest.mark.parametrize("missing", [0, 1])
def test_they_are_kept_where_the_disk_has_room(
    missing: int, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However many bytes they are; the line where it has none says what to do."""
    first = load(images)
    (kept,) = (images.parent / "cache" / "decoded").iterdir()
    kept.unlink()
    size = 12 * 3 * 8 * 8
    monkeypatch.setattr(decoded, "free_bytes", lambda _: decoded.SPARE_BYTES + size - missing)
    assert equal(load(images), first)
    assert kept.exists() == (not missing)
    assert (f"set {VARIABLE} to a folder with more room" in capsys.readouterr().err) == bool(missing)


def test_a_huge_folder_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 4 GiB, of which the file holds none: a disk stores no zeros that were never written."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(decoded, "_identity", lambda *_: "huge")
    monkeypatch.setattr(decoded, "free_bytes", lambda _: 2**40)
    names, size = ["image.png"] * 6_000, 512
    shape = len(names), 3, size, size
    assert np.prod(shape) > 4 * 2**30

    def write(path: Path, _: np.ndarray) -> None:
        np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape).flush()

    monkeypatch.setattr(decoded, "_write", write)
    decodings = []

    def decode() -> np.ndarray:
        decodings.append(1)
        return np.broadcast_to(np.zeros(1, dtype=np.uint8), shape)

    for _ in range(2):
        found = decoded.decoded_once(tmp_path, names, size, decode)
        assert found.shape == shape
        assert int(found[-1].max()) == 0
    assert len(decodings) == 1


def test_processes_share_the_pages_of_the_file(images: Path) -> None:
    """And a write of one of them reaches neither the file nor another."""
    names = sorted(str(path.relative_to(images)) for path in images.rglob("*.png"))
    black = np.zeros((12, 3, 8, 8), dtype=np.uint8)
    one, other = (decoded.decoded_once(images, names, 8, lambda: black) for _ in range(2))
    assert isinstance(one, np.memmap)
    assert isinstance(other, np.memmap)
    torch.from_numpy(one)[0] = 1
    assert int(other.max()) == 0
    assert int(decoded.decoded_once(images, names, 8, lambda: black).max()) == 0


def test_an_image_that_is_missing_is_named_as_before(images: Path) -> None:
    (images / "cat" / "9.png").symlink_to("nowhere.png")
    with pytest.raises(DataError, match=r"9\.png': not a readable image"):
        load(images)


def test_a_cache_that_cannot_be_written_is_one_line(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (images.parent / "a file").write_text("")
    monkeypatch.setenv(VARIABLE, str(images.parent / "a file"))
    assert len(load(images).train) > 0
    assert capsys.readouterr().err.count("\n") == 1
