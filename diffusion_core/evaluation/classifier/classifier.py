"""Classifiers that this project trains. They measure class agreement, and provide features for distances.

A classifier is one safetensors file, whose header describes it as JSON: sizes, data set, recipe and accuracy. It is
trained once per data set and recipe, and cached.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffusion_core.cache import cache_path, keep
from diffusion_core.data.datasets import Dataset, to_unit
from diffusion_core.distributed import broadcast_weights, first_process_first
from diffusion_core.evaluation.classifier.network import SMALLEST_IMAGE, ClassifierNetwork
from diffusion_core.evaluation.classifier.training import RECIPES, Recipe, accuracy, recipe_for, train_classifier
from diffusion_core.evaluation.features import (
    HASH_DIGITS,
    ExtractorError,
    Judged,
    check_weights,
    images_hash,
    weights_file_hash,
    with_channels,
)
from diffusion_core.files import sha256
from diffusion_core.messages import one_line

HEADER = "classifier"
"""Key of the JSON in the file's metadata."""

VERSION = 2
"""Version of cached classifiers: increment it when those of before are not to be used."""

LARGEST = {"channels": 16, "num_classes": 100_000, "width": 1024}
"""Upper bounds of the sizes that a file may specify."""


@dataclass(frozen=True)
class Classifier:
    """A trained classifier. It is also the feature space ``classifier-DATA``.

    Attributes:
        network: the network, in evaluation mode.
        data: name of the data set that it was trained on.
        accuracy: share of the real held-out images that it classifies correctly, in [0, 1].
        weights: the first digits of the SHA-256 of its weights.
        recipe: settings of its training.
    """

    network: ClassifierNetwork
    data: str
    accuracy: float
    weights: str
    recipe: Recipe

    @property
    def name(self) -> str:
        """Name in protocols and figures: ``classifier-DATA``."""
        return f"classifier-{self.data}"

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor) -> Judged:
        """Map uint8 images, ``(N, C, H, W)``, to features, ``(N, D)``, and logits, ``(N, K)``, in float32.

        Raises:
            ExtractorError: if the images are smaller than ``SMALLEST_IMAGE``, or their channels cannot be converted.
        """
        parameter = next(self.network.parameters())
        x_BCHW = to_unit(with_channels(images_BCHW.to(parameter.device), self.network.channels))
        if min(x_BCHW.shape[2:]) < SMALLEST_IMAGE:
            raise ExtractorError(
                f"{self.name}: images of {tuple(x_BCHW.shape[2:])} pixels; expected at least {SMALLEST_IMAGE}"
            )
        features_BD, logits_BK = self.network(x_BCHW)
        return Judged(features_BD.float(), logits_BK.float())

    def class_agreement(self, images_NCHW: Tensor, labels: list[int]) -> float:
        """Return the share of uint8 images, in [0, 1], that are classified as the label they were sampled for."""
        seen = torch.cat([self(part).logits_BK.argmax(1).cpu() for part in images_NCHW.split(512)])  # type: ignore[union-attr]
        return float((seen == torch.tensor(labels)).float().mean())

    def described(self) -> dict[str, Any]:
        """Return all but the weights, as JSON: the header of its file."""
        return {
            "channels": self.network.channels,
            "num_classes": self.network.num_classes,
            "width": self.network.width,
            "data": self.data,
            "accuracy": self.accuracy,
            "recipe": asdict(self.recipe),
        }

    def save(self, path: Path) -> None:
        """Write the file that :func:`read_classifier` reads."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.network.state_dict().items()}
        # save_file would turn the system's errors into its own.
        path.write_bytes(save(tensors, metadata={HEADER: json.dumps(self.described())}))


def weights_hash(network: torch.nn.Module) -> str:
    """Return the first ``HASH_DIGITS`` digits of the SHA-256 of a network's weights and their names."""
    return sha256(*(part for entry in sorted(network.state_dict().items()) for part in entry))[:HASH_DIGITS]


