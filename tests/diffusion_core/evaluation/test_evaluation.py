"""Validation loss means what it says; figures are named for how they were measured."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.svm import SVC
from tiny import digits, tiny_config, tiny_network

from diffusion_core.config import DataConfig, EvalConfig, build
from diffusion_core.config.metrics import Part, count_name, goal_of, goals, is_better, space_figure, space_name
from diffusion_core.data.datasets import Images
from diffusion_core.evaluation import metrics, suite, validation
from diffusion_core.evaluation.metrics import Real, class_variances
from diffusion_core.evaluation.validation import by_timestep, validation_loss, validation_losses
from diffusion_core.model.unet import build_network
from diffusion_core.registries import METRICS

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
    monkeypatch.setattr(validation, "VALIDATION_BATCH", batch)
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


def test_losses_by_timestep_average_to_the_loss_and_fall_with_the_noise() -> None:
    network = build_network(CONFIG, 10).eval()  # It says zero, so that its error of x0 is the noise level.
    config = tiny_config(eval__val_images=300, diffusion__prediction="x0")
    loss_N, t_N = validation_losses(network, digits().val, config, "fp32")
    assert float(loss_N.mean()) == validation_loss(network, digits().val, config, "fp32")
    parts = by_timestep(loss_N, t_N, config.diffusion.timesteps)
    assert list(parts) == [f"val/loss_t{part}" for part in range(10)]
    assert sum(parts.values()) / 10 == pytest.approx(float(loss_N.mean()))
    for part in range(10):
        inside = (t_N >= 5 * part) & (t_N < 5 * part + 5)  # T = 50.
        assert parts[f"val/loss_t{part}"] == pytest.approx(float(loss_N[inside].mean()))


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


PARTS: dict[str, Part] = {part.name: part for record in METRICS.values() if record.in_features for part in record.parts}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("fd", "inception", 50_000, "train", 50_000), "eval/fid50k_train"),
        (("fd", "inception", 5000, "val", None), "eval/fid5k_val"),
        (("fd", "inception", 2048, "train", 2048), "eval/fid2048_train"),
        (("fd", "inception", 2047, "train", 50_000), "eval/fd_inception_2047_train"),
        (("fd", "inception", 50_000, "train", 2047), "eval/fd_inception_50k_train"),
        (("fd", "inception", None, "train", 50_000), "eval/fid_train"),
        (("fd", "inception", None, "other", None), "eval/fd_inception_other"),
        (("fd", "inception-0123abcd", 50_000, "train", 50_000), "eval/fd_inception-0123abcd_50k_train"),
        (("fd", "classifier-digits", 50_000, "train", 50_000), "eval/fd_classifier-digits_50k_train"),
        (("kd", "inception", 500, "train", 500), "eval/kid500_train"),
        (("kd", "my-net", 500, "train", 500), "eval/kd_my-net_500_train"),
        (("score", "inception", 5000, None, None), "eval/inception_score5k"),
        (("score", "classifier-mnist", 5000, None, None), "eval/score_classifier-mnist_5k"),
        (("recall", "inception", 5000, "train", 5000), "eval/recall_inception_5k_train"),
    ],
)
def test_names_carry_the_protocol_and_only_fid_is_called_fid(arguments: tuple[object, ...], expected: str) -> None:
    name, *others = arguments
    assert space_figure(PARTS[name], *others) == expected  # type: ignore[index, arg-type]
    assert goal_of(expected) == ("maximize" if "score" in expected or "recall" in expected else "minimize")


def test_every_kind_of_figure_has_a_goal_and_costs_have_none() -> None:
    assert [goal_of(name.replace("*", "x")) for name in goals()] == list(goals().values())
    assert goal_of("eval/fid5k_train/cat") == "minimize"
    for name in ("model/params", "train/lr", "eval/seconds_per_image", "dense/val/loss", "protocol/eval/fid5k_train"):
        assert goal_of(name) is None
    assert (count_name(1000), count_name(1500), count_name(None)) == ("1k", "1500", "")
    assert space_name("my_net v2.1") == "my-net-v2-1"


def test_diversity_is_the_variance_within_classes() -> None:
    """Against numpy, class by class; copies of one image a class have none, real images as much as themselves."""
    train = digits().train
    pixels, labels = train.images_NCHW.numpy().astype(float), train.labels_N.numpy()
    each = {label: pixels[labels == label].var(axis=0, ddof=1).mean() for label in range(10)}
    assert class_variances(train, 10) == pytest.approx(each)
    real = np.mean(list(each.values()))
    images = Images(train.images_NCHW[:200], train.labels_N[:200])
    ours = np.mean([pixels[:200][labels[:200] == label].var(axis=0, ddof=1).mean() for label in range(10)])
    compared = Real(digits(), DataConfig(name="digits"), torch.device("cpu"))
    record = METRICS["diversity"]
    assert record.compute(images, compared) == pytest.approx(ours / real)
    assert record.compute(train, compared) == 1.0
    for classes in ([0], [1], [0, 1]):  # Classes differ a lot; those that only one side has do not count.
        chosen = train.select(torch.isin(train.labels_N, torch.tensor(classes)).nonzero().flatten())
        assert record.compute(chosen, compared) == 1.0
    first = torch.stack([train.images_NCHW[train.labels_N == label][0] for label in range(10)])
    assert record.compute(Images(first.repeat(3, 1, 1, 1), torch.arange(10).repeat(3)), compared) == 0.0
    assert math.isnan(record.compute(Images(first, torch.arange(10)), compared))
    assert record.goals("diversity") == {"eval/diversity_*": "maximize"}


def test_support_vectors_judge_images_and_are_trained_on_them() -> None:
    """A judge that is no network: real images pass, wrong labels do not, and a class without images costs its share."""
    dataset = digits()
    train, val = dataset.train, dataset.val
    real = Real(dataset, DataConfig(name="digits"), torch.device("cpu"))
    agreement, accuracy = METRICS["svc_agreement"], METRICS["svc_synthetic_accuracy"]
    judge = make_pipeline(FunctionTransformer(lambda pixels: pixels / 255.0), SVC(C=1.0, kernel="rbf", gamma="scale"))
    judge.fit(train.images_NCHW.reshape(len(train.labels_N), -1).numpy(), train.labels_N.numpy())
    expected = judge.score(val.images_NCHW.reshape(len(val.labels_N), -1).numpy(), val.labels_N.numpy())
    assert agreement.compute(val, real) == accuracy.compute(train, real) == pytest.approx(expected)
    assert expected > 0.97
    shifted = Images(val.images_NCHW, (val.labels_N + 1) % 10)
    assert agreement.compute(shifted, real) < 0.03
    kept = train.labels_N != 3
    without = Images(train.images_NCHW[kept], train.labels_N[kept])
    lost = (val.labels_N == 3).float().mean().item()
    assert accuracy.compute(without, real) == pytest.approx(expected - lost, abs=0.02)
    assert agreement.goals("svc_agreement") == {"eval/svc_agreement_*": "maximize"}
    assert accuracy.goals("svc_synthetic_accuracy") == {"eval/svc_synthetic_accuracy_*": "maximize"}


def test_of_very_many_images_support_vectors_see_some_of_each_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels of generated images alternate: evenly spaced images would be of every second class, or of every fifth."""
    dataset = digits()
    real = Real(dataset, DataConfig(name="digits"), torch.device("cpu"))
    train, accuracy = dataset.train, METRICS["svc_synthetic_accuracy"]
    of_class = [torch.nonzero(train.labels_N == label).flatten()[:100] for label in range(10)]
    alternating = train.select(torch.stack(of_class, dim=1).flatten())
    assert alternating.labels_N[:11].tolist() == [*range(10), 0]
    whole = accuracy.compute(alternating, real)
    for most in (500, 200):
        monkeypatch.setattr(metrics, "MOST_FOR_SVC", most)
        seen = accuracy.compute(alternating, real)
        assert 0.85 < seen < whole
        part = metrics._of_each_class(alternating, most)
        assert part.labels_N.bincount().tolist() == [most // 10] * 10
        assert seen == accuracy.compute(part, real)
        assert (
            METRICS["svc_agreement"].compute(dataset.val, replace(real, dataset=replace(dataset, train=part))) == seen
        )
    for most in (1000, 5000):
        monkeypatch.setattr(metrics, "MOST_FOR_SVC", most)
        assert metrics._of_each_class(alternating, most) is alternating


def test_a_part_of_the_images_has_each_class_in_its_proportion() -> None:
    images = Images(torch.arange(300).reshape(300, 1, 1, 1), torch.arange(300) % 6 // 2 * (torch.arange(300) < 240))
    part = metrics._of_each_class(images, 90)
    assert len(part) == 90
    assert part.images_NCHW.flatten().diff().min() > 0
    assert part.labels_N.bincount().tolist() == pytest.approx([42, 24, 24], abs=1)


@pytest.mark.parametrize(
    ("space", "images", "told"),
    [
        ("inception", 100, True),
        ("inception", 2048, False),
        ("inception-1234abcd", 100, False),
        ("classifier-digits", 100, False),
    ],
)
def test_a_warning_about_the_name_fid_comes_where_it_could_be_used(
    space: str, images: int, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "agreed_extractor", lambda *_: SimpleNamespace(name=space))
    config = build(EvalConfig, {"figures": ["frechet"], "extractors": ["inception"], "num_images": images})
    said: list[str] = []
    suite.Suite(DataConfig(), config, digits(), with_classifier=False, device=torch.device("cpu"), say=said.append)
    assert [line.split(":")[0] for line in said] == [f"eval.num_images = {images}"] * told
