"""Folders as users have them: training, evaluation and preparation read the same images of the same classes, and say
the same of what they do not read. Expected images are read with Pillow alone.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import prepare_images
import pytest
from image_files import write
from PIL import Image
from tiny import one_line

from diffusion_core.config import DataConfig
from diffusion_core.data.datasets import DataError, Dataset, Images, load_data
from diffusion_core.data.preparation import REPORT_FILE
from diffusion_core.evaluation.folders import image_folder

Content = Callable[[Path, int], object]


def picture(path: Path, number: int) -> None:
    """Write an image of its own colour, in the format of the suffix."""
    write(path, np.full((8, 8, 3), (5 * number % 256, 40 + number, 200 - number), np.uint8))


def gray(path: Path, number: int) -> None:
    write(path, np.full((8, 8), 3 * number, np.uint8))


def text(path: Path, _number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("not an image")


def nothing(path: Path, _number: int) -> None:
    path.mkdir(parents=True)


def pipe(path: Path, _number: int) -> None:
    os.mkfifo(path)


def link(target: str) -> Content:
    """Link to a path below the folder that is made."""
    return lambda path, _number: path.symlink_to(os.path.relpath(root_of(path) / target, path.parent))


def root_of(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.name == "made")


@dataclass(frozen=True)
class Case:
    """A folder, and what is read of it.

    Attributes:
        files: content by path, made in this order.
        train: paths of the training images by class, in the order of the labels. Without ``val``, of all images.
        val: those of the held-out images, if a folder holds them.
        unread: paths of images that training leaves alone.
        notes: what is said of the rest.
        refused: why training refuses the folder.
        ambiguous: whether evaluation refuses it as well.
        warns: how a further line starts that training prints.
    """

    files: Mapping[str, Content]
    train: Mapping[str, list[str]] = field(default_factory=dict)
    val: Mapping[str, list[str]] | None = None
    unread: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    refused: str = ""
    ambiguous: bool = False
    warns: str = ""


def pictures(*paths: str) -> dict[str, Content]:
    return dict.fromkeys(paths, picture)


def some(*folders: str, count: int = 2) -> dict[str, Content]:
    """Return images in each folder."""
    return pictures(*(path for folder in folders for path in within(folder, count)))


def within(folder: str, count: int = 2) -> list[str]:
    return [f"{folder}/{number}.png" for number in range(count)]


def classes(*names: str, split: str = "", count: int = 2) -> dict[str, list[str]]:
    """Return the images of :func:`some` by class."""
    return {name: within(f"{split}/{name}" if split else name, count) for name in names}


def splits(train: str, val: str = "", *unread: str) -> Case:
    """Return a folder with these splits, each with the classes cat and dog."""
    names = [name for name in (train, val, *unread) if name]
    return Case(
        some(*(f"{name}/{label}" for name in names for label in ("cat", "dog"))),
        classes("cat", "dog", split=train),
        classes("cat", "dog", split=val) if val else None,
        tuple(path for name in unread for label in ("cat", "dog") for path in within(f"{name}/{label}")),
        tuple(f"{name}/ (4 images) is neither trained on nor held out" for name in unread),
    )


def added(files: Mapping[str, Content], *notes: str) -> Case:
    """Return a folder of the classes cat and dog, with something beside that is not read."""
    return Case(some("cat", "dog") | dict(files), classes("cat", "dog"), notes=notes)


def suffixed(*suffixes: str, made_by: Content = picture) -> Case:
    """Return a folder whose second class has an image of each suffix."""
    paths = [f"b/{number}{suffix}" for number, suffix in enumerate(suffixes)]
    return Case(some("a") | dict.fromkeys(paths, made_by), {"a": within("a"), "b": paths})


def refused(files: Mapping[str, Content], reason: str) -> Case:
    return Case(files, refused=reason, ambiguous=True)


def decomposed(name: str) -> str:
    return unicodedata.normalize("NFD", name)


NUMBERS = tuple(str(number) for number in range(12))
CASES: dict[str, Case] = {
    "classes": Case(some("dog", "cat"), classes("cat", "dog")),
    "deeper folders": Case(
        some("cat/indoors/2020", "cat", "dog"), {"cat": [*within("cat"), *within("cat/indoors/2020")]} | classes("dog")
    ),
    "train and test": splits("train", "test"),
    "train and val": splits("train", "val"),
    "train, val and test": splits("train", "val", "test"),
    "train and valid": splits("train", "valid"),
    "train, validation and test": splits("train", "validation", "test"),
    "Train and Test": splits("Train", "Test"),
    "TRAINING and Testing": splits("TRAINING", "Testing"),
    "train alone": splits("train"),
    "an empty val": Case(
        some("train/cat", "train/dog") | {"val": nothing},
        classes("cat", "dog", split="train"),
        notes=("val/ (0 images) is neither trained on nor held out",),
    ),
    "a test without labels": Case(
        some("train/cat", "train/dog", "test"),
        classes("cat", "dog", split="train"),
        unread=("test/0.png", "test/1.png"),
        notes=("test/ (2 images) is neither trained on nor held out",),
    ),
    "annotations beside splits": Case(
        some("train/cat", "val/cat") | {"annotations/train.json": text, "README.md": text},
        classes("cat", split="train"),
        classes("cat", split="val"),
        notes=("passed over: 1 .json, 1 .md",),
    ),
    "a class of trains": Case(some("bus", "car", "train"), classes("bus", "car", "train")),
    "splits and something else": refused(some("train/cat", "test/cat", "unlabeled"), "unlabeled/ is beside"),
    "splits and classes": refused(some("train/cat", "train/dog", "cat", "dog"), "train/ holds class folders"),
    "splits without classes": refused(some("train", "test"), "but no class folders"),
    "train without classes": refused(some("train"), "such as train/all"),
    "no train": refused(some("val/cat", "test/cat"), "there is no such train/"),
    "one split twice": refused(some("train/cat", "val/cat", "valid/cat"), "are the same split"),
    "other classes held out": refused(some("train/x", "train/y", "test/x", "test/z"), "'y' only in train/, 'z' only"),
    "numbers": Case(some(*NUMBERS), classes(*NUMBERS)),
    "numbers in splits": Case(
        some(*(f"{split}/{name}" for split in ("train", "val") for name in ("10", "9", "100"))),
        classes("9", "10", "100", split="train"),
        classes("9", "10", "100", split="val"),
    ),
    "numbers of other kinds": Case(some("007", "-1", "10", "2.5", "2"), classes("-1", "2", "2.5", "007", "10")),
    "numbers and words": Case(some("10", "2", "two"), classes("10", "2", "two")),
    "commas and spaces": Case(some("salt, pepper", "a b", "c"), classes("a b", "c", "salt, pepper")),
    "decomposed names": Case(some(decomposed("é"), "z"), {"z": within("z"), "é": within(decomposed("é"))}),
    "splits in two forms": Case(
        some("train/ü", f"val/{decomposed('ü')}"), classes("ü", split="train"), {"ü": within(f"val/{decomposed('ü')}")}
    ),
    "one name in two forms": refused(some("é", decomposed("é")), "two folders are called 'é'"),
    "copies of notebooks": added(some("cat/.ipynb_checkpoints", ".ipynb_checkpoints"), "passed over: 2 hidden"),
    "files of macOS": added({"cat/._0.png": text, "dog/._1.png": text, ".DS_Store": text}, "passed over: 3 hidden"),
    "an archive of macOS": added(some("__MACOSX/cat", "__MACOSX"), "passed over: 1 folder __MACOSX"),
    "thumbnails of a disk": added(some("cat/@eaDir/0.png"), "passed over: 1 folder @eaDir"),
    "files of Windows": added({"cat/Thumbs.db": text, "desktop.ini": text}, "passed over: 1 .db, 1 .ini"),
    "jfif": suffixed(".jfif", ".JPE", ".jpg"),
    "avif": suffixed(".avif", ".AVIF"),
    "portable maps": suffixed(".pgm", ".ppm", ".pnm", made_by=gray),
    "other formats": suffixed(".bmp", ".webp", ".gif", ".tif", ".jp2", ".tga", ".apng", ".ico", ".sgi", ".pcx"),
    "a format that is not read": Case(
        some("a", "b", count=3) | dict.fromkeys([f"b/{number}.heic" for number in range(20)], text),
        classes("a", "b", count=3),
        notes=("passed over: 20 .heic",),
    ),
    "a class that is a link": Case(
        some("cat", "../elsewhere") | {"dog": link("../elsewhere")}, {"cat": within("cat"), "dog": within("dog")}
    ),
    "a link inside a class": Case(
        some("cat", "dog", "../elsewhere") | {"dog/more": link("../elsewhere")},
        {"cat": within("cat"), "dog": [*within("dog"), *within("dog/more")]},
    ),
    "links in a circle": added(
        {"cat/up": link("."), "dog/up": link("..")}, "passed over: 2 link to a folder above it"
    ),
    "two links in a circle": Case(
        some("a", "b") | {"a/b": link("b"), "b/a": link("a")},
        {"a": [*within("a"), *within("a/b")], "b": [*within("b"), *within("b/a")]},
        notes=("passed over: 2 link to a folder above it",),
        warns="held-out images are also training images",
    ),
    "a folder named as an image": Case(
        some("cat", "dog", "dog/more.png"), {"cat": within("cat"), "dog": [*within("dog"), *within("dog/more.png")]}
    ),
    "a pipe": added({"cat/pipe.png": pipe}, "passed over: 1 .png"),
    "loose images": added(pictures("cover.png", "z.jpg"), "2 images in no class folder: cover.png, z.jpg"),
    "loose images in a split": Case(
        some("train/cat", "val/cat", "train", "val"),
        classes("cat", split="train"),
        classes("cat", split="val"),
        notes=("4 images in no class folder: train/0.png, train/1.png, val/0.png and 1 more",),
    ),
    "images alone": Case(pictures("0.png", "1.png"), {"": ["0.png", "1.png"]}, refused="no sub-folders"),
    "one class": Case(some("cat"), classes("cat")),
    "a class of one image": Case(
        some("cat") | pictures("the one/0.png"), classes("cat") | {"the one": ["the one/0.png"]},
        refused="class 'the one' has 1 image; expected at least 2",
    ),
    "a folder around the classes": Case(
        some("photos/cat", "photos/dog"), {"photos": [*within("photos/cat"), *within("photos/dog")]},
        warns="warning: all images are of one class, 'photos'; if 'cat', 'dog' are the classes",
    ),
    "what was prepared": added({".prepare.json": text, ".prepare.jsonl": text, "report.json": text}),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "made").mkdir()
    return tmp_path / "made"


def make(case: Case, folder: Path) -> None:
    for number, (path, content) in enumerate(case.files.items()):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        content(folder / path, number)


def opened(paths: Iterable[Path]) -> Counter[bytes]:
    """Return the pixels of images as Pillow reads them."""
    found: Counter[bytes] = Counter()
    for path in paths:
        with Image.open(path) as image:
            found[image.convert("RGB").tobytes()] += 1
    return found


def of_class(images: Images, label: int) -> Counter[bytes]:
    chosen = images.images_NCHW[images.labels_N == label].permute(0, 2, 3, 1)
    return Counter(image.contiguous().numpy().tobytes() for image in chosen)


def read_for_training(folder: Path) -> Dataset:
    return load_data(DataConfig(name="folder", path=str(folder), image_size=8, val_fraction=0.5))


def prepared(folder: Path, target: Path) -> dict[str, object]:
    """Prepare a folder; return the report."""
    assert prepare_images.main([str(folder), str(target), "--size=8", "--workers=1"]) == 0
    content: dict[str, object] = json.loads((target / REPORT_FILE).read_text())
    return content


@pytest.mark.parametrize("name", CASES)
def test_training_evaluation_and_preparation_read_the_same(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    make(case, folder)
    before = sorted(folder.rglob("*"))
    report, reason = prepared(folder, tmp_path / "target"), ""
    out = capsys.readouterr().out
    if case.refused:
        with pytest.raises(DataError) as caught:
            read_for_training(folder)
        key, _, reason = one_line(caught.value).partition(": ")
        assert key == f"data.path = {str(folder)!r}"
        assert case.refused in reason
        assert f"not ready to train: {reason}" in out
    else:
        data = read_for_training(folder)
        assert data.class_names == tuple(case.train)
        for label, (held_out, read) in enumerate(
            zip(case.val.values() if case.val else [None] * data.num_classes, case.train.values(), strict=True)
        ):
            train, val = of_class(data.train, label), of_class(data.val, label)
            if held_out is None:
                assert train + val == opened(folder / path for path in read)
                assert val.total() >= 1
            else:
                assert train == opened(folder / path for path in read)
                assert val == opened(folder / path for path in held_out)
        assert list(data.notes) == [*case.notes, *(line for line in data.notes if case.warns and case.warns in line)]
        assert len(data.notes) == len(case.notes) + bool(case.warns)
        assert "to train: python" in out
    assert report["refused_by_training"] == (reason or None)
    assert report["notes"] == list(case.notes)
    if case.ambiguous:
        with pytest.raises(DataError) as caught:
            image_folder(folder)
        assert one_line(caught.value) == f"{str(folder)!r}: {reason}"
        return
    both_splits = [*case.train.values(), *(case.val or {}).values()]
    everything = [folder / path for paths in (*both_splits, case.unread) for path in paths]
    measured = image_folder(folder)
    images_BCHW = next(iter(measured.batches(range(len(measured)), 999)))[0]
    assert Counter(image.permute(1, 2, 0).contiguous().numpy().tobytes() for image in images_BCHW) == opened(everything)
    assert measured.class_names == tuple(filter(None, case.train))
    assert list(measured.notes)[len(measured.notes) - len(case.notes) :] == list(case.notes)
    assert opened(path for path in (tmp_path / "target").rglob("*.png") if path.is_file()) == opened(everything)
    counts = report["classes"]
    assert isinstance(counts, dict)
    assert {unicodedata.normalize("NFC", key.rpartition("/")[2]) for key in counts} >= set(case.train)
    assert sum(counts.values()) == len(everything) == report["kept"]
    assert sorted(folder.rglob("*")) == before


def test_samples_are_measured_without_what_lies_beside_them(folder: Path) -> None:
    samples, beside = ["0-0.png", "12-3.png"], ["grid.png", "diffusion.gif", "strips/0.png"]
    make(Case(pictures(*samples, *beside) | {"samples.json": text}), folder)
    found = image_folder(folder)
    assert [path.name for path in found.files] == samples
    assert found.labels == (0, 12)
    assert found.notes == ("1 image in folders beside the samples: not read", "passed over: 1 .json")
    picture(folder / "none-4.png", 9)
    assert image_folder(folder).labels is None


def test_there_are_many_folders() -> None:
    assert len(CASES) >= 40
    assert len({tuple(case.files) for case in CASES.values()}) == len(CASES)
