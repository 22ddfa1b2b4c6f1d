"""Figures: validation loss and class agreement mean what they say."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import digits, tiny_config, tiny_network

from diffusion_core import evaluation
from diffusion_core.data import Dataset, Images
from diffusion_core.evaluation import PixelClassifier, build_classifier, validation_loss
from diffusion_core.figure_names import is_better
from diffusion_core.unet import build_network

CONFIG = tiny_config(eval__val_images=300)


def test_validation_loss_is_the_same_on_every_call() -> None:
    network = tiny_network()
    first = validation_loss(network, digits().val, CONFIG, "fp32")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert validation_loss(network, digits().val, CONFIG, "fp32") == first
    assert torch.equal(state, torch.get_rng_state())
    # Nor does it follow the run's seed: other runs are measured on the same noise.
    assert validation_loss(network, digits().val, tiny_config(eval__val_images=300, seed=7), "fp32") == first
    assert validation_loss(tiny_network(seed=1), digits().val, CONFIG, "fp32") != first


@pytest.mark.parametrize("batch", [1, 7, 128, 300, 1000])
def test_validation_loss_does_not_depend_on_the_batch_size(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny_network()
    expected = validation_loss(network, digits().val, CONFIG, "fp32")
    monkeypatch.setattr(evaluation, "VALIDATION_BATCH", batch)
    assert validation_loss(network, digits().val, CONFIG, "fp32") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("kind", "moment"), [("l2", 1.0), ("l1", math.sqrt(2 / math.pi))])
def test_validation_loss_of_a_network_that_says_zero_is_the_moment_of_the_noise(kind: str, moment: float) -> None:
    config = tiny_config(eval__val_images=300, diffusion__loss=kind)
    network = build_network(config, 10).eval()  # Its last layer starts at zero.
    found = validation_loss(network, digits().val, config, "fp32")
    assert found == pytest.approx(moment, abs=5 * math.sqrt(2 / (300 * 64)))


def test_validation_uses_labels_as_many_images_as_asked_and_spreads_timesteps() -> None:
    network = tiny_network()
    seen: list[tuple[torch.Tensor, ...]] = []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    validation_loss(network, digits().val, tiny_config(eval__val_images=100), "fp32")
    (inputs,) = seen
    _, t, labels = inputs
    assert t.bincount().tolist() == [2] * 50  # T = 50.
    assert labels.min() >= 0
    assert len(labels.unique()) == 10
    seen.clear()
    validation_loss(network, digits().val, tiny_config(eval__val_images=10_000), "fp32")
    assert sum(len(inputs[0]) for inputs in seen) == len(digits().val)  # All there are.


@pytest.fixture(scope="module")
def classifier() -> PixelClassifier:
    return PixelClassifier(digits())


def test_the_classifier_is_accurate_on_real_digits_it_has_not_seen(classifier: PixelClassifier) -> None:
    assert classifier.accuracy >= 0.98


def test_agreement_on_the_real_held_out_images_is_the_accuracy(classifier: PixelClassifier) -> None:
    val = digits().val
    assert classifier.agreement(val.images_NCHW, val.labels_N.tolist()) == pytest.approx(classifier.accuracy)
    assert classifier.agreement(digits().train.images_NCHW, digits().train.labels_N.tolist()) > 0.99


def test_agreement_with_shuffled_labels_is_chance(classifier: PixelClassifier) -> None:
    train = digits().train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    share = classifier.agreement(train.images_NCHW, train.labels_N[order].tolist())
    assert share == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / len(train)))


def test_agreement_of_noise_and_of_wrong_labels(classifier: PixelClassifier) -> None:
    val = digits().val
    wrong = ((val.labels_N + 1) % 10).tolist()
    assert classifier.agreement(val.images_NCHW, wrong) < 0.02
    noise = torch.randint(0, 256, (1000, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert classifier.agreement(noise, [i % 10 for i in range(1000)]) < 0.15


def test_the_classifier_learns_from_the_training_images_alone() -> None:
    """Held-out images all labelled 0: an honest classifier is wrong about most of them."""
    val = digits().val
    lying = Dataset(digits().train, Images(val.images_NCHW, torch.zeros_like(val.labels_N)), digits().class_names)
    assert PixelClassifier(lying).accuracy == pytest.approx((val.labels_N == 0).float().mean().item(), abs=0.02)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"eval__classifier": "none"}, False),
        ({"model__class_conditional": False}, False),
        ({"data__name": "mnist", "data__image_size": 8}, False),
    ],
)
def test_there_is_a_classifier_where_it_makes_sense(changes: dict[str, object], expected: bool) -> None:
    assert (build_classifier(tiny_config(**changes), digits()) is not None) == expected


def test_is_better() -> None:
    assert is_better("val/loss", 0.1, 0.2)
    assert not is_better("val/loss", 0.2, 0.1)
    assert not is_better("val/loss", 0.1, 0.1)
    assert is_better("eval/class_agreement", 0.9, 0.8)
    assert not is_better("eval/class_agreement", 0.8, 0.9)
    assert is_better("train/loss", 1e30, None)
    # What is no number is never better, not even than nothing or than another one.
    for value in (math.inf, -math.inf, math.nan):
        assert not is_better("train/loss", value, None)
        assert not is_better("eval/class_agreement", value, 0.5)
        assert not is_better("val/loss", value, math.nan)
