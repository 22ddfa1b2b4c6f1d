"""Every figure worsens, step by step, as real digits get worse: noise, blur, and a class after the other missing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import pytest
import torch
from tiny import digits
from torch import Tensor

from diffusion_core.config.metrics import goal_of
from diffusion_core.data.datasets import Images
from diffusion_core.evaluation.classifier.classifier import Classifier, classifier_for
from diffusion_core.evaluation.consistency import mean_squared_difference, structural_similarity
from diffusion_core.evaluation.measure import Reference, class_agreement, compare, look

FIGURES = ("frechet", "kernel", "score", "precision_recall", "density_coverage", "per_class")
NOISE = (0.0, 30.0, 60.0, 120.0)
BLUR = (0.0, 0.55, 0.7, 0.85)
CLASSES_LEFT = (10, 7, 4, 1)


@cache
def classifier() -> Classifier:
    return classifier_for(digits(), "digits", mirrored=False, device=torch.device("cpu"))


@cache
def parts() -> tuple[Images, Images]:
    """Two parts of the real training digits: one is made worse, the other is what it is compared to."""
    train = digits().train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return train.select(order[:400]), train.select(order[400:])


@cache
def reference() -> Reference:
    real = parts()[1]
    (seen,) = look([classifier()], [(real.images_NCHW, real.labels_N)], len(real), keep=True)
    return Reference("train", "part", seen.statistics, seen.features_ND, seen.labels_N)


def figures_of(images: Images) -> dict[str, float]:
    """All figures, by the first part of their names (the number of images changes as classes are dropped)."""
    (seen,) = look([classifier()], [(images.images_NCHW, images.labels_N)], len(images), keep=True)
    found = compare(FIGURES, seen, reference(), digits().class_names)
    short = {name.split("_")[0]: value for name, value in found.items() if "/" not in name.removeprefix("eval/")}
    per_class = [value for name, value in found.items() if "/" in name.removeprefix("eval/")]
    return short | {"per class": sum(per_class) / len(per_class), "eval/class_agreement": class_agreement(seen)}


def noisy(images_NCHW: Tensor, level: float) -> Tensor:
    noise = torch.randn(images_NCHW.shape, generator=torch.Generator().manual_seed(1))
    return (images_NCHW + level * noise).clamp(0, 255).to(torch.uint8)


def blurred(images_NCHW: Tensor, sigma: float) -> Tensor:
    from torchvision.transforms.v2.functional import gaussian_blur

    return gaussian_blur(images_NCHW, [7, 7], [sigma, sigma]) if sigma else images_NCHW


def check_worsens(series: Sequence[float], name: str) -> None:
    """Down for figures that are to be high, up for the others."""
    sign = -1.0 if goal_of(f"{name}_x") == "maximize" or goal_of(name) == "maximize" else 1.0
    steps = [sign * (after - before) for before, after in pairwise(series)]
    assert all(step > 0.0 for step in steps), f"{name}: {series}"


@pytest.mark.parametrize(("make", "levels"), [(noisy, NOISE), (blurred, BLUR)], ids=["noise", "blur"])
def test_every_figure_of_fidelity_worsens(make: object, levels: tuple[float, ...]) -> None:
    real = parts()[0]
    found = [figures_of(Images(make(real.images_NCHW, level), real.labels_N)) for level in levels]  # type: ignore[operator]
    # Nothing can be lost of what is zero already.
    names = [
        "eval/fd",
        "eval/kd",
        "eval/precision",
        "eval/density",
        "eval/coverage",
        "per class",
        "eval/class_agreement",
    ]
    for name in names:
        series = [figures[name] for figures in found]
        floor = [value for index, value in enumerate(series) if index == 0 or max(series[index - 1 : index + 1]) > 0.01]
        assert len(floor) >= 3, f"{name}: {series}"
        check_worsens(floor, name)
    check_worsens([figures["eval/score"] for figures in found], "eval/score")


def test_figures_of_variety_worsen_as_classes_are_dropped() -> None:
    real = parts()[0]
    found = [figures_of(real.select((real.labels_N < left).nonzero()[:, 0])) for left in CLASSES_LEFT]
    for name in ("eval/fd", "eval/kd", "eval/recall", "eval/coverage", "eval/score"):
        check_worsens([figures[name] for figures in found], name)
    # Those that remain are as real as before.
    for name in ("eval/precision", "eval/class_agreement"):
        assert found[-1][name] > 0.9 * found[0][name], name


@pytest.mark.parametrize(("make", "levels"), [(noisy, NOISE), (blurred, BLUR)], ids=["noise", "blur"])
def test_consistency_worsens(make: object, levels: tuple[float, ...]) -> None:
    real = parts()[0].images_NCHW
    worse = [make(real, level) for level in levels]  # type: ignore[operator]
    check_worsens([float(structural_similarity(real, images).mean()) for images in worse], "eval/consistency_ssim")
    check_worsens([float(mean_squared_difference(real, images).mean()) for images in worse], "eval/consistency_mse")
