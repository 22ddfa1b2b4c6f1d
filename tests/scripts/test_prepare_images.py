"""scripts/prepare_images.py, run as users run it: real files, processes and signals."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import CIFAR, gradient, random_images, write, write_cifar, write_mnist
from PIL import Image
from prepare_images import main

from diffusion_core.config import DataConfig
from diffusion_core.data.datasets import load_data
from diffusion_core.data.preparation import DATA_SETS, REPORT_FILE
from diffusion_core.data.preparation import image as making
from diffusion_core.data.preparation.records import Job, Result
from diffusion_core.data.preparation.target import JOURNAL_FILE, SETTINGS_FILE, still_valid
from diffusion_core.registries import DATASETS
from diffusion_core.terminal import progress

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "scripts" / "prepare_images.py")]


def prepare(source: Path | str, target: Path, *options: str, size: int | None = 8, workers: int = 1) -> int:
    """Call the script in this process (its workers are others); returns its exit status."""
    sizes = [] if size is None else ["--size", str(size)]
    return main([str(source), str(target), f"--workers={workers}", *sizes, *options])


def report(target: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((target / REPORT_FILE).read_text())
    return content


def dropped(target: Path) -> dict[str, str]:
    return {entry["image"]: entry["reason"] for entry in report(target)["images_dropped"]}


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too, and (as empty) all folders."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def images(folder: Path) -> list[str]:
    return [name for name in tree(folder) if name.endswith((".png", ".jpg")) and (folder / name).is_file()]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def refused(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The line that a wrong call prints."""
    capfd.readouterr()
    status: object
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as leaving:  # By the parser.
        status = leaving.code
    assert status == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 10^10 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def noise(seed: int, width: int = 12, height: int = 10) -> np.ndarray:
    return random_images(height, width, 3, seed=seed)


def mixed_folder(root: Path) -> Path:
    """Images and everything that can be wrong with one."""
    for split, count in (("train", 4), ("test", 2)):
        for label in ("cat", "dog"):
            for i in range(count):
                write(root / split / label / f"{i}.png", gradient(12 + i, 10, seed=i + len(label + split)))
    write(root / "train" / "cat" / "indoors" / "2020" / "deep.jpg", gradient(20, 30))
    write(root / "train" / "cat" / "small.png", gradient(40, 7))
    (root / "train" / "dog" / "text.png").write_text("not an image")
    (root / "train" / "dog" / "empty.jpg").touch()
    whole = io.BytesIO()
    Image.fromarray(noise(0, 64, 64)).save(whole, "JPEG")
    (root / "train" / "dog" / "cut.jpg").write_bytes(whole.getvalue()[:2000])
    (root / "train" / "dog" / "bomb.png").write_bytes(bomb())
    (root / "train" / "dog" / "notes.txt").write_text("not an image by its name")
    (root / "train" / "dog" / "README").touch()
    (root / "train" / "dog" / ".hidden.png").touch()
    write(root / ".thumbnails" / "0.png", gradient())
    return root


# What becomes of a tree.


