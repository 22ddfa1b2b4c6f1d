"""Compute figures from features, in one pass over the images.

Axes: N images, B batch, C channels, H height, W width, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusion_core.config import ConfigError
from diffusion_core.config.metrics import space_figure
from diffusion_core.data.datasets import DataError, Dataset
from diffusion_core.distributed import gather_in_order, own_positions, sum_over_processes
from diffusion_core.evaluation.distances import Moments, Statistics
from diffusion_core.evaluation.features import Extractor, check_finite
from diffusion_core.registries import METRICS

FEWEST = 2
"""Number of images that a covariance needs."""
LABELS, DATA_SET, EVERY_IMAGE, CLASSES = "labels", "a data set", "the features of every image", "the classes of images"
"""What a figure may need that some images do not come with."""


@dataclass(frozen=True)
class Seen:
    """The result of a pass over images, in one feature space.

    Attributes:
        space: name of the feature space.
        statistics: mean and covariance of the features of all images.
        features_ND: features of every image, or None if only moments were computed.
        logits_NK: class logits of every image, or None if the network has no classes.
        labels_N: classes of the images, or None if they have none.
    """

    space: str
    statistics: Statistics
    features_ND: Tensor | None = None
    logits_NK: Tensor | None = None
    labels_N: Tensor | None = None


@dataclass(frozen=True)
class Reference:
    """The real images that generated ones are compared with, in one feature space.

    Attributes:
        name: its name in figures, such as ``train``.
        source: its name in protocols: data set, number of images, hash.
        statistics: mean and covariance of the features.
        features_ND: features of every image, or None.
        labels_N: classes of the images, or None.
    """

    name: str
    source: str
    statistics: Statistics
    features_ND: Tensor | None = None
    labels_N: Tensor | None = None


class Pass:
    """One pass over this process's share of the images, in several feature spaces at once.

    Args:
        extractors: the feature networks.
        total: number of images of all processes; batches come in the order of ``own_positions(total)``.
        keep: keep the features of every image, not only moments.
    """

    def __init__(self, extractors: Sequence[Extractor], total: int, *, keep: bool) -> None:
        self.extractors = extractors
        self.total = total
        self.keep = keep
        self.positions = own_positions(total)
        self.done = 0
        self.moments: list[Moments] = []
        self.features: list[list[Tensor]] = [[] for _ in extractors]
        self.logits: list[list[Tensor]] = [[] for _ in extractors]
        self.labels: list[Tensor] = []

    def add(self, images_BCHW: Tensor, labels_B: Tensor | None = None) -> None:
        """Add the next uint8 images and their labels."""
        positions = self.positions[self.done : self.done + len(images_BCHW)]
        counted = sum(position < self.total for position in positions)  # Padding comes last.
        self.done += len(images_BCHW)
        if labels_B is not None:
            self.labels.append(labels_B)
        for index, extractor in enumerate(self.extractors):
            judged = extractor(images_BCHW)
            features_BD = judged.features_BD.float().cpu()
            check_finite(features_BD, extractor.name)
            if len(self.moments) == index:
                self.moments.append(Moments.empty(features_BD.shape[1]))
            self.moments[index].add(features_BD[:counted])
            if self.keep:
                self.features[index].append(features_BD)
            if judged.logits_BK is not None:
                self.logits[index].append(judged.logits_BK.float().cpu())

    def finish(self) -> list[Seen]:
        """Return the results over all processes, one per feature space."""
        labels_N = gather_in_order(torch.cat(self.labels), self.total) if self.labels else None
        seen = []
        for index, extractor in enumerate(self.extractors):
            moments = self.moments[index]
            count, sum_D, outer_DD = sum_over_processes(
                torch.cat([torch.tensor([float(moments.count)]).double(), moments.sum_D, moments.outer_DD.flatten()])
            ).split([1, len(moments.sum_D), moments.outer_DD.numel()])
            moments = Moments(int(count), sum_D, outer_DD.view_as(moments.outer_DD))
            features_ND = gather_in_order(torch.cat(self.features[index]), self.total) if self.keep else None
            logits_NK = gather_in_order(torch.cat(self.logits[index]), self.total) if self.logits[index] else None
            seen.append(Seen(extractor.name, moments.statistics(), features_ND, logits_NK, labels_N))
        return seen


def look(
    extractors: Sequence[Extractor],
    batches: Iterable[tuple[Tensor, Tensor | None]],
    total: int,
    *,
    keep: bool,
) -> list[Seen]:
    """Make one pass over this process's share of uint8 images and labels, in several feature spaces."""
    view = Pass(extractors, total, keep=keep)
    for images_BCHW, labels_B in batches:
        view.add(images_BCHW, labels_B)
    return view.finish()


def class_agreement(seen: Seen) -> float:
    """Return the share of images, in [0, 1], that are classified as the label they were sampled for."""
    assert seen.logits_NK is not None
    assert seen.labels_N is not None
    return float((seen.logits_NK.argmax(1) == seen.labels_N).double().mean())


