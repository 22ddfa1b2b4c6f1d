"""Image files as data sets store them."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from PIL import Image

CIFAR = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py", "labels", "label_names", [f"data_batch_{i}" for i in range(1, 6)],
                "test_batch", "batches.meta"),
    "cifar100": ("CIFAR100", "cifar-100-python", "fine_labels", "fine_label_names", ["train"], "test", "meta"),
}  # fmt: skip


def gradient(width: int = 8, height: int = 8, seed: int = 0) -> np.ndarray:
    """A smooth colour picture, which JPEG keeps nearly as it is."""
    x, y = np.linspace(0, 1, width)[None, :], np.linspace(0, 1, height)[:, None]
    phase = seed / 10
    planes = [x + 0 * y, y + 0 * x, (x + y) / 2]
    return np.stack([np.round(200 * (plane * 0.8 + phase % 1 * 0.2)).astype(np.uint8) for plane in planes], axis=2)


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def real_data() -> Path:
    """Real images beside the repository, or where DIFFUSION_TEST_DATA says; not part of the project."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("DIFFUSION_TEST_DATA", beside))


def write(path: Path, array: np.ndarray | Image.Image, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(path, **options)


def write_idx(path: Path, array: np.ndarray) -> None:
    """MNIST's format: two zero bytes, the type (8: bytes), the number of axes, their sizes (big-endian), the data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


def write_pickle(path: Path, content: dict[str, Any]) -> str:
    """Write a file of the CIFAR archives; returns its MD5."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(
    name: str, root: Path, class_names: Sequence[str], labels: Callable[[int], list[int]], patch: pytest.MonkeyPatch
) -> list[np.ndarray]:
    """Write four images per file in the format of the CIFAR archives; returns the files' images, test images last.

    Rows of 3072 bytes: all red ones first, then green, then blue. ``labels`` gives those of the file of a number.
    torchvision knows the checksums of the real files, and is patched to accept those of these.
    """
    loader_name, base, label_key, names_key, train_files, test_file, meta_file = CIFAR[name]
    loader = getattr(torchvision.datasets, loader_name)
    images, sums = [], {}
    for i, file in enumerate([*train_files, test_file]):
        images.append(random_images(4, 3, 32, 32, seed=i))
        content = {"data": images[-1].reshape(4, 3072), label_key: labels(i), "batch_label": "x"}
        sums[file] = write_pickle(root / base / file, content)
    patch.setattr(loader, "train_list", [[file, sums[file]] for file in train_files])
    patch.setattr(loader, "test_list", [[test_file, sums[test_file]]])
    meta_sum = write_pickle(root / base / meta_file, {names_key: list(class_names)})
    patch.setattr(loader, "meta", loader.meta | {"md5": meta_sum})
    return images


def write_mnist(folder: Path, counts: Mapping[str, int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write random images in MNIST's format; returns images and labels by file prefix, ``train`` or ``t10k``."""
    parts = {}
    for i, (prefix, count) in enumerate(counts.items()):
        images, labels = random_images(count, 28, 28, seed=i), np.arange(i, count + i, dtype=np.uint8) % 10
        write_idx(folder / "raw" / f"{prefix}-images-idx3-ubyte", images)
        write_idx(folder / "raw" / f"{prefix}-labels-idx1-ubyte", labels)
        parts[prefix] = images, labels
    return parts


def frame_count(image: Image.Image) -> int:
    """How many frames an animation has. Pillow's type for an opened file leaves the attribute out."""
    return int(image.n_frames)  # type: ignore[attr-defined]