def test_a_tree_keeps_its_shape_and_loses_what_is_no_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    source, target = mixed_folder(tmp_path / "source"), tmp_path / "a" / "target"
    before = tree(source)
    assert prepare(source, target) == 0
    assert tree(source) == before
    kept = {f"{split}/{label}/{i}.png" for split, n in (("train", 4), ("test", 2)) for label in ("cat", "dog")
            for i in range(n)}  # fmt: skip
    assert set(images(target)) == kept | {"train/cat/indoors/2020/deep.png"}
    assert all(pixels(target / name).shape == (8, 8, 3) for name in images(target))
    assert dropped(target) == {
        "train/cat/small.png": "too small",
        "train/dog/bomb.png": "too large",
        "train/dog/cut.jpg": "corrupt",
        "train/dog/empty.jpg": "corrupt",
        "train/dog/text.png": "corrupt",
    }
    content = report(target)
    assert (content["found"], content["kept"]) == (18, 13)
    assert content["dropped"] == {"corrupt": 3, "too large": 1, "too small": 1}
    assert content["ignored"] == {".txt": 1, "hidden": 2, "without a suffix": 1}
    assert content["classes"] == {"test/cat": 2, "test/dog": 2, "train/cat": 5, "train/dog": 4}
    assert content["notes"] == ["passed over: 2 hidden, 1 .txt, 1 without a suffix"]
    assert content["refused_by_training"] is None
    details = {entry["image"]: entry["detail"] for entry in content["images_dropped"]}
    assert details["train/cat/small.png"] == "40x7, expected 8 or more"
    assert "truncated" in details["train/dog/cut.jpg"]
    assert details["train/dog/text.png"] == "no known image format"

    out, err = capsys.readouterr()
    assert "18 images: 13 kept, 5 dropped\n" in out
    for words in ("3 corrupt", "1 too small", "train/dog/cut.jpg: ", "2 hidden", str(target / REPORT_FILE)):
        assert words in out, words
    assert re.search(r"^preparing: 18 of 18 images, \S+ a second$", err, re.MULTILINE)

    data = load_data(DataConfig(name="folder", path=str(target), image_size=8))
    assert data.class_names == ("cat", "dog")
    assert data.train.labels_N.tolist() == [0] * 5 + [1] * 4
    assert data.val.labels_N.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(data.val.images_NCHW[3].permute(1, 2, 0), pixels(target / "test/dog/1.png"))


def test_the_result_is_what_training_would_make_of_the_source(tmp_path: Path) -> None:
    for i in range(6):
        write(tmp_path / "source" / f"class {i % 2}" / f"{i}.png", noise(i, 30 + i, 25))
    assert prepare(tmp_path / "source", tmp_path / "target", size=16) == 0
    raw, prepared = (
        load_data(DataConfig(name="folder", path=str(tmp_path / name), image_size=16)) for name in ("source", "target")
    )
    assert torch.equal(raw.train.images_NCHW, prepared.train.images_NCHW)
    assert torch.equal(raw.train.labels_N, prepared.train.labels_N)


def test_every_kind_of_image_becomes_upright_rgb_on_white(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    colour = gradient()
    gray = colour[..., 0]
    half = np.dstack([colour, np.where(np.arange(8) < 4, 0, 255)[None].repeat(8, 0).astype(np.uint8)])
    half[:, :4, :3] = 30  # What a transparent pixel would be if it were not.
    on_white = np.where(half[..., 3:] == 0, 255, colour)
    cases: dict[str, tuple[Any, dict[str, Any], np.ndarray, int]] = {
        "rgba.png": (half, {}, on_white, 0),
        "rgba.webp": (half, {"lossless": True}, on_white, 0),
        "gray.png": (gray, {}, np.dstack([gray] * 3), 0),
        "gray16.png": ((gray.astype(np.uint16) << 8) + 77, {}, np.dstack([gray] * 3), 0),
        "gray16.tif": ((gray.astype(np.uint16) << 8) + 77, {}, np.dstack([gray] * 3), 0),
        "palette.png": (Image.fromarray(colour).quantize(256), {}, colour, 0),
        "cmyk.jpg": (Image.fromarray(colour).convert("CMYK"), {"quality": 100}, colour, 8),
        "bits.bmp": (Image.fromarray(gray > 90), {}, np.dstack([np.where(gray > 90, 255, 0)] * 3), 0),
    }
    see_through = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8), "P")
    see_through.putpalette([value for i in range(256) for value in (i, 2 * i % 256, 9)])
    palette = np.array([(i, 2 * i, 9) for i in range(64)]).reshape(8, 8, 3)
    palette[0, 5] = 255
    cases["see through.gif"] = (see_through, {"transparency": 5}, palette, 0)
    frames = [Image.new("RGB", (8, 8), name) for name in ("red", "lime", "blue")]
    animation = {"save_all": True, "append_images": frames[1:], "duration": 50}
    cases["animated.gif"] = (frames[0], animation, np.full((8, 8, 3), (255, 0, 0)), 0)
    cases["animated.webp"] = (frames[0], animation | {"lossless": True}, np.full((8, 8, 3), (255, 0, 0)), 0)
    # What a camera writes that is held as the tag says; the pixels are turned the other way round.
    turns = {3: 2, 6: 1, 8: 3}
    for tag, quarters in turns.items():
        exif = Image.Exif()
        exif[0x0112] = tag
        turned = Image.fromarray(np.rot90(colour, quarters).copy())
        for suffix, options, tolerance in ((".jpg", {"quality": 100, "subsampling": 0}, 4), (".png", {}, 0)):
            cases[f"turned{tag}{suffix}"] = (turned, {"exif": exif} | options, colour, tolerance)
    cases["damaged exif.png"] = (colour, {"exif": b"Exif\0\0no such thing"}, colour, 0)
    write(source / "x" / "float.tif", np.zeros((8, 8), np.float32))
    write(source / "x" / "postscript.png", colour, format="EPS")
    for i, (name, (picture, options, _, _)) in enumerate(cases.items()):
        write(source / f"{i:02d}" / name, picture, **options)
    assert prepare(source, target) == 0
    # Nobody knows the range of the one, and the other is a program.
    assert dropped(target) == {"x/float.tif": "corrupt", "x/postscript.png": "corrupt"}
    assert report(target)["images_dropped"][1]["detail"] == "PostScript"
    for i, (name, (_, _, expected, tolerance)) in enumerate(cases.items()):
        found = pixels(target / f"{i:02d}" / f"{Path(name).stem}.png")
        assert np.abs(found.astype(int) - expected).max() <= tolerance, name


