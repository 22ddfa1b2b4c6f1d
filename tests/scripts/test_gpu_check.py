"""The GPU check runs on a processor too: its own code holds, and it notices what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gpu_check
import pytest
import torch


@pytest.mark.slow
def test_every_check_passes_on_a_processor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"model.channels": 8, "model.norm_groups": 4, "train.batch_size": 8, "sample.steps": 5}
    monkeypatch.setitem(gpu_check.PRESETS, "digits", gpu_check.PRESETS["digits"] | small)
    monkeypatch.setitem(gpu_check.RECIPES, "tiny", replace(gpu_check.RECIPES["tiny"], epochs=1))
    assert gpu_check.main(["--steps", "12", "--out", str(tmp_path / "check.json")]) == 0
    assert "FAIL" not in capsys.readouterr().out
    report = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))
    assert list(report) == list(gpu_check.CHECKS)
    assert all(one["found"] for one in report.values())


def test_a_check_that_does_not_hold_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([1, 2])
    monkeypatch.setattr(gpu_check, "peak_memory", lambda *_: next(sizes))
    assert gpu_check.main(["memory"]) == 1
    assert "FAIL  memory" in capsys.readouterr().out


def test_a_check_that_breaks_fails_and_the_next_one_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_machine: gpu_check.Machine) -> list[tuple[str, bool, object]]:
        raise RuntimeError("no\nluck")

    monkeypatch.setitem(gpu_check.CHECKS, "masks", broken)
    assert gpu_check.main(["masks", "memory"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  masks: RuntimeError: no luck" in out
    assert "pass  memory" in out


def test_an_unknown_check_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["speed"])
    assert "CHECK = 'speed': expected one of graphs" in capsys.readouterr().err


def test_images_are_compared_by_their_levels() -> None:
    one = torch.tensor([0, 255], dtype=torch.uint8)
    assert gpu_check.levels_apart(one, one.flip(0)) == 255