def needs_every_image(figures: Iterable[str]) -> bool:
    """Return whether a figure of a feature space needs the features of every image, not only mean and covariance."""
    return any(METRICS[figure].in_features and METRICS[figure].every_image for figure in figures)


def check_figures(figures: Iterable[str], named: str, lacks: Collection[str]) -> None:
    """Check that figures that the user asked for can be measured.

    Args:
        figures: names in ``METRICS``.
        named: the images, for messages.
        lacks: what they do not come with.

    Raises:
        ConfigError: if a figure needs it.
    """
    for figure in figures:
        record = METRICS[figure]
        needs = {
            LABELS: record.labels,
            DATA_SET: not record.in_features,
            EVERY_IMAGE: record.in_features and record.every_image and record.compares,
            CLASSES: record.in_features and record.logits,
        }
        for what in (what for what, needed in needs.items() if needed and what in lacks):
            raise ConfigError(f"--figures = {figure!r}: needs {what}, and {named} has none; leave it out")


def check_enough(figures: Iterable[str], labels_N: Tensor, named: str, dataset: Dataset, reference: str) -> None:
    """Check that figures that the user asked for can be computed of so many images (:func:`too_few`).

    Raises:
        ConfigError: if one cannot.
    """
    for figure, need in too_few(figures, labels_N, named, dataset, reference):
        raise ConfigError(f"--figures = {figure!r}: {need}; leave it out")


def too_few(
    figures: Iterable[str], labels_N: Tensor, named: str, dataset: Dataset, reference: str
) -> Iterator[tuple[str, str]]:
    """Yield the figures that cannot be computed of so few images, generated or real, each with what it needs.

    Args:
        figures: names in ``METRICS``.
        labels_N: labels of the images; -1 where they have none.
        named: the images, for messages.
        dataset: the real images.
        reference: the split that figures in features are compared with.
    """
    for figure in figures:
        record = METRICS[figure]
        if record.of_images:
            split = reference if record.in_features else record.split
            real = dataset.train if split == "train" else dataset.val
            whole = f"the {split} split of the real images"
            if need := record.fewest.lacking(labels_N, named) or record.fewest_real.lacking(real.labels_N, whole):
                yield figure, need


def compare(
    figures: Iterable[str], seen: Seen, reference: Reference, class_names: Sequence[str] = ()
) -> dict[str, float]:
    """Return figures of images in one feature space, by their full names.

    Args:
        figures: names in ``METRICS``. Omitted are those of other kinds, and those that the space or the reference does
            not support (no classes, no score).
        seen: the images.
        reference: the images that they are compared with.
        class_names: by label, for figures of each class.

    Raises:
        DataError: if there are too few images for a covariance, or the feature spaces differ.
    """
    count, known = seen.statistics.count, reference.statistics.count
    if min(count or FEWEST, known or FEWEST) < FEWEST:
        raise DataError(f"{count} images against {known}: expected at least {FEWEST} on both sides to compare them")
    if len(seen.statistics.mean_D) != len(reference.statistics.mean_D):
        raise DataError(
            f"features of {len(seen.statistics.mean_D)} numbers, and of {len(reference.statistics.mean_D)} in "
            f"{reference.source}: they are of different networks"
        )
    found: dict[str, float] = {}
    for figure in figures:
        record = METRICS[figure]
        if not record.in_features or (record.logits and seen.logits_NK is None):
            continue
        if record.every_image and record.compares and (seen.features_ND is None or reference.features_ND is None):
            continue
        pairs = _by_class(seen, reference, class_names) if record.by_class else [("", seen, reference)]
        for suffix, ours, theirs in pairs:
            compared = theirs.name if record.compares else None
            for part, value in zip(record.parts, record.compute(ours, theirs), strict=True):
                name = space_figure(part, seen.space, ours.statistics.count, compared, theirs.statistics.count)
                found[name + suffix] = value
    return found


def _by_class(seen: Seen, reference: Reference, class_names: Sequence[str]) -> Iterator[tuple[str, Seen, Reference]]:
    """Yield the images of each class that has enough of them on both sides, and the end of the figure's name."""
    if seen.labels_N is None or reference.labels_N is None:
        return
    assert seen.features_ND is not None
    assert reference.features_ND is not None
    for label, class_name in enumerate(class_names):
        of_ours_N, of_theirs_N = seen.labels_N == label, reference.labels_N == label
        ours_ND, theirs_ND = seen.features_ND[of_ours_N], reference.features_ND[of_theirs_N]
        if min(len(ours_ND), len(theirs_ND)) < FEWEST:
            continue
        yield (
            f"/{class_name}",
            replace(
                seen,
                statistics=Moments.of(ours_ND).statistics(),
                features_ND=ours_ND,
                logits_NK=None if seen.logits_NK is None else seen.logits_NK[of_ours_N],
                labels_N=seen.labels_N[of_ours_N],
            ),
            replace(
                reference,
                statistics=Moments.of(theirs_ND).statistics(),
                features_ND=theirs_ND,
                labels_N=reference.labels_N[of_theirs_N],
            ),
        )