def read_classifier(path: Path, device: torch.device) -> Classifier:
    """Read a classifier without running code from the file.

    Raises:
        ExtractorError: if the file is missing, damaged, or not a classifier, or a weight is not finite.
    """
    weights_file_hash(path)  # Raises a readable error if the file cannot be read.
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {})[HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
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
        raise ExtractorError(f"{str(path)!r}: not a classifier of scripts/train_classifier.py ({reason})") from None
    check_weights(tensors, path)
    network = network.to(device).eval()
    return Classifier(network, data, share, weights_hash(network), recipe)


def make_classifier(
    dataset: Dataset, data: str, recipe: Recipe, *, mirrored: bool, device: torch.device, progress: bool = False
) -> Classifier:
    """Train a classifier on a data set's training images, and measure its accuracy on the held-out ones.

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
    own: Sequence[Path] = (),
) -> Classifier:
    """Return the classifier of a data set from a run or the cache, or train it, which takes seconds for digits.

    On a GPU, or with another number of threads, training makes other weights. So the first file that is written stays,
    and all processes that trained at the same time return what it holds.

    Args:
        dataset: the images.
        data: the data set's name.
        mirrored: whether to mirror training images at random.
        device: where to compute.
        recipe: a key of ``RECIPES``; None selects one by image size, channels and device.
        progress: show a progress bar on stderr while training.
        own: files of a run that has judged images before, with its own classifier. The first one is written if it is
            missing. So the run goes on with the same one where the cache is another one.
    """
    for file in own:
        if (found := _kept(file, device)) is not None:
            return _keep_own(found, own)
    recipe = recipe or recipe_for(dataset.shape_CHW, device.type == "cuda")
    settings: dict[str, Any] = asdict(RECIPES[recipe]) | {"mirrored": mirrored}
    made_from = (
        f"{VERSION} {images_hash(dataset.train)} {images_hash(dataset.val)} {json.dumps(settings, sort_keys=True)}"
    )
    key = sha256(made_from)[:HASH_DIGITS]
    path = cache_path("classifiers", f"{data}-{recipe}-{key}.safetensors")
    if (found := _kept(path, device)) is not None:
        return _keep_own(found, own)
    classifier = make_classifier(dataset, data, RECIPES[recipe], mirrored=mirrored, device=device, progress=progress)
    keep(path, classifier.save, replace=False)
    return _keep_own(_kept(path, device) or classifier, own)


def _keep_own(classifier: Classifier, own: Sequence[Path]) -> Classifier:
    if own and not own[0].is_file():
        keep(own[0], classifier.save, remedy="free some space, or make it writable")
    return classifier


def agreed_classifier(
    dataset: Dataset, data: str, *, mirrored: bool, device: torch.device, own: Sequence[Path] = ()
) -> Classifier:
    """Return the first process's classifier (:func:`classifier_for`) in all processes, which call this together.

    The others wait while it trains. They need not see its cache, which may be on another machine.

    Raises:
        ExtractorError: in all processes, if the images are too small for the network.
    """
    state = PartialState()
    found: Classifier | None = None
    answer: dict[str, Any] | str | None = None
    with first_process_first(state):
        if state.is_main_process:
            try:
                found = classifier_for(dataset, data, mirrored=mirrored, device=device, own=own)
                answer = found.described()
            except ExtractorError as error:  # The others must not wait for ever.
                answer = str(error)
    (answer,) = broadcast_object_list([answer])
    if isinstance(answer, str):
        raise ExtractorError(answer)
    assert answer is not None
    if found is not None:
        broadcast_weights(found.network)
        return found
    network = ClassifierNetwork(**{key: answer[key] for key in LARGEST}).to(device).eval()
    broadcast_weights(network)
    return Classifier(network, answer["data"], answer["accuracy"], weights_hash(network), Recipe(**answer["recipe"]))


def _kept(path: Path, device: torch.device) -> Classifier | None:
    """Return the classifier in a file of the cache; None if it is missing, or damaged: then it is deleted."""
    if not path.is_file():
        return None
    try:
        return read_classifier(path, device)
    except ExtractorError:
        with suppress(OSError):
            path.unlink()
        return None
