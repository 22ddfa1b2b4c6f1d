"""Classifiers that the project trains itself: which class does an image show, and how do its features compare?

A classifier is one safetensors file; what it is, how it was trained and how accurate it is stands in its header as
JSON. It is trained once for each data set and recipe, and kept in the cache.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion_core.cache import cache_path, keep
from diffusion_core.data.datasets import Dataset, to_unit
from diffusion_core.evaluation.classifier.network import SMALLEST_IMAGE, ClassifierNetwork
from diffusion_core.evaluation.classifier.training import RECIPES, Recipe, accuracy, recipe_for, train_classifier
from diffusion_core.evaluation.features import (
    HASH_DIGITS,
    ExtractorError,
    Judged,
    images_hash,
    weights_file_hash,
    with_channels,
)
from diffusion_core.files import sha256
from diffusion_core.messages import one_line

HEADER = "classifier"
"""The entry of the file's metadata that holds the JSON."""

LARGEST = {"channels": 16, "num_classes": 100_000, "width": 1024}
"""Bounds of what a file may ask for."""


@dataclass(frozen=True)
class Classifier:
    """A trained classifier: also a feature space, ``classifier-DATA``.

    Attributes:
        network: in evaluation mode.
        data: name of the data set that it was trained on.
        accuracy: share of the real held-out images that it classifies rightly, in [0, 1].
        weights: the first digits of its weights' SHA-256.
        recipe: how it was trained.
    """

    network: ClassifierNetwork
    data: str
    accuracy: float
    weights: str
    recipe: Recipe

    @property
    def name(self) -> str:
        """Name for protocols and figures: ``classifier-DATA``."""
        return f"classifier-{self.data}"

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor) -> Judged:
        """Map uint8 images, ``(N, C, H, W)``, to features, ``(N, D)``, and logits, ``(N, K)``, in float32.

        Raises:
            ExtractorError: if the images are smaller than the classifier can take.
        """
        parameter = next(self.network.parameters())
        x_BCHW = to_unit(with_channels(images_BCHW.to(parameter.device), self.network.channels))
        if min(x_BCHW.shape[2:]) < SMALLEST_IMAGE:
            raise ExtractorError(f"{self.name}: images of {tuple(x_BCHW.shape[2:])} pixels; expected {SMALLEST_IMAGE}")
        features_BD, logits_BK = self.network(x_BCHW)
        return Judged(features_BD.float(), logits_BK.float())

    def class_agreement(self, images_NCHW: Tensor, labels: list[int]) -> float:
        """Return the share of uint8 images, in [0, 1], that are classified as the label they were sampled for."""
        seen = torch.cat([self(part).logits_BK.argmax(1).cpu() for part in images_NCHW.split(512)])  # type: ignore[union-attr]
        return float((seen == torch.tensor(labels)).float().mean())

    def save(self, path: Path) -> None:
        """Write the file that :func:`read_classifier` reads."""
        described = {
            "channels": self.network.channels,
            "num_classes": self.network.num_classes,
            "width": self.network.width,
            "data": self.data,
            "accuracy": self.accuracy,
            "recipe": asdict(self.recipe),
        }
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.network.state_dict().items()}
        save_file(tensors, path, metadata={HEADER: json.dumps(described)})


def weights_hash(network: torch.nn.Module) -> str:
    """Return the first ``HASH_DIGITS`` digits of the SHA-256 of a network's weights and their names."""
    return sha256(*(part for entry in sorted(network.state_dict().items()) for part in entry))[:HASH_DIGITS]


def read_classifier(path: Path, device: torch.device) -> Classifier:
    """Read a classifier; nothing in the file is run.

    Raises:
        ExtractorError: if it is missing, damaged, or something else.
    """
    weights_file_hash(path)  # Says in words what is wrong with the path.
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {})[HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        sizes = {key: described[key] for key in LARGEST}
        for key, size in sizes.items():
            if type(size) is not int or not 1 <= size <= LARGEST[key]:
                raise ValueError(f"{key} = {size!r}: expected 1 to {LARGEST[key]}")
        with torch.device("meta"):
            network = ClassifierNetwork(**sizes)
        network.load_state_dict(tensors, assign=True)
        recipe = Recipe(**described["recipe"])
        data, share = str(described["data"]), float(described["accuracy"])
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        reason = one_line(error)
        raise ExtractorError(f"{str(path)!r}: no classifier of scripts/train_classifier.py ({reason})") from None
    network = network.to(device).eval()
    return Classifier(network, data, share, weights_hash(network), recipe)


def make_classifier(
    dataset: Dataset, data: str, recipe: Recipe, *, mirrored: bool, device: torch.device, progress: bool = False
) -> Classifier:
    """Train a classifier on a data set's training images, and judge it by the held-out ones.

    Raises:
        ExtractorError: if the images are too small for the network.
    """
    if dataset.shape_CHW[1] < SMALLEST_IMAGE:
        raise ExtractorError(f"images of {dataset.shape_CHW[1]} pixels: a classifier needs {SMALLEST_IMAGE} or more")
    network = train_classifier(
        dataset.train, dataset.num_classes, recipe, mirrored=mirrored, device=device, progress=progress
    )
    return Classifier(network, data, accuracy(network, dataset.val), weights_hash(network), recipe)


def classifier_for(
    dataset: Dataset,
    data: str,
    *,
    mirrored: bool,
    device: torch.device,
    recipe: str | None = None,
    progress: bool = False,
) -> Classifier:
    """The classifier of a data set: from the cache, or else trained, which takes seconds for digits.

    Args:
        dataset: the images.
        data: the data set's name.
        mirrored: whether the images are as natural in the mirror.
        device: where to compute.
        recipe: a name of ``RECIPES``; None takes what suits images and device.
        progress: show a bar on stderr while training.
    """
    recipe = recipe or recipe_for(dataset.shape_CHW, device.type == "cuda")
    settings: dict[str, Any] = asdict(RECIPES[recipe]) | {"mirrored": mirrored}
    made_from = f"{images_hash(dataset.train)} {images_hash(dataset.val)} {json.dumps(settings, sort_keys=True)}"
    key = sha256(made_from)[:HASH_DIGITS]
    path = cache_path("classifiers", f"{data}-{recipe}-{key}.safetensors")
    if path.is_file():
        try:
            return read_classifier(path, device)
        except ExtractorError:  # A damaged file is made anew.
            pass
    classifier = make_classifier(dataset, data, RECIPES[recipe], mirrored=mirrored, device=device, progress=progress)
    keep(path, classifier.save)
    return classifier
