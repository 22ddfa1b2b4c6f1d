"""The evaluation of images of a data set: feature networks, their references and a classifier.

Axes: B batch, C channels, H height, W width, N images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from diffusion_core.config import DataConfig, EvalConfig
from diffusion_core.config.metrics import INCEPTION, Part, count_name
from diffusion_core.data.datasets import Dataset, Images
from diffusion_core.distributed import gather_in_order
from diffusion_core.evaluation.classifier.classifier import Classifier, agreed_classifier
from diffusion_core.evaluation.extractors.find import agreed_extractor
from diffusion_core.evaluation.features import Extractor, ExtractorError
from diffusion_core.evaluation.measure import (
    Reference,
    Seen,
    class_agreement,
    compare,
    look,
    needs_every_image,
    too_few,
)
from diffusion_core.evaluation.metrics import ImageMetric, Real
from diffusion_core.evaluation.protocol import protocol
from diffusion_core.evaluation.reference import Share, reference_for
from diffusion_core.model.unet import NO_LABEL
from diffusion_core.registries import METRICS
from diffusion_core.terminal.progress import say

Say = Callable[[str], None]
"""Receives one line for the user."""

AGREEMENT = "eval/class_agreement"


@dataclass(frozen=True)
class Judgement:
    """Figures by name, and their protocols."""

    figures: dict[str, float] = field(default_factory=dict)
    protocols: dict[str, str] = field(default_factory=dict)

    def add(self, figures: dict[str, float], line: str) -> None:
        """Add figures that have one protocol."""
        self.figures.update(figures)
        self.protocols.update(dict.fromkeys(figures, line))

    def join(self, other: Judgement) -> None:
        """Add the figures of another judgement, with their protocols."""
        self.figures.update(other.figures)
        self.protocols.update(other.protocols)

    def compare(
        self,
        figures: Iterable[str],
        seen: Seen,
        reference: Reference,
        images: str,
        extractor: Extractor | None,
        class_names: Sequence[str] = (),
    ) -> None:
        """Add figures of one feature space (:func:`~diffusion_core.evaluation.measure.compare`)."""
        for figure in figures:
            found = compare([figure], seen, reference, class_names)
            source = reference.source if found and METRICS[figure].compares else None
            self.add(found, protocol(seen.statistics.count, images, extractor, source))


def to_stderr(line: str) -> None:
    """Print a line to stderr."""
    say(line)


class Suite:
    """Evaluates images with the figures and feature spaces of a configuration.

    Feature networks that a process cannot have are reported in one line each, and all processes omit their figures.

    Args:
        data: the data set's knobs.
        config: figures, feature spaces and reference.
        dataset: the real images.
        with_classifier: measure class agreement.
        device: device of the networks.
        say: receives warnings, such as a missing network.
        share: called with reference statistics that were computed, not read from the cache.
        must_have: raise an error if a feature network is missing.
        own: files of the run's own classifier, as in :func:`~.classifier.classifier.classifier_for`.

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
        own: Sequence[Path] = (),
    ) -> None:
        self.data, self.config, self.dataset = data, config, dataset
        self.device, self.say, self.share, self.own = device, say, share, own
        self.keeps = needs_every_image(config.figures)
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
        for part in self._parts() if any(extractor.name == INCEPTION for extractor in self.extractors) else ():
            if part.inception and config.num_images < part.inception_from:
                say(
                    f"eval.num_images = {config.num_images}: figures named {part.name} depend on the number of images; "
                    f"they are called {part.inception} from {part.inception_from:,}"
                )

    def _parts(self) -> list[Part]:
        """Return the numbers of all figures in feature spaces, each once."""
        records = [METRICS[figure] for figure in self.config.figures]
        return list({part.name: part for record in records if record.in_features for part in record.parts}.values())

    def _extractor(self, wanted: str) -> Extractor:
        if wanted == "classifier":
            return self.classifier or self._train_classifier()
        return agreed_extractor(wanted, self.config.inception_weights, self.device)

    def _train_classifier(self) -> Classifier:
        name, mirrored = self.data.name, self.data.flips
        return agreed_classifier(self.dataset, name, mirrored=mirrored, device=self.device, own=self.own)

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
        of_images = [name for name in self.config.figures if isinstance(METRICS[name], ImageMetric)]
        kept: list[tuple[Tensor, Tensor | None]] = []
        if not self.networks and not of_images:
            return found
        seen = look(self.networks, _noting(batches, kept if of_images else None), total, keep=self.keeps)
        everything = self._gathered(kept, total) if of_images else None
        labels_N = everything.labels_N if everything else seen[0].labels_N
        figures = self._possible(torch.full((total,), NO_LABEL) if labels_N is None else labels_N)
        for extractor, view in zip(self.networks, seen, strict=True):
            if extractor is self.classifier and view.labels_N is not None and bool((view.labels_N >= 0).all()):
                found.add({AGREEMENT: class_agreement(view)}, protocol(total, images, extractor))
            if any(extractor is own for own in self.extractors):
                reference, names = self._reference(extractor), self.dataset.class_names
                in_features = [name for name in figures if METRICS[name].in_features]
                found.compare(in_features, view, reference, images, extractor, names)
        labelled = bool(kept) and kept[0][1] is not None
        for name in (name for name in of_images if name in figures):
            record = METRICS[name]
            if everything is not None and (labelled or not record.labels):
                value = record.compute(everything, Real(self.dataset, self.data, self.device))
                line = protocol(total, images, None, f"{self.data.name}/{record.split}")
                found.add({f"eval/{name}_{count_name(total)}": value}, line)
        return found

    def _possible(self, labels_N: Tensor) -> list[str]:
        """Return the figures that images with these labels are enough for; say of the others what they need."""
        needs = dict(too_few(self.config.figures, labels_N, "the judged set", self.dataset, self.config.reference))
        for figure, need in needs.items():
            self.say(f"no figure {figure}: {need}")
        return [figure for figure in self.config.figures if figure not in needs]

    def _gathered(self, kept: list[tuple[Tensor, Tensor | None]], total: int) -> Images:
        """Return the images of all processes, in order; their labels are -1 if they have none."""
        images_NCHW = torch.cat([images for images, _ in kept])
        nameless = ((torch.full((len(images),), NO_LABEL), given) for images, given in kept)
        labels_N = torch.cat([none if given is None else given for none, given in nameless])
        return Images(gather_in_order(images_NCHW, total), gather_in_order(labels_N, total))


def _noting(
    batches: Iterable[tuple[Tensor, Tensor | None]], kept: list[tuple[Tensor, Tensor | None]] | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    for batch in batches:
        if kept is not None:
            kept.append(batch)
        yield batch
