"""scripts/train_classifier.py: what it prints, writes and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import train_classifier

from diffusion_core import cache
from diffusion_core.evaluation.classifier import training
from diffusion_core.evaluation.classifier.classifier import read_classifier
from diffusion_core.evaluation.classifier.training import Recipe


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests' classifiers are not found."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))


def test_a_classifier_is_trained_written_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(training.RECIPES, "grey", Recipe(width=8, epochs=2, batch_size=64, lr=0.1))
    file = tmp_path / "deep" / "classifier.safetensors"
    words = ["--data.name=digits", "--recipe", "grey", "--device", "cpu", "--out", str(file)]
    assert train_classifier.main(words) == 0
    printed = capsys.readouterr().out
    assert "recipe grey, seed 0" in printed
    classifier = read_classifier(file, torch.device("cpu"))
    assert f"weights {classifier.weights}" in printed
    assert f"{classifier.accuracy:.2%} of 359 right" in printed
    assert classifier.accuracy > 0.3
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1

    assert train_classifier.main([*words[:3], "--device", "cpu"]) == 0
    assert f"weights {classifier.weights}" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.name=digit"], "data.name = 'digit'"),
        (["--train.steps=3"], "train.steps = '3': expected knobs of data.*"),
        (["--data.name=folder", "--data.path=nowhere"], "no such folder"),
    ],
)
def test_wrong_words_are_refused_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_classifier.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
