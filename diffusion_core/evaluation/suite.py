"""The evaluation of images of a data set: feature networks, their references and a classifier.

Axes: B batch, C channels, H height, W width, N images.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from diffusion_core.config import DataConfig, EvalConfig
from diffusion_core.config.metrics import FID_FROM, INCEPTION, count_name
from diffusion_core.data.datasets import Dataset, Images
from diffusion_core.distributed import broadcast_weights, gather_in_order
from diffusion_core.evaluation.classifier.classifier import Classifier, classifier_for
from diffusion_core.evaluation.classifier.training import RECIPES, accuracy, recipe_for, train_classifier
from diffusion_core.evaluation.extractors import download_inception, read_extractor, read_inception
from diffusion_core.evaluation.features import Extractor, ExtractorError
from diffusion_core.evaluation.measure import KEPT_FIGURES, Reference, class_agreement, compare, look
from diffusion_core.evaluation.protocol import protocol, protocols
from diffusion_core.evaluation.reference import Share, reference_for

Say = Callable[[str], None]
"""Receives one line for the user."""

AGREEMENT = "eval/class_agreement"
SYNTHETIC = "eval/synthetic_accuracy"


@dataclass(frozen=True)
class Judgement:
    """Figures by name, and their protocols."""

    figures: dict[str, float] = field(default_factory=dict)
    protocols: dict[str, str] = field(default_factory=dict)


def to_stderr(line: str) -> None:
    """Print a line to stderr."""
    print(line, file=sys.stderr)


class Suite:
    """Evaluates images with the figures and feature spaces of a configuration.

    Missing feature networks are reported in one line each, and their figures are omitted.

    Args:
        data: the data set's knobs.
        config: figures, feature spaces and reference.
        dataset: the real images.
        with_classifier: measure class agreement.
        device: device of the networks.
        say: receives warnings, such as a missing network.
        share: called with reference statistics that were computed, not read from the cache.
        must_have: raise an error if a feature network is missing.

    Raises:
        ExtractorError: with ``must_have``, if a feature network is missing.
    """

    def __init__(
        self,
        data: DataConfig,
        config: EvalConfig,
        dataset: Dataset,
        *,
        with_classifier: bool,
        device: torch.device,
        say: Say = to_stderr,
        share: Share | None = None,
        must_have: bool = False,
    ) -> None:
        self.data, self.config, self.dataset = data, config, dataset
        self.device, self.say, self.share = device, say, share
        self.keeps = bool(KEPT_FIGURES & set(config.figures))
        self.classifier: Classifier | None = self._train_classifier() if with_classifier else None
        self.references: dict[str, Reference] = {}
        self.extractors: list[Extractor] = []
        for wanted in config.extractors if config.in_features else ():
            try:
                self.extractors.append(self._extractor(wanted))
            except ExtractorError as error:
                if must_have:
                    raise
                say(f"no figures in features of {wanted}: {error}")
        if self.extractors and {"frechet", "per_class"} & set(config.figures) and config.num_images < FID_FROM:
            say(
                f"eval.num_images = {config.num_images}: the Fréchet distance depends on the number of images and is "
                f"not called FID below {FID_FROM:,}"
            )

    def _extractor(self, wanted: str) -> Extractor:
        if wanted == "classifier":
            return self.classifier or self._train_classifier()
        if wanted == INCEPTION:
            path = Path(self.config.inception_weights) if self.config.inception_weights else download_inception()
            return read_inception(path, self.device)
        return read_extractor(Path(wanted), self.device)

    def _train_classifier(self) -> Classifier:
        classifier = classifier_for(self.dataset, self.data.name, mirrored=self.data.flips, device=self.device)
        broadcast_weights(classifier.network)
        return classifier

    @property
    def networks(self) -> list[Extractor]:
        """All networks that evaluate the images, each once."""
        judges = [] if self.classifier is None else [self.classifier]
        return list({id(network): network for network in [*self.extractors, *judges]}.values())

    def _reference(self, extractor: Extractor) -> Reference:
        if extractor.name not in self.references:
            images = self.dataset.train if self.config.reference == "train" else self.dataset.val
            self.references[extractor.name] = reference_for(
                images, self.data.name, self.config.reference, extractor, keep_features=self.keeps, share=self.share
            )
        return self.references[extractor.name]

    def judge(self, batches: Iterable[tuple[Tensor, Tensor | None]], total: int, images: str) -> Judgement:
        """Return the figures of images; all processes call this together.

        Args:
            batches: this process's share (``own_positions``) of the uint8 images, and their labels.
            total: number of images of all processes.
            images: their source, for protocols.
        """
        found = Judgement()
        synthetic = "synthetic_accuracy" in self.config.figures
        kept: list[tuple[Tensor, Tensor | None]] = []
        if not self.networks and not synthetic:
            return found
        seen = look(self.networks, _noting(batches, kept if synthetic else None), total, keep=self.keeps)
        for extractor, view in zip(self.networks, seen, strict=True):
            if extractor is self.classifier and view.labels_N is not None and bool((view.labels_N >= 0).all()):
                found.figures[AGREEMENT] = class_agreement(view)
                found.protocols[AGREEMENT] = protocol(total, images, extractor)
            if any(extractor is own for own in self.extractors):
                reference = self._reference(extractor)
                figures = compare(self.config.figures, view, reference, self.dataset.class_names)
                found.figures.update(figures)
                found.protocols.update(protocols(figures, total, images, extractor, reference.source))
        if synthetic and kept and kept[0][1] is not None:
            name = f"{SYNTHETIC}_{count_name(total)}"
            found.figures[name] = self._synthetic_accuracy(kept, total)
            found.protocols[name] = protocol(total, images, None, f"{self.data.name}/val")
        return found

    def _synthetic_accuracy(self, kept: list[tuple[Tensor, Tensor | None]], total: int) -> float:
        """Return the accuracy, on real held-out images, of a classifier trained only on generated images."""
        images_NCHW = gather_in_order(torch.cat([images for images, _ in kept]), total)
        labels_N = gather_in_order(torch.cat([labels for _, labels in kept if labels is not None]), total)
        recipe = RECIPES[recipe_for(self.dataset.shape_CHW, self.device.type == "cuda")]
        network = train_classifier(
            Images(images_NCHW, labels_N),
            self.dataset.num_classes,
            recipe,
            mirrored=self.data.flips,
            device=self.device,
        )
        broadcast_weights(network)
        return accuracy(network, self.dataset.val)


def _noting(
    batches: Iterable[tuple[Tensor, Tensor | None]], kept: list[tuple[Tensor, Tensor | None]] | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    for batch in batches:
        if kept is not None:
            kept.append(batch)
        yield batch
