"""A run is judged by one classifier, wherever it goes on: one that was trained elsewhere has other weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import TINY, digits

from agent.config import build_config
from agent.trial import run_trial
from diffusion_core.cache import VARIABLE
from diffusion_core.checkpoint import read_checkpoint
from diffusion_core.evaluation.classifier.classifier import classifier_for, read_classifier
from diffusion_core.run_folder import CLASSIFIER_FILE, PROTOCOLS_FILE
from diffusion_core.runs.recorded import log_checkpoint
from diffusion_core.tracking import MemoryTracker

AGREEMENT = "eval/class_agreement"


def go_on(folder: Path, steps: int) -> str:
    """Train a run up to a step; return how it has measured class agreement."""
    config = build_config(
        TINY, {"train.steps": steps, "eval.every": 2, "eval.num_images": 4, "checkpoint.every": 2, "sample.every": 0}
    )
    run_trial(config, MemoryTracker(), dataset=digits(), folder=folder, run_id="x")
    line: str = json.loads((folder / PROTOCOLS_FILE).read_text())[AGREEMENT]
    return line


def other_machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine on which training has made another classifier; return the hash of its weights."""
    monkeypatch.setenv(VARIABLE, str(cache))
    classifier = classifier_for(digits(), "digits", mirrored=False, device=torch.device("cpu"))
    (file,) = (cache / "classifiers").glob("*")
    with torch.no_grad():
        next(classifier.network.parameters()).mul_(1.5)
    classifier.save(file)
    return read_classifier(file, torch.device("cpu")).weights


@pytest.mark.parametrize("moved", [False, True], ids=["its folder", "W&B"])
def test_a_run_keeps_its_classifier_on_another_machine(
    moved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    before = go_on(run, 2)
    if moved:  # As when W&B brings the newest checkpoint only.
        newest = run / "checkpoints" / "step-00000002"
        tracker = MemoryTracker()
        log_checkpoint(tracker, read_checkpoint(newest), "x", is_best=True, history=[], ttl_days=None)
        (state,) = [upload for upload in tracker.artifacts if upload["type"] == "training-state"]
        assert CLASSIFIER_FILE in state["files"]
        (run / CLASSIFIER_FILE).rename(newest / CLASSIFIER_FILE)
    other = other_machine(tmp_path / "other", monkeypatch)
    assert other not in before
    assert go_on(run, 4) == before
    assert (run / CLASSIFIER_FILE).is_file()
    assert "warning" not in capsys.readouterr().err


def test_where_it_cannot_the_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    before = go_on(run, 2)
    (run / CLASSIFIER_FILE).unlink()  # As of a run of an earlier version.
    other = other_machine(tmp_path / "other", monkeypatch)
    assert other in go_on(run, 4)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    weights = before.partition("weights=")[2].partition(",")[0]
    assert line.startswith(f"warning: {AGREEMENT}: measured with extractor=classifier-digits, weights={other}, ")
    assert f"before this run was resumed with extractor=classifier-digits, weights={weights};" in line


def test_a_damaged_classifier_of_a_run_is_replaced(tmp_path: Path) -> None:
    run = tmp_path / "run"
    before = go_on(run, 2)
    (run / CLASSIFIER_FILE).write_bytes(b"no classifier")
    assert go_on(run, 4) == before, "by that of the cache"
    shutil.rmtree(run / "checkpoints")
    assert read_classifier(run / CLASSIFIER_FILE, torch.device("cpu")).weights in before
