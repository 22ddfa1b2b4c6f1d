"""Images and labels: the built-in digits, folders, torchvision's own files, splits and batches."""

from __future__ import annotations

import gzip
import random
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import CIFAR, gradient, random_images, real_data, write, write_cifar, write_mnist
from sklearn.datasets import load_digits
from tiny import digits, one_line
from torch import Tensor

from diffusion_core.config import DataConfig
from diffusion_core.data.batches import Batches
from diffusion_core.data.datasets import DataError, Images, load_data, stratified_split, to_uint8, to_unit
from diffusion_core.data.labelled_folder import read_image
from diffusion_core.randomness import Purpose, stream_seed

CPU = torch.device("cpu")


def folder_config(path: Path, **changes: Any) -> DataConfig:
    return DataConfig.model_validate({"name": "folder", "path": str(path), "image_size": 8} | changes)


def rows(images: Images) -> list[tuple[int, ...]]:
    """Each image and its label as something that can be compared and counted."""
    pairs = zip(images.images_NCHW, images.labels_N, strict=True)
    return [(*image.flatten().tolist(), int(label)) for image, label in pairs]


# The built-in digits.


def test_digits_are_all_there_and_unchanged() -> None:
    data, source = digits(), load_digits()
    assert data.shape_CHW == (1, 8, 8)
    assert data.class_names == tuple("0123456789")
    assert data.num_classes == 10
    assert data.train.images_NCHW.dtype == torch.uint8
    expected = [
        (*np.round(image.flatten() * 255 / 16).astype(int).tolist(), int(label))
        for image, label in zip(source.images, source.target, strict=True)
    ]
    assert sorted(rows(data.train) + rows(data.val)) == sorted(expected)


def test_digits_split_is_stratified() -> None:
    data, source = digits(), load_digits()
    for label in range(10):
        total = int((source.target == label).sum())
        assert int((data.val.labels_N == label).sum()) == round(0.2 * total)
    assert len(data.train) + len(data.val) == 1797
    assert load_data(DataConfig(name="digits", val_fraction=0.5)).val.labels_N.bincount().tolist() == [
        round(0.5 * int(count)) for count in np.bincount(source.target)
    ]


def test_digits_split_is_always_the_same() -> None:
    torch.manual_seed(1)
    again = load_data(DataConfig(name="digits"))
    assert torch.equal(again.val.images_NCHW, digits().val.images_NCHW)
    assert torch.equal(again.train.labels_N, digits().train.labels_N)


def test_other_sizes() -> None:
    data = load_data(DataConfig(name="digits", image_size=16))
    assert data.shape_CHW == (1, 16, 16)
    # Scaled, not padded or cropped: means stay where they were.
    difference = data.train.images_NCHW.float().mean((1, 2, 3)) - digits().train.images_NCHW.float().mean((1, 2, 3))
    assert difference.abs().max() < 12


@given(counts=st.lists(st.integers(2, 40), min_size=1, max_size=5), fraction=st.floats(0.0, 0.5, exclude_min=True))
def test_stratified_split_is_disjoint_and_complete(counts: list[int], fraction: float) -> None:
    labels = torch.tensor([label for label, count in enumerate(counts) for _ in range(count)])
    images = Images(torch.arange(len(labels))[:, None, None, None], labels)  # An image is its own number.
    train, val = stratified_split(images, fraction)
    numbers = [int(n) for part in (train, val) for n in part.images_NCHW.flatten()]
    assert sorted(numbers) == list(range(len(labels)))
    for part in (train, val):
        assert torch.equal(labels[part.images_NCHW.flatten()], part.labels_N)
    for label, count in enumerate(counts):
        held_out = int((val.labels_N == label).sum())
        assert 1 <= held_out < count
        assert abs(held_out - fraction * count) <= max(0.5, 1 - fraction * count)


def test_held_out_images_are_not_simply_the_first_or_last() -> None:
    images = Images(torch.arange(100)[:, None, None, None], torch.zeros(100, dtype=torch.long))
    _, val = stratified_split(images, 0.2)
    numbers = val.images_NCHW.flatten().tolist()
    assert numbers not in (list(range(20)), list(range(80, 100)))
    assert max(numbers) > 60
    assert min(numbers) < 40


def test_uint8_and_back_is_exact() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    unit = to_unit(levels)
    assert unit.dtype == torch.float32
    assert (unit.min(), unit.max()) == (-1.0, 1.0)
    assert torch.equal(to_uint8(unit), levels)
    assert to_uint8(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])).tolist() == [0, 0, 128, 255, 255]


# Batches.


