"""The table of samples: images, labels, and what the classifier takes them for."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY
from torch import Tensor

from agent.config import build_config
from agent.trial import run_trial
from diffusion_core.data.datasets import Dataset, load_data
from diffusion_core.evaluation.classifier.classifier import Classifier, classifier_for
from diffusion_core.evaluation.opinions import COLUMNS, SHOWN, first_images, write_opinions
from diffusion_core.tracking import MemoryTracker


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data(build_config(TINY).data)


@pytest.fixture(scope="module")
def classifier(digits: Dataset) -> Classifier:
    return classifier_for(digits, "digits", mirrored=False, device=torch.device("cpu"))


def decoded(text: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return np.asarray(image)


def test_rows_hold_the_image_the_label_and_the_opinion(digits: Dataset, classifier: Classifier, tmp_path: Path) -> None:
    images, labels = digits.val.images_NCHW[:9], digits.val.labels_N[:9]
    wrong = (labels + 1) % 10
    file = tmp_path / "new" / "opinions.json"
    assert write_opinions(file, [(images[:5], wrong[:5]), (images[5:], wrong[5:])], classifier, digits.class_names)
    rows = json.loads(file.read_text())
    assert [tuple(row) for row in rows] == [COLUMNS] * 9
    logits = classifier(images).logits_BK
    assert logits is not None
    exponents = np.exp(logits.double().numpy() - logits.double().numpy().max(1, keepdims=True))
    shares = exponents / exponents.sum(1, keepdims=True)
    for row, pixels, label, share in zip(rows, images, wrong.tolist(), shares, strict=True):
        enlarged = pixels[0].numpy().repeat(6, 0).repeat(6, 1)
        np.testing.assert_array_equal(decoded(row["image"]), enlarged)
        assert row["label"] == str(label)
        assert row["opinion"] == str(int(share.argmax()))
        assert row["confidence"] == pytest.approx(share.max(), abs=1e-4)
    right = sum(row["opinion"] == str(int(label)) for row, label in zip(rows, labels, strict=True))
    assert right >= 8  # The real digits are seen as what they are, not as the labels that were given.


def test_images_without_labels_have_no_table(digits: Dataset, classifier: Classifier, tmp_path: Path) -> None:
    images = digits.val.images_NCHW[:2]
    assert not write_opinions(tmp_path / "a.json", [], classifier, digits.class_names)
    assert not write_opinions(tmp_path / "a.json", [(images, torch.tensor([3, -1]))], classifier, digits.class_names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sizes", [[SHOWN + 5], [1] * 50, [30, 30], [3]])
def test_the_first_images_are_kept_and_all_pass(sizes: list[int]) -> None:
    def batches() -> list[tuple[Tensor, Tensor]]:
        numbers = torch.arange(sum(sizes)).split(sizes)
        return [(part.view(-1, 1, 1, 1).to(torch.uint8), part) for part in numbers]

    kept: list[tuple[Tensor, Tensor]] = []
    passed = list(first_images(batches(), kept))
    assert torch.cat([labels for _, labels in passed if labels is not None]).tolist() == list(range(sum(sizes)))
    assert torch.cat([labels for _, labels in kept]).tolist() == list(range(min(SHOWN, sum(sizes))))
    assert all(len(images) == len(labels) for images, labels in kept)


def test_a_run_logs_its_table_once_at_the_end(digits: Dataset, tmp_path: Path) -> None:
    knobs = {"train.steps": 4, "eval.every": 2, "eval.num_images": 12, "sample.every": 0, "checkpoint.every": 0}
    config = build_config(TINY, knobs)
    tracker = MemoryTracker()
    run_trial(config, tracker, dataset=digits, folder=tmp_path, run_id="x")
    assert [row["step"] for row in tracker.rows if "eval/class_agreement" in row] == [2, 4]
    ((step, file),) = [(row["step"], row["opinions"]) for row in tracker.rows if "opinions" in row]
    assert (step, file.name) == (4, "opinions-00000004.json")
    rows = json.loads(file.read_text())
    assert [row["label"] for row in rows] == [str(number % 10) for number in range(12)]
    agreed = sum(row["label"] == row["opinion"] for row in rows) / 12
    assert agreed == pytest.approx(tracker.rows[-1]["eval/class_agreement"])
    assert all("opinions" not in line for line in (tmp_path / "history.jsonl").read_text().splitlines())
