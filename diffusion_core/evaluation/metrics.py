"""The figures that ``eval.figures`` chooses by name: one record each in ``METRICS``.

A record is of one of three kinds, by what the figure is computed from: features, images, or losses. Names and goals
are read where nothing is computed, so what computes a figure is imported when it does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from diffusion_core.config import DataConfig, EvalConfig
from diffusion_core.config.metrics import FID_FROM, LOSS_BUCKETS, Goal, Part, count_name, space_figure
from diffusion_core.registries import DATASETS, METRICS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffusion_core.data.datasets import Dataset, Images
    from diffusion_core.evaluation.measure import Reference, Seen


MOST_FOR_SVC = 10_000
"""Most images that a support vector classifier is trained on."""


@dataclass(frozen=True)
class Fewest:
    """How many images a figure needs at least.

    Attributes:
        images: number of images.
        classes: number of classes that the images are of.
        of_a_class: number of images of the most frequent class.
    """

    images: int = 1
    classes: int = 1
    of_a_class: int = 1

    def lacking(self, labels_N: Tensor, named: str) -> str | None:
        """Return what images with these labels lack, in words that name them; None if there are enough."""
        sizes = labels_N.unique(return_counts=True)[1].tolist()
        for least, present, what in (
            (self.images, sum(sizes), "images"),
            (self.classes, len(sizes), "classes of images"),
            (self.of_a_class, max(sizes, default=0), "images of one class"),
        ):
            if present < least:
                return f"needs at least {least} {what}, and {named} has {present}"
        return None


COVARIANCE, PAIR = Fewest(images=2), Fewest(of_a_class=2)


@dataclass(frozen=True)
class FeatureMetric:
    """A figure of generated images in each feature space of ``eval.extractors``.

    Attributes:
        parts: its numbers.
        compute: returns one value for each part. Fields of ``Seen`` and ``Reference`` that the record asks for are set.
        help: what it is, and its source.
        every_image: needs ``features_ND`` of both sides; otherwise ``statistics`` is enough.
        logits: needs ``logits_NK`` of the generated images.
        compares: depends on the reference.
        by_class: computed for the images of each class; the name ends in ``/CLASS``.
        fewest: what it needs of the generated images, and of the reference.
    """

    parts: Sequence[Part]
    compute: Callable[[Seen, Reference], Sequence[float]]
    help: str
    every_image: bool = True
    logits: bool = False
    compares: bool = True
    by_class: bool = False
    fewest: Fewest = COVARIANCE

    in_features: ClassVar[bool] = True
    of_images: ClassVar[bool] = True

    @property
    def labels(self) -> bool:
        """Whether the images must have labels."""
        return self.by_class

    @property
    def fewest_real(self) -> Fewest:
        """What it needs of the reference."""
        return self.fewest

    def goals(self, name: str) -> dict[str, Goal]:
        """Return the goals of its numbers, by pattern."""
        return {pattern: goal for part in self.parts for pattern, goal in part.goals().items()}

    def names(self, name: str, evaluation: EvalConfig, data: DataConfig) -> list[str]:
        """Return what a configuration logs, by pattern (``*``) where a file or a data set decides."""
        reference = evaluation.reference if self.compares else None
        least = DATASETS[data.name].least_images
        sizes = [1, evaluation.num_images] if least is None else [least]  # A folder's size is known once it is read.
        if self.by_class:
            patterns = [pattern for part in self.parts for pattern in part.goals()]
            return [f"{pattern.removesuffix('*')}*_{reference}/*" for pattern in patterns]
        return [
            space_figure(part, space, evaluation.num_images, reference, size)
            for space in evaluation.space_names(data.name)
            for part in self.parts
            for size in sizes
        ]


@dataclass(frozen=True)
class Real:
    """What generated images can be compared with.

    Attributes:
        dataset: the real images.
        config: the data set's knobs.
        device: device of networks.
    """

    dataset: Dataset
    config: DataConfig
    device: torch.device


@dataclass(frozen=True)
class ImageMetric:
    """A figure that is computed from the generated images themselves; it is logged as ``eval/NAME_COUNT``.

    Attributes:
        compute: returns the value from all generated images (uint8, on the processor) and the real ones. All processes
            call it with the same images.
        goal: which way it is better.
        help: what it is, and its source.
        labels: needs the labels of the images.
        split: the real images that it is compared with, named in its protocol: ``train`` or ``val``.
        fewest: what it needs of the generated images.
        fewest_real: what it needs of the real ones.
    """

    compute: Callable[[Images, Real], float]
    goal: Goal
    help: str
    labels: bool = False
    split: str = "val"
    fewest: Fewest = Fewest()
    fewest_real: Fewest = Fewest()

    in_features: ClassVar[bool] = False
    of_images: ClassVar[bool] = True

    def goals(self, name: str) -> dict[str, Goal]:
        """Return its goal, by pattern."""
        return {f"eval/{name}_*": self.goal}

    def names(self, name: str, evaluation: EvalConfig, data: DataConfig) -> list[str]:
        """Return what a configuration logs."""
        return [f"eval/{name}_{count_name(evaluation.num_images)}"]


@dataclass(frozen=True)
class LossMetric:
    """Figures that are computed from the losses of held-out images.

    Attributes:
        compute: returns figures by name from losses and timesteps, both ``(N,)``, and the number of timesteps.
        figures: all names that it can return.
        pattern: a pattern (``*``) that fits them and no others.
        goal: which way they are better.
        help: what they are, and their source.
    """

    compute: Callable[[Tensor, Tensor, int], Mapping[str, float]]
    figures: Sequence[str]
    pattern: str
    goal: Goal
    help: str

    labels: ClassVar[bool] = False
    in_features: ClassVar[bool] = False
    of_images: ClassVar[bool] = False

    def goals(self, name: str) -> dict[str, Goal]:
        """Return their goal, by pattern."""
        return {self.pattern: self.goal}

    def names(self, name: str, evaluation: EvalConfig, data: DataConfig) -> list[str]:
        """Return what a configuration logs."""
        return list(self.figures)


FD = Part("fd", "minimize", inception="fid", inception_from=FID_FROM)


def _frechet(seen: Seen, reference: Reference) -> list[float]:
    return [seen.statistics.distance(reference.statistics)]


def _kernel(seen: Seen, reference: Reference) -> list[float]:
    from diffusion_core.evaluation.distances import kernel_distance

    assert seen.features_ND is not None
    assert reference.features_ND is not None
    return [kernel_distance(seen.features_ND, reference.features_ND)]


def _score(seen: Seen, reference: Reference) -> list[float]:
    from diffusion_core.evaluation.distances import inception_score

    assert seen.logits_NK is not None
    return [inception_score(seen.logits_NK)]


def _precision_recall(seen: Seen, reference: Reference) -> Sequence[float]:
    from diffusion_core.evaluation.distances import precision_recall

    assert seen.features_ND is not None
    assert reference.features_ND is not None
    return precision_recall(seen.features_ND, reference.features_ND)


def _density_coverage(seen: Seen, reference: Reference) -> Sequence[float]:
    from diffusion_core.evaluation.distances import density_coverage

    assert seen.features_ND is not None
    assert reference.features_ND is not None
    return density_coverage(seen.features_ND, reference.features_ND)


def _synthetic_accuracy(images: Images, real: Real) -> float:
    """Return the accuracy, on real held-out images, of a classifier trained only on generated images."""
    from diffusion_core.distributed import broadcast_weights
    from diffusion_core.evaluation.classifier.training import RECIPES, accuracy, recipe_for, train_classifier

    recipe = RECIPES[recipe_for(real.dataset.shape_CHW, real.device.type == "cuda")]
    mirrored = real.config.flips
    network = train_classifier(images, real.dataset.num_classes, recipe, mirrored=mirrored, device=real.device)
    broadcast_weights(network)
    return accuracy(network, real.dataset.val)


def _svc_accuracy(train: Images, test: Images) -> float:
    """Return the accuracy on some images of a support vector classifier that was trained on others.

    It is scikit-learn's with its defaults, a radial kernel on pixels in [0, 1]. Its time grows with the square of the
    training images, so of more than ``MOST_FOR_SVC`` it sees that many, each class in its proportion.
    """
    from sklearn.svm import SVC  # Slow to import.

    train = _of_each_class(train, MOST_FOR_SVC)
    network = SVC().fit(train.images_NCHW.flatten(1).numpy() / 255.0, train.labels_N.numpy())
    return float(network.score(test.images_NCHW.flatten(1).numpy() / 255.0, test.labels_N.numpy()))


def _of_each_class(images: Images, most: int) -> Images:
    """Return at most ``most`` images in their order: all, or evenly spaced ones of each class in its proportion.

    Spacing all images evenly would lose classes, because labels of generated images alternate.
    """
    total = len(images)
    if total <= most:
        return images
    by_class_N = images.labels_N.argsort(stable=True)
    chosen_N = by_class_N[[index * total // most for index in range(most)]]
    return images.select(chosen_N.sort().values)


def class_variances(images: Images, num_classes: int) -> dict[int, float]:
    """Return the variance of pixels within each class of two images or more: the mean over pixels and channels."""
    values_NCHW = images.images_NCHW.double()
    classes = {label: values_NCHW[images.labels_N == label] for label in range(num_classes)}
    return {label: float(each.var(dim=0).mean()) for label, each in classes.items() if len(each) > 1}


def _diversity(images: Images, real: Real) -> float:
    """Return the variance of pixels within classes, generated over real, of the classes that both have; NaN without."""
    count = real.dataset.num_classes
    ours, theirs = class_variances(images, count), class_variances(real.dataset.train, count)
    both = sorted(ours.keys() & theirs.keys())
    return sum(ours[label] for label in both) / sum(theirs[label] for label in both) if both else float("nan")


def _by_timestep(losses_N: Tensor, t_N: Tensor, timesteps: int) -> Mapping[str, float]:
    from diffusion_core.evaluation.validation import by_timestep

    return by_timestep(losses_N, t_N, timesteps)


METRICS["frechet"] = FeatureMetric([FD], _frechet, "Fréchet distance (FID)", every_image=False)
METRICS["kernel"] = FeatureMetric([Part("kd", "minimize", inception="kid")], _kernel, "kernel distance (KID)")
METRICS["score"] = FeatureMetric(
    [Part("score", "maximize", inception="inception_score")],
    _score,
    "Inception score",
    logits=True,
    compares=False,
)
METRICS["precision_recall"] = FeatureMetric(
    [Part("precision", "maximize"), Part("recall", "maximize")], _precision_recall, "precision and recall"
)
METRICS["density_coverage"] = FeatureMetric(
    [Part("density", "maximize"), Part("coverage", "maximize")], _density_coverage, "density and coverage"
)
METRICS["per_class"] = FeatureMetric([FD], _frechet, "Fréchet distance of each class", by_class=True, fewest=PAIR)
METRICS["loss_by_timestep"] = LossMetric(
    _by_timestep,
    [f"val/loss_t{part}" for part in range(LOSS_BUCKETS)],
    "val/loss_t*",
    "minimize",
    "val/loss in ten ranges of timesteps",
)
METRICS["synthetic_accuracy"] = ImageMetric(
    _synthetic_accuracy,
    "maximize",
    "accuracy on real images of a classifier that was trained on generated ones",
    labels=True,
    fewest=Fewest(images=2),  # Batch norm has no variance of one.
)
METRICS["svc_agreement"] = ImageMetric(
    lambda images, real: _svc_accuracy(real.dataset.train, images),
    "maximize",
    "share of images that a support vector classifier of real ones assigns to their label",
    labels=True,
    split="train",
    fewest_real=Fewest(classes=2),
)
METRICS["svc_synthetic_accuracy"] = ImageMetric(
    lambda images, real: _svc_accuracy(images, real.dataset.val),
    "maximize",
    "accuracy on real images of a support vector classifier that was trained on generated ones",
    labels=True,
    fewest=Fewest(classes=2),
)
METRICS["diversity"] = ImageMetric(
    _diversity,
    "maximize",
    "variance of pixels within classes, generated over real; it falls where images of a class become alike",
    labels=True,
    split="train",
    fewest=PAIR,
    fewest_real=PAIR,
)