def numbered(count: int, size: int = 4) -> Images:
    """Images that name themselves in their left half; the right half is black."""
    images = torch.zeros(count, 1, size, size, dtype=torch.uint8)
    images[..., : size // 2] = torch.arange(1, count + 1, dtype=torch.uint8)[:, None, None, None]
    return Images(images, torch.arange(count) % 7)


def batches(count: int = 30, **changes: Any) -> Batches:
    arguments: dict[str, Any] = {"batch_size": 8, "seed": 0, "horizontal_flip": False, "device": CPU}
    return Batches(numbered(count), **(arguments | changes))


def test_a_batch_depends_on_the_seed_and_the_step_alone() -> None:
    straight = batches(horizontal_flip=True)
    expected = [straight.at(step) for step in range(20)]
    for step in (19, 0, 7, 3, 19):  # In any order, from a new object each time, whatever torch's own state.
        torch.manual_seed(step)
        for source in (straight, batches(horizontal_flip=True)):
            x0, labels = source.at(step)
            assert torch.equal(x0, expected[step][0])
            assert torch.equal(labels, expected[step][1])
    other = batches(horizontal_flip=True, seed=1)
    assert not any(torch.equal(other.at(step)[0], expected[step][0]) for step in range(20))


@settings(max_examples=60)
@given(total=st.integers(1, 60), batch_size=st.integers(1, 70), seed=st.integers(0, 2**63 - 1))
def test_each_epoch_shows_each_image_once_across_the_ends_of_epochs(total: int, batch_size: int, seed: int) -> None:
    source = batches(total, batch_size=batch_size, seed=seed)
    epochs = 3
    steps = -(-epochs * total // batch_size)
    order = torch.cat([source.indices(step) for step in range(steps)])
    assert len(order) == steps * batch_size
    for epoch in range(epochs):
        assert sorted(order[epoch * total : (epoch + 1) * total].tolist()) == list(range(total))


def test_each_epoch_has_an_order_of_its_own() -> None:
    source = batches(50, batch_size=50)
    orders = [source.indices(step).tolist() for step in range(6)]
    assert len({tuple(order) for order in orders}) == 6


def test_seeds_and_purposes_never_share_a_stream() -> None:
    seeds = [0, 1, 2**31, 2**32, 2**32 + 1, 2**62, 2**63 - 1]
    keys = {stream_seed(seed, purpose, step) for seed in seeds for purpose in Purpose for step in range(20)}
    assert len(keys) == len(seeds) * len(Purpose) * 20
    assert all(0 <= key < 2**63 for key in keys)
    orders = {tuple(batches(seed=seed).indices(0).tolist()) for seed in seeds}
    assert len(orders) == len(seeds)


def test_images_come_with_their_labels_in_unit_range() -> None:
    x0, labels = batches().at(4)
    assert x0.shape == (8, 1, 4, 4)
    assert x0.dtype == torch.float32
    names = to_uint8(x0)[:, 0, 0, 0].long() - 1
    assert torch.equal(labels, names % 7)
    assert torch.equal(names, batches().indices(4))


@pytest.mark.parametrize("flip", [False, True])
def test_the_shares_of_the_processes_make_up_the_whole_batch(flip: bool) -> None:
    whole = batches(horizontal_flip=flip)
    for world_size in (1, 2, 4, 8):
        parts = [batches(horizontal_flip=flip, rank=rank, world_size=world_size) for rank in range(world_size)]
        for step in (0, 3, 11):
            images, labels = zip(*(part.at(step) for part in parts), strict=True)
            assert {len(share) for share in labels} == {8 // world_size}
            assert torch.equal(torch.cat(images), whole.at(step)[0])
            assert torch.equal(torch.cat(labels), whole.at(step)[1])


def test_flips_are_horizontal_and_happen_half_the_time() -> None:
    def drawn(flip: bool) -> Tensor:
        source = batches(horizontal_flip=flip)
        return torch.cat([source.at(step)[0] for step in range(250)])

    plain, flipped = drawn(False), drawn(True)
    mirrored = plain.flip(3)
    is_mirrored = (flipped == mirrored).flatten(1).all(1)
    is_plain = (flipped == plain).flatten(1).all(1)
    assert (is_mirrored ^ is_plain).all()  # No image is its own mirror image.
    assert abs(is_mirrored.float().mean() - 0.5) < 4 * 0.5 / 2000**0.5
    assert not torch.equal(is_mirrored[:1000], is_mirrored[1000:])


def test_batches_leave_the_data_as_it_was() -> None:
    source = batches(horizontal_flip=True)
    before = source.images.images_NCHW.clone()
    for step in range(5):
        source.at(step)[0].mul_(0)
    assert torch.equal(before, source.images.images_NCHW)


# Folders.


def class_folder(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        for i in range(count):
            write(root / name / f"{i:03d}.png", gradient(seed=i + 10 * len(name)))
    return root


def test_a_folder_of_folders(tmp_path: Path) -> None:
    class_folder(tmp_path, {"dog": 6, "cat": 10, "a bird": 4})
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "notes.txt").write_text("not a class")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    data = load_data(folder_config(tmp_path, val_fraction=0.25))
    assert data.class_names == ("a bird", "cat", "dog")
    assert data.shape_CHW == (3, 8, 8)
    assert data.val.labels_N.bincount().tolist() == [1, 2, 2]
    assert data.train.labels_N.bincount().tolist() == [3, 8, 4]
    expected = [
        (*gradient(seed=i + 10 * len(name)).transpose(2, 0, 1).flatten().tolist(), label)
        for label, (name, count) in enumerate([("a bird", 4), ("cat", 10), ("dog", 6)])
        for i in range(count)
    ]
    assert sorted(rows(data.train) + rows(data.val)) == sorted(expected)


@pytest.mark.parametrize("val_name", ["test", "val"])
def test_a_folder_with_train_and_test(tmp_path: Path, val_name: str) -> None:
    class_folder(tmp_path / "train", {"x": 3, "y": 2})
    class_folder(tmp_path / val_name, {"x": 1, "y": 1})
    data = load_data(folder_config(tmp_path, val_fraction=0.5))
    assert data.class_names == ("x", "y")
    assert data.train.labels_N.tolist() == [0, 0, 0, 1, 1]
    assert data.val.labels_N.tolist() == [0, 1]


def test_images_in_nested_folders_belong_to_the_class_above(tmp_path: Path) -> None:
    class_folder(tmp_path / "cat", {"indoors/2020": 2, "outdoors": 3})
    class_folder(tmp_path, {"dog": 2})
    data = load_data(folder_config(tmp_path))
    assert data.class_names == ("cat", "dog")
    assert torch.cat([data.train.labels_N, data.val.labels_N]).bincount().tolist() == [5, 2]


def test_images_become_rgb_arrays(tmp_path: Path) -> None:
    """tests/scripts/test_prepare_images.py tries every kind of image with the same decoder."""
    colour = gradient()
    write(tmp_path / "rgba.PNG", np.dstack([colour, np.full((8, 8), 255, np.uint8)]))
    write(tmp_path / "photo.jpg", colour, quality=100, subsampling=0)
    write(tmp_path / "bitmap.bmp", colour)
    for name, tolerance in (("rgba.PNG", 0), ("photo.jpg", 4), ("bitmap.bmp", 0)):
        found = read_image(tmp_path / name, 8)
        assert (found.shape, found.dtype) == ((8, 8, 3), np.uint8), name
        assert np.abs(found.astype(int) - colour).max() <= tolerance, name


def test_images_of_other_shapes_are_scaled_and_cropped_in_the_middle(tmp_path: Path) -> None:
    stripes = np.zeros((16, 64, 3), np.uint8)
    stripes[:, 24:40] = 200  # The middle square of a wide picture.
    write(tmp_path / "wide.png", stripes)
    write(tmp_path / "tall.png", stripes.transpose(1, 0, 2))
    for name in ("wide.png", "tall.png"):
        assert (np.abs(read_image(tmp_path / name, 8).astype(int) - 200) < 15).all(), name  # Filters ring at edges.
    write(tmp_path / "small.png", np.full((3, 2, 3), 90, np.uint8))
    assert (read_image(tmp_path / "small.png", 8) == 90).all()


def test_order_of_images_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    names = [f"{i:03d}" for i in range(12)]
    for copy, order in (("one", names), ("two", random.Random(0).sample(names, len(names)))):
        for name in order:
            for label in ("p", "q"):
                write(tmp_path / copy / label / f"{name}.png", gradient(seed=int(name)))
    one, two = load_data(folder_config(tmp_path / "one")), load_data(folder_config(tmp_path / "two"))
    assert torch.equal(one.train.images_NCHW, two.train.images_NCHW)
    assert torch.equal(one.val.images_NCHW, two.val.images_NCHW)


def refused(config: DataConfig) -> str:
    with pytest.raises(DataError) as caught:
        load_data(config)
    return one_line(caught.value)


def damaged(write_damage: Callable[[Path], object], name: str = "broken.png") -> Callable[[Path], object]:
    """A folder of two classes with one file that is no image."""
    return lambda root: write_damage(class_folder(root, {"x": 3, "y": 3}) / "y" / name)


def cut_short(path: Path) -> None:
    write(path, random_images(64, 64, 3))
    path.write_bytes(path.read_bytes()[:2000])


UNUSABLE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no folder": (lambda root: root.rmdir(), ["data.path", "unusable", "no such folder"]),
    "no classes": (lambda root: write(root / "lonely.png", gradient()), ["one sub-folder of images a class"]),
    "an empty class": (lambda root: (class_folder(root, {"full": 3}) / "empty").mkdir(), ["'empty'", "no images"]),
    "a class of one": (lambda root: class_folder(root, {"many": 3, "one": 1}), ["expected at least 2"]),
    "train and test differ": (
        lambda root: (class_folder(root / "train", {"x": 3, "y": 2}), class_folder(root / "test", {"x": 1, "z": 1})),
        ["different classes"],
    ),
    "text": (damaged(lambda path: path.write_text("not an image\nat all")), ["broken.png", "not a readable image"]),
    "an empty file": (damaged(Path.touch), ["broken.png", "not a readable image"]),
    "a cut file": (damaged(cut_short), ["broken.png", "not a readable image"]),
    "an unknown range": (
        damaged(lambda path: write(path, np.zeros((8, 8), np.float32)), "broken.tiff"),
        ["broken.tiff", "not a readable image"],
    ),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_folders_are_refused(kind: str, tmp_path: Path) -> None:
    make, words = UNUSABLE[kind]
    (tmp_path / "unusable").mkdir()
    make(tmp_path / "unusable")
    message = refused(folder_config(tmp_path / "unusable"))
    assert all(word in message for word in words), message


# What torchvision downloads, in its own formats.


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every download fails as it does without a network; the list of addresses that were tried."""
    tried: list[str] = []

    def fail(request: Any, *_: Any, **__: Any) -> NoReturn:
        tried.append(getattr(request, "full_url", request))
        raise urllib.error.URLError("[Errno -3] Temporary failure\nin name resolution")

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    return tried


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_in_its_own_format(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[str]
) -> None:
    def labels(file: int) -> list[int]:
        return [(5 * file + j) % 12 for j in range(4)]

    names, files = [f"class {i}" for i in range(12)], len(CIFAR[name][4]) + 1
    images = write_cifar(name, tmp_path, names, labels, monkeypatch)

    data = load_data(DataConfig(name=name, path=str(tmp_path)))
    assert not no_network
    assert data.class_names == tuple(names)
    assert data.shape_CHW == (3, 32, 32)
    np.testing.assert_array_equal(data.train.images_NCHW.numpy(), np.concatenate(images[:-1]))
    np.testing.assert_array_equal(data.val.images_NCHW.numpy(), images[-1])
    assert data.train.labels_N.tolist() == [label for file in range(files - 1) for label in labels(file)]
    assert data.val.labels_N.tolist() == labels(files - 1)
    assert data.train.labels_N.dtype == torch.int64

    _, base, *_, test_file, _ = CIFAR[name]
    (tmp_path / base / test_file).write_bytes(b"damaged")
    assert name in refused(DataConfig(name=name, path=str(tmp_path)))


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_in_its_own_format(name: str, folder: str, tmp_path: Path, no_network: list[str]) -> None:
    parts = write_mnist(tmp_path / folder, {"train": 9, "t10k": 4})
    data = load_data(DataConfig(name=name, path=str(tmp_path)))
    assert not no_network
    assert data.num_classes == 10
    assert data.shape_CHW == (1, 28, 28)
    for part, prefix in ((data.train, "train"), (data.val, "t10k")):
        np.testing.assert_array_equal(part.images_NCHW[:, 0].numpy(), parts[prefix][0])
        np.testing.assert_array_equal(part.labels_N.numpy(), parts[prefix][1])
    assert load_data(DataConfig(name=name, path=str(tmp_path), image_size=32)).shape_CHW == (1, 32, 32)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist"])
def test_a_download_that_fails(name: str, tmp_path: Path, no_network: list[str]) -> None:
    message = refused(DataConfig(name=name, path=str(tmp_path)))
    assert no_network
    assert f"data.name = '{name}'" in message
    assert str(tmp_path) in message
    assert "data.name=digits" in message


def test_real_mnist(tmp_path: Path, no_network: list[str]) -> None:
    source = real_data() / "mnist"
    if not (source / "t10k-images-idx3-ubyte.gz").is_file():
        pytest.skip("no real MNIST test set beside the repository (DIFFUSION_TEST_DATA names another place)")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        with gzip.open(source / f"t10k-{kind}.gz") as packed, (raw / f"t10k-{kind}").open("wb") as file:
            shutil.copyfileobj(packed, file)
        shutil.copy(raw / f"t10k-{kind}", raw / f"train-{kind}")  # Only the test set is there.
    data = load_data(DataConfig(name="mnist", path=str(tmp_path)))
    assert not no_network
    # What is known of MNIST's test set: its size, its first digits, how many there are of each, its mean.
    assert data.val.images_NCHW.shape == (10_000, 1, 28, 28)
    assert data.val.labels_N[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert data.val.labels_N.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data.val.images_NCHW.float().mean().item() / 255 == pytest.approx(0.13251, abs=1e-4)
    assert data.class_names[3] == "3 - three"
