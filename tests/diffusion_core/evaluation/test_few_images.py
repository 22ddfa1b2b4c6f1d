"""Figures of few images, and of labels that a data set does not have: measured, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import evaluate as script
import numpy as np
import pytest
from PIL import Image
from tiny import TINY, digits

from agent.config import build_config
from agent.trial import run_trial
from diffusion_core.data.datasets import Dataset, Images
from diffusion_core.evaluation.measure import too_few
from diffusion_core.registries import METRICS
from diffusion_core.tracking import MemoryTracker

FIGURES = [name for name, record in METRICS.items() if record.of_images]
LABELS = {"one": [3], "two of a class": [3, 3], "two": [3, 4], "a class": [3] * 9, "foreign": [8, 9, 10, 11]}
REFUSED = {
    "one": {*FIGURES} - {"svc_agreement"},
    "two of a class": {"svc_synthetic_accuracy"},
    "two": {"per_class", "diversity"},
    "a class": {"svc_synthetic_accuracy"},
    "foreign": {name for name in FIGURES if METRICS[name].labels},
}
"""Figures that are refused, by the labels of the images."""


def write_images(folder: Path, labels: list[int]) -> Path:
    source = np.random.default_rng(0)
    folder.mkdir()
    for index, label in enumerate(labels):
        pixels = source.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{label}-{index}.png")
    return folder


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("kind", LABELS)
def test_a_figure_of_few_images_is_measured_or_refused_in_one_line(
    kind: str, figure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, found = write_images(tmp_path / "images", LABELS[kind]), tmp_path / "found.json"
    words = [str(folder), "--data", "digits", "--device", "cpu", "--figures", figure, "--json", str(found)]
    status = script.main(words)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    if figure not in REFUSED[kind]:
        assert (status, errors) == (0, [])
        figures = json.loads(found.read_text())["figures"]
        assert len(figures.keys() - {"eval/class_agreement"}) >= 1
        assert ("eval/class_agreement" in figures) == (kind != "foreign")
        return
    assert (status, len(errors)) == (2, 1)
    assert errors[0].startswith(f"error: --figures = {figure!r}: needs ")
    assert str(folder) in errors[0]
    assert errors[0].endswith("; leave it out")
    assert not found.exists()


def test_real_images_of_one_class_are_too_few_to_train_on() -> None:
    real = digits()
    of_a_class = Images(real.train.images_NCHW[:4], real.train.labels_N[:4] * 0)
    dataset = Dataset(of_a_class, of_a_class, ("a",))
    needs = dict(too_few(FIGURES, of_a_class.labels_N, "the set", dataset, "train"))
    assert needs.keys() == {"svc_agreement", "svc_synthetic_accuracy"}
    assert needs["svc_agreement"] == "needs at least 2 classes of images, and the train split of the real images has 1"


def test_a_trial_goes_on_without_the_figures_that_its_images_are_too_few_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = ["frechet", "synthetic_accuracy", "svc_agreement", "svc_synthetic_accuracy", "diversity"]
    config = build_config(
        TINY, {"eval.figures": figures, "eval.extractors": ["classifier"], "eval.num_images": 1, "eval.every": 4}
    )
    result = run_trial(config, MemoryTracker(), dataset=digits(), folder=tmp_path / "run", run_id="x")
    assert {name for name in result.figures if name.startswith("eval/")} == {
        "eval/class_agreement",
        "eval/svc_agreement_1",
    }
    said = capsys.readouterr().err
    for figure in figures:
        assert said.count(f"no figure {figure}: needs at least 2 ") == (figure != "svc_agreement")
