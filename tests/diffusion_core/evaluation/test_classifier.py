"""Classifiers: accurate on real images, the same for the same recipe, kept in the cache, and files that run no code."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import digits, one_line

from diffusion_core import cache
from diffusion_core.data.datasets import Dataset, Images
from diffusion_core.evaluation.classifier.classifier import Classifier, classifier_for, make_classifier, read_classifier
from diffusion_core.evaluation.classifier.training import RECIPES, Recipe, augment, recipe_for
from diffusion_core.evaluation.features import ExtractorError

CPU = torch.device("cpu")
QUICK = Recipe(width=4, epochs=1, batch_size=64, lr=0.1)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return make_classifier(digits(), "digits", RECIPES["tiny"], mirrored=False, device=CPU)


def small() -> Dataset:
    return replace(digits(), train=digits().train.select(torch.arange(200)))


def test_it_is_accurate_on_real_digits_it_has_not_seen(classifier: Classifier) -> None:
    assert classifier.accuracy >= 0.98
    assert classifier.name == "classifier-digits"


def test_agreement_on_the_real_held_out_images_is_the_accuracy(classifier: Classifier) -> None:
    val = digits().val
    assert classifier.class_agreement(val.images_NCHW, val.labels_N.tolist()) == pytest.approx(classifier.accuracy)


def test_agreement_of_noise_of_shuffled_and_of_wrong_labels(classifier: Classifier) -> None:
    val, train = digits().val, digits().train
    assert classifier.class_agreement(val.images_NCHW, ((val.labels_N + 1) % 10).tolist()) < 0.02
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    share = classifier.class_agreement(train.images_NCHW, train.labels_N[order].tolist())
    assert share == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / len(train)))
    noise = torch.randint(0, 256, (1000, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert classifier.class_agreement(noise, [i % 10 for i in range(1000)]) < 0.15


def test_it_learns_from_the_training_images_alone() -> None:
    """Held-out images all labelled 0: an honest classifier is wrong about most of them."""
    val = digits().val
    lying = replace(small(), val=Images(val.images_NCHW, torch.zeros_like(val.labels_N)))
    honest = make_classifier(small(), "digits", replace(QUICK, epochs=8), mirrored=False, device=CPU)
    found = make_classifier(lying, "digits", replace(QUICK, epochs=8), mirrored=False, device=CPU)
    assert found.weights == honest.weights
    assert found.accuracy < 0.25 < honest.accuracy


def test_the_recipe_decides_every_weight_and_the_global_state_none() -> None:
    torch.manual_seed(1)
    one = make_classifier(small(), "digits", QUICK, mirrored=False, device=CPU)
    state = torch.get_rng_state()
    two = make_classifier(small(), "digits", QUICK, mirrored=False, device=CPU)
    assert torch.equal(state, torch.get_rng_state())
    other = make_classifier(small(), "digits", replace(QUICK, seed=1), mirrored=False, device=CPU)
    assert one.weights == two.weights != other.weights


def test_augmentation_shifts_mirrors_and_cuts_out() -> None:
    x = torch.arange(64.0).view(1, 1, 8, 8).repeat(200, 1, 1, 1)
    plain = augment(x, QUICK, False, 0)
    assert torch.equal(plain, x)
    mirrored = augment(x, QUICK, True, 0)
    flipped = (mirrored == x.flip(3)).flatten(1).all(1)
    assert 60 < int(flipped.sum()) < 140
    assert torch.equal(mirrored[~flipped], x[~flipped])
    shifted = augment(x, replace(QUICK, shift=1), False, 0)
    middles = {tuple(image[0, 3:5, 3].tolist()) for image in shifted}
    assert middles == {(27.0 + 8 * dy + dx, 35.0 + 8 * dy + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    cut = augment(x + 1.0, replace(QUICK, cutout=3), False, 0)
    assert {int((image == 0).sum()) for image in cut} <= {a * b for a in (1, 2, 3) for b in (1, 2, 3)}
    assert torch.equal(cut[cut != 0], (x + 1.0)[cut != 0])


def test_it_is_the_same_from_its_file(classifier: Classifier, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    classifier.save(path)
    back = read_classifier(path, CPU)
    assert (back.weights, back.accuracy, back.recipe) == (classifier.weights, classifier.accuracy, classifier.recipe)
    images = digits().val.images_NCHW
    assert torch.equal(back(images).features_BD, classifier(images).features_BD)


def test_a_damaged_or_foreign_file_is_refused_in_one_line(classifier: Classifier, tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    classifier.save(good)
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:1000])
    (tmp_path / "text.safetensors").write_text("weights")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    huge = '{"channels": 1, "num_classes": 10, "width": 100000000, "data": "x", "accuracy": 1, "recipe": {}}'
    save_file({"a": torch.zeros(1)}, tmp_path / "huge.safetensors", metadata={"classifier": huge})
    for name in ("missing", "cut", "text", "foreign", "huge"):
        with pytest.raises(ExtractorError) as refusal:
            read_classifier(tmp_path / f"{name}.safetensors", CPU)
        assert name in one_line(refusal.value)


def test_it_is_trained_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setitem(RECIPES, "tiny", QUICK)
    first = classifier_for(small(), "digits", mirrored=False, device=CPU)
    (file,) = (tmp_path / "cache" / "classifiers").iterdir()
    written = file.stat().st_mtime_ns
    assert classifier_for(small(), "digits", mirrored=False, device=CPU).weights == first.weights
    assert file.stat().st_mtime_ns == written
    # Other images, another recipe or mirroring: another classifier.
    classifier_for(digits(), "digits", mirrored=False, device=CPU)
    classifier_for(small(), "digits", mirrored=True, device=CPU)
    assert len(list(file.parent.iterdir())) == 3
    file.write_bytes(b"damaged")  # Made anew.
    assert classifier_for(small(), "digits", mirrored=False, device=CPU).weights == first.weights


def test_a_cache_that_takes_nothing_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    monkeypatch.setitem(RECIPES, "tiny", QUICK)
    classifier_for(small(), "digits", mirrored=False, device=CPU)
    assert "cannot write" in capsys.readouterr().err


def test_recipes_suit_the_images() -> None:
    assert recipe_for((1, 8, 8), has_gpu=True) == "tiny"
    assert recipe_for((1, 28, 28), has_gpu=True) == "grey"
    assert recipe_for((3, 32, 32), has_gpu=True) == "colour"
    assert recipe_for((3, 32, 32), has_gpu=False) == "cpu"
    tiny = replace(small(), train=Images(torch.zeros(4, 1, 4, 4, dtype=torch.uint8), torch.zeros(4).long()))
    with pytest.raises(ExtractorError, match="8 or more"):
        make_classifier(tiny, "x", QUICK, mirrored=False, device=CPU)