def test_metadata_stay_behind(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "where it was taken"
    write(tmp_path / "s" / "a" / "0.jpg", gradient(), exif=exif, comment=b"who took it", icc_profile=b"some profile")
    for kind, name in (("png", "0.png"), ("jpeg", "0.jpg")):
        assert prepare(tmp_path / "s", tmp_path / kind, f"--format={kind}") == 0
        written = (tmp_path / kind / "a" / name).read_bytes()
        for secret in (b"taken", b"took", b"profile"):
            assert secret not in written


def test_jpeg_and_uncropped(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    write(source / "a" / "wide.png", gradient(64, 32))
    write(source / "a" / "tall.bmp", gradient(20, 50))
    write(source / "a" / "line.png", np.zeros((1, 20_000, 3), np.uint8))
    assert prepare(source, target, "--crop=none", "--format=jpeg", "--min-size=1", size=16) == 0
    assert images(target) == ["a/tall.jpg", "a/wide.jpg"]
    assert pixels(target / "a" / "wide.jpg").shape == (16, 32, 3)
    assert pixels(target / "a" / "tall.jpg").shape == (40, 16, 3)
    assert np.abs(pixels(target / "a" / "wide.jpg").astype(int) - gradient(32, 16)).max() < 8
    assert dropped(target) == {"a/line.png": "too long"}
    with Image.open(target / "a" / "wide.jpg") as image:
        assert image.format == "JPEG"


def test_min_size(tmp_path: Path) -> None:
    for side in (7, 8, 15, 16):
        write(tmp_path / "s" / "a" / f"{side}.png", gradient(30, side))
    for least, kept in ((None, ["16"]), (8, ["15", "16", "8"]), (1, ["15", "16", "7", "8"])):
        target = tmp_path / f"at least {least}"
        assert prepare(tmp_path / "s", target, *([f"--min-size={least}"] if least else []), size=16) == 0
        assert images(target) == [f"a/{name}.png" for name in kept]
        assert {pixels(target / name).shape for name in images(target)} == {(16, 16, 3)}


def test_names_that_collide(tmp_path: Path) -> None:
    names = ["a.jpg", "a.png", "A.bmp", "a.jpg.gif", "b.png", "c.d.png", "é.png", "e.png/x.png", "e.jpg"]
    names.append("a" * 251 + ".png")  # As long as a name can be.
    for i, name in enumerate(names):
        write(tmp_path / "s" / "k" / name, np.full((8, 8, 3), 20 * i, np.uint8))
    assert prepare(tmp_path / "s", tmp_path / "t") == 0
    found = {name: int(pixels(tmp_path / "t" / name).mean().round()) // 20 for name in images(tmp_path / "t")}
    assert len({name.casefold() for name in found}) == len(names)
    assert sorted(found.values()) == list(range(len(names)))
    assert found["k/a.jpg-2.png"] == 0  # a.jpg.png belongs to a.jpg.gif.
    assert found["k/a.png.png"] == 1
    assert found["k/A.bmp.png"] == 2
    assert found["k/a.jpg.png"] == 3
    assert found["k/b.png"] == 4
    assert found["k/c.d.png"] == 5
    assert found["k/e.jpg.png"] == 8  # e.png is a folder.


def test_names_of_any_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "s" / "k"
    write(folder / "line\nbreak.png", gradient())
    os.rename(folder / "line\nbreak.png", os.fsencode(folder) + b"/\xff\n.png")
    (folder / "broken\n.png").write_text("x")
    done = subprocess.run([*COMMAND, tmp_path / "s", tmp_path / "t", "--size=8"], capture_output=True, timeout=60,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"broken\\n.png" in done.stdout
    assert os.listdir(os.fsencode(tmp_path / "t" / "k")) == [b"\xff\n.png"]


def test_links(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write(tmp_path / "elsewhere" / "far.png", gradient())
    write(source / "a" / "near.png", gradient())
    (source / "a" / "circle").symlink_to(source)
    (source / "b").symlink_to(tmp_path / "elsewhere")
    (source / "a" / "file.png").symlink_to(tmp_path / "elsewhere" / "far.png")
    (source / "a" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(source / "a" / "pipe.png")
    assert prepare(source, tmp_path / "target") == 0
    assert images(tmp_path / "target") == ["a/file.png", "a/near.png", "b/far.png"]
    assert dropped(tmp_path / "target") == {"a/broken.png": "unreadable"}
    assert report(tmp_path / "target")["ignored"] == {"link to a folder above it": 1, ".png": 1}
    assert "link to a folder above it" in report(tmp_path / "target")["notes"][0]
    write(tmp_path / "nowhere.png", gradient())
    assert prepare(source, tmp_path / "target") == 0
    assert dropped(tmp_path / "target") == {}


def test_what_training_would_stumble_over_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "s" / "loose.png", gradient())
    write(tmp_path / "s" / "a" / "0.png", gradient())
    write(tmp_path / "s" / "b" / "0.png", gradient(4, 4))
    assert prepare(tmp_path / "s", tmp_path / "t") == 0
    assert images(tmp_path / "t") == ["a/0.png"]
    assert not (tmp_path / "t" / "b").exists()
    loose, lost = report(tmp_path / "t")["notes"]
    assert loose == "1 image in no class folder: loose.png"
    assert "'b'" in lost
    out = capsys.readouterr().out
    assert "to train:" not in out.replace("not ready to train:", "")
    assert "not ready to train: class 'a' has 1 image; expected at least 2" in out


def test_duplicates(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    picture = noise(1)
    write(source / "a" / "first.png", picture)
    write(source / "a" / "second.bmp", picture)  # Another file, the same pixels.
    write(source / "b" / "third.png", picture)
    write(source / "b" / "turned.png", picture.reshape(12, 10, 3))  # The same bytes in another shape.
    write(source / "c" / "other.png", noise(2))
    assert prepare(source, tmp_path / "all") == 0
    assert len(images(tmp_path / "all")) == 5
    assert prepare(source, target, "--duplicates=drop") == 0
    assert images(target) == ["a/first.png", "b/turned.png", "c/other.png"]
    assert dropped(target) == {"a/second.bmp": "duplicate", "b/third.png": "duplicate"}
    assert report(target)["images_dropped"][0]["detail"] == "of a/first.png"
    # The next one takes the place of the first where that goes, and a folder does not stay behind empty.
    (source / "a" / "first.png").unlink()
    (source / "a" / "second.bmp").unlink()
    assert prepare(source, target, "--duplicates=drop") == 0
    assert images(target) == ["b/third.png", "b/turned.png", "c/other.png"]
    assert not (target / "a").exists()
    assert dropped(target) == {}


# Running it again.


def test_the_result_does_not_depend_on_workers_or_file_order(tmp_path: Path) -> None:
    source = mixed_folder(tmp_path / "source")
    assert prepare(source, tmp_path / "one", "--duplicates=drop", workers=1) == 0
    assert prepare(source, tmp_path / "five", "--duplicates=drop", workers=5) == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "five")
    files = [path for path in source.rglob("*") if path.is_file()]
    for path in random.Random(0).sample(files, len(files)):  # Made anew, in another order.
        content, status = path.read_bytes(), path.stat()
        path.unlink()
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert prepare(source, tmp_path / "again", "--duplicates=drop", workers=2) == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "again")


def test_run_again_nothing_is_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = mixed_folder(tmp_path / "source"), tmp_path / "target"
    write(source / "train" / "cat" / "same.png", gradient(12, 10, seed=8))
    write(source / "train" / "cat" / "same2.png", gradient(12, 10, seed=8))
    options = ["--duplicates=drop"]
    assert prepare(source, target, *options) == 0
    before = tree(target), {path: path.stat().st_mtime_ns for path in target.rglob("*.png")}
    capsys.readouterr()
    assert prepare(source, target, *options) == 0
    assert (tree(target), {path: path.stat().st_mtime_ns for path in target.rglob("*.png")}) == before
    out, err = capsys.readouterr()
    assert "(20 of them done by an earlier call)" in out
    assert "preparing" not in err
    # What is lost or cut short is made again, and so is what the journal's end, cut by a crash, would have named.
    (target / "train/cat/0.png").unlink()
    (target / "train/cat/1.png").write_bytes(b"")
    with (target / JOURNAL_FILE).open("r+") as journal:
        journal.truncate((target / JOURNAL_FILE).stat().st_size - 20)
    assert prepare(source, target, *options) == 0
    assert tree(target) == before[0]
    assert "(17 of them done by an earlier call)" in capsys.readouterr().out


def test_the_target_follows_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for i in range(4):
        write(source / "a" / f"{i}.png", noise(i))
    write(source / "b" / "gone.png", noise(9))
    assert prepare(source, target) == 0
    write(source / "a" / "0.png", noise(10))  # Changed.
    write(source / "a" / "1.jpg", noise(11))  # Shares a name from now on.
    (source / "a" / "2.png").write_text("damaged since")
    (source / "b" / "gone.png").unlink()
    write(source / "c" / "new.png", noise(12))
    capsys.readouterr()
    assert prepare(source, target) == 0
    assert images(target) == ["a/0.png", "a/1.jpg.png", "a/1.png.png", "a/3.png", "c/new.png"]
    assert "removed 3 images" in capsys.readouterr().out
    assert prepare(source, tmp_path / "fresh") == 0
    assert tree(target) == tree(tmp_path / "fresh")
    # A disk that is not mounted is no reason to remove everything.
    for path in [*source.rglob("*.png"), *source.rglob("*.jpg")]:
        path.unlink()
    assert prepare(source, target) == 1
    assert tree(target) == tree(tmp_path / "fresh")


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = mixed_folder(tmp_path / "source"), tmp_path / "target"
    assert prepare(source, target, "--dry-run") == 0
    assert not target.exists()
    out = capsys.readouterr().out
    assert "18 images: 13 would be kept, 5 would be dropped" in out
    assert "train/dog/cut.jpg: " in out
    assert prepare(source, target) == 0
    before = tree(target)
    write(source / "test" / "dog" / "new.png", gradient())
    capsys.readouterr()
    assert prepare(source, target, "--dry-run") == 0
    assert tree(target) == before
    assert "19 images: 14 would be kept, 5 would be dropped (18 of them done by an earlier call)" in (
        capsys.readouterr().out
    )


# Stopping it.


def test_an_image_appears_in_one_piece(tmp_path: Path) -> None:
    class Cut(Image.Image):
        def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
            Path(fp).write_bytes(b"half of")
            raise OSError(28, "No space left on device")

    path = tmp_path / "a" / "0.png"
    with pytest.raises(OSError, match="No space left"):
        making.save(Cut(), path, "png")
    assert not images(tmp_path)
    assert making.save(Image.new("RGB", (8, 8)), path, "png") == path.stat().st_size
    assert list(path.parent.iterdir()) == [path]


def test_what_could_not_be_read_is_tried_again() -> None:
    """A disk's fault or a missing permission goes away without a change of the file."""
    job = Job("a/0.jpg", "a/0.png", "9-9")
    for reason, kept in (("unreadable", False), ("corrupt", True)):
        assert bool(still_valid([job], [Result(*job[:3], dropped=reason)], Path("nowhere"))) == kept


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Images that take some seconds to prepare, and what an unbroken call makes of them."""
    folder = tmp_path_factory.mktemp("many")
    files = []
    for seed in range(5):
        packed = io.BytesIO()
        Image.fromarray(noise(seed, 500, 400)).save(packed, "JPEG", quality=90)
        files.append(packed.getvalue())
    for i in range(140):
        path = folder / "source" / f"class {i % 3}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[i % 5] + bytes([i]))  # Trailing bytes: other files, equal pixels.
    assert prepare(folder / "source", folder / "whole", "--crop=none", size=128, workers=2) == 0
    return folder / "source", tree(folder / "whole")


def start(source: Path, target: Path) -> subprocess.Popen[str]:
    command = [*COMMAND, str(source), str(target), "--crop=none", "--size=128", "--workers=2"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip


def wait_for_images(target: Path, process: subprocess.Popen[str], count: int) -> None:
    deadline = time.monotonic() + 60
    while sum(1 for _ in target.rglob("*.png")) < count:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT to all", "SIGKILL", "SIGKILL to a worker"])
def test_interrupted_and_run_again(how: str, many: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    """To all: as a terminal sends Ctrl-C, and a batch system its signals, to the whole process group."""
    source, whole = many
    target = tmp_path / "target"
    number = signal.Signals[how.split()[0]]
    process = start(source, target)
    wait_for_images(target, process, 25)
    if how.endswith("worker"):
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not workers.is_file():
            process.kill()
            pytest.skip("this system does not list a process's children")
        os.kill(int(workers.read_text().split()[0]), number)
    else:
        (os.killpg if how.endswith("all") else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=60)  # Returns once the workers have closed the output too.
    status, words = {
        "SIGKILL": (-number, ""),
        "SIGKILL to a worker": (2, "error: --workers = 2: a worker was killed"),
    }.get(how, (128 + number, "stopped; run the same command again to continue"))
    assert (process.returncode, out) == (status, ""), err
    assert words in err
    assert "Traceback" not in err
    assert 0 < len(images(target)) < 140
    early = {path: path.stat().st_mtime_ns for path in target.rglob("*.png")}
    journal = len((target / JOURNAL_FILE).read_text().splitlines())
    if number != signal.SIGKILL:
        with pytest.raises(ProcessLookupError):  # No process of the group is left.
            os.killpg(process.pid, 0)
        assert journal
        assert not (target / REPORT_FILE).exists()

    assert prepare(source, target, "--crop=none", size=128, workers=2) == 0
    assert tree(target) == whole
    kept = sum(path.stat().st_mtime_ns == before for path, before in early.items())
    assert kept >= journal - 1  # Finished images are not prepared again; a kill may cut the last line.


# Data sets in torchvision's formats.


def test_data_set_names_match_the_loader() -> None:
    assert set(DATA_SETS) == {name for name, record in DATASETS.items() if record.path == "cache"}


@pytest.mark.parametrize("name", CIFAR)
def test_cifar(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, files = ["ape", "bee", "cow"], len(CIFAR[name][4]) + 1
    *train, test = write_cifar(name, tmp_path / "root", names, lambda _: [0, 1, 2, 1], monkeypatch)
    target = tmp_path / "target"
    assert prepare(name, target, f"--root={tmp_path / 'root'}", size=None, workers=2) == 0
    assert len(images(target)) == 4 * files
    assert [path for path in images(target) if path.startswith("test")] == [
        "test/ape/00000.png", "test/bee/00001.png", "test/bee/00003.png", "test/cow/00002.png"
    ]  # fmt: skip
    for split, arrays in (("train", np.concatenate(train)), ("test", test)):
        for i, array in enumerate(arrays):
            path = target / split / ["ape", "bee", "cow", "bee"][i % 4] / f"{i:05d}.png"
            np.testing.assert_array_equal(pixels(path), array.transpose(1, 2, 0))
    before = tree(target)
    (target / "train" / "ape" / "00000.png").unlink()
    assert prepare(name, target, f"--root={tmp_path / 'root'}", size=None) == 0
    assert tree(target) == before
    data = load_data(DataConfig(name="folder", path=str(target)))
    assert data.class_names == ("ape", "bee", "cow")
    assert len(data.train) == 4 * (files - 1)
    assert len(data.val) == 4


@pytest.mark.parametrize(
    ("name", "folder", "label", "class_name"),
    [("mnist", "MNIST", 3, "3 - three"), ("fashion_mnist", "FashionMNIST", 0, "T-shirt-top")],
)
def test_mnist(
    name: str, folder: str, label: int, class_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images_of, _ = write_mnist(tmp_path / "root" / folder, {"train": 20, "t10k": 10})["train"]
    target = tmp_path / "target"
    assert prepare(name, target, f"--root={tmp_path / 'root'}", size=None) == 0
    assert f"--data.path={target} --data.image_size=28" in capsys.readouterr().out
    for number in (label, label + 10):
        with Image.open(target / "train" / class_name / f"{number:05d}.png") as image:
            assert image.mode == "L"
            np.testing.assert_array_equal(np.asarray(image), images_of[number])
    data = load_data(DataConfig(name="folder", path=str(target), image_size=28))
    assert data.train.labels_N.bincount().tolist() == [2] * 10
    assert data.val.labels_N.bincount().tolist() == [1] * 10
    assert class_name in data.class_names


def test_a_data_set_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    message = refused(capfd, "mnist", tmp_path / "t", "--root", tmp_path / "nothing")
    assert "SOURCE = 'mnist'" in message
    assert "put torchvision's files there" in message
    assert not (tmp_path / "t").exists()


# What is refused.


def test_wrong_calls(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "s" / "a" / "0.png", gradient())
    source, target = tmp_path / "s", tmp_path / "t"
    (tmp_path / "file").write_text("x")
    before = tree(tmp_path)
    size = "--size=8"
    for arguments, words in [
        ((source,), ["TARGET", "--help"]),
        ((source, target, size, "--sise=9"), ["--sise=9", "--help"]),
        ((source, target), ["--size: is missing", "--size 64"]),
        ((source, target, "--size=0"), ["--size = '0'", "from 4 to 1024"]),
        ((source, target, "--size=64.0"), ["--size = '64.0'", "integer"]),
        ((source, target, "--size=²"), ["--size", "integer"]),
        ((source, target, size, "--min-size=-3"), ["--min-size = '-3'", "from 1"]),
        ((source, target, size, "--crop=middle"), ["--crop = 'middle'", "center or none"]),
        ((source, target, size, "--format=jpg"), ["--format = 'jpg'", "png or jpeg"]),
        ((source, target, size, "--duplicates=yes"), ["--duplicates = 'yes'", "keep or drop"]),
        ((source, target, size, "--workers=0"), ["--workers = '0'", "from 1"]),
        ((source, target, size, "--root=x"), ["--root = 'x'", "cifar10", "leave it out"]),
        (("mnist", target, size), ["--size = '8'", "'mnist'", "leave it out"]),
        (("mnist", target, "--root="), ["--root = ''", "expected a folder"]),
        ((tmp_path / "nowhere", target, size), ["SOURCE", "nowhere", "no such folder", "cifar10"]),
        ((source / "a" / "0.png", target, size), ["SOURCE", "no such folder"]),
        ((source, source, size), ["TARGET", "choose a TARGET outside"]),
        ((source, source / "out", size), ["TARGET", "choose a TARGET outside"]),
        ((source / "a", source, size), ["TARGET", "choose a TARGET outside"]),
        ((source, tmp_path / "file", size), ["TARGET", "file", "choose"]),
        ((source, tmp_path / "file" / "t", size), ["TARGET", "Not a directory"]),
    ]:
        message = refused(capfd, *arguments)
        assert all(word in message for word in words), message
    (tmp_path / "link").symlink_to(source)
    assert "outside" in refused(capfd, tmp_path / "link", source / "out", size)
    assert "outside" in refused(capfd, source, tmp_path / "link" / "out", size)
    (tmp_path / "link").unlink()
    assert tree(tmp_path) == before


def test_a_target_of_another_call(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("s", "other"):
        write(tmp_path / name / "a" / "0.png", gradient(16, 16))
    source, target = tmp_path / "s", tmp_path / "t"
    target.mkdir()  # An empty folder will do.
    assert prepare(source, target) == 0
    before = tree(target)
    assert "--size was 8, is 16" in refused(capfd, source, target, "--size=16", "--min-size=8")
    assert "--format was 'png', is 'jpeg'" in refused(capfd, source, target, "--size=8", "--format=jpeg")
    assert "--duplicates was 'keep', is 'drop'" in refused(capfd, source, target, "--size=8", "--duplicates=drop")
    assert "SOURCE was" in refused(capfd, tmp_path / "other", target, "--size=8")
    assert "--size was 8, is None" in refused(capfd, "mnist", target)
    assert tree(target) == before
    (target / SETTINGS_FILE).write_text("{")
    assert "damaged" in refused(capfd, source, target, "--size=8")
    (target / SETTINGS_FILE).unlink()
    assert "not made by this script" in refused(capfd, source, target, "--size=8")


def test_nothing_usable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s" / "a").mkdir(parents=True)
    (tmp_path / "s" / "a" / "x.heic").touch()
    assert prepare(tmp_path / "s", tmp_path / "t") == 1
    out, err = capsys.readouterr()
    assert "1 .heic" in out
    assert "nothing usable" in err
    assert not (tmp_path / "t").exists()
    write(tmp_path / "s" / "a" / "0.png", gradient(4, 4))
    assert prepare(tmp_path / "s", tmp_path / "t") == 1
    assert dropped(tmp_path / "t") == {"a/0.png": "too small"}


def test_a_target_that_cannot_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "s" / "a" / "0.png", gradient())
    assert prepare(tmp_path / "s", tmp_path / "t") == 0
    (tmp_path / "t" / "a" / "0.png").unlink()
    (tmp_path / "t" / "a").rmdir()
    (tmp_path / "t" / "a").write_text("in the way")
    capfd.readouterr()
    assert prepare(tmp_path / "s", tmp_path / "t") == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: TARGET = ")
    assert "run the same command again" in last


def test_help_shows_examples_and_needs_no_torch() -> None:
    code = f"""
import runpy, sys
sys.argv = ["prepare_images.py", "--help"]
try:
    runpy.run_path({COMMAND[1]!r}, run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for words in ("python scripts/prepare_images.py photos data/photos --size 64", "cifar10", "Ctrl-C", "report.json"):
        assert words in done.stdout
