"""The study that compares searches measures each setting once, and reports the hypervolume of the measured points."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from studies import hypervolume
from tiny import lively_run

from diffusion_core.sampling.cost import MACS


def staircase(points: list[tuple[float, float]]) -> float:
    """The share of the box between the limits and zero that points dominate, both coordinates smaller the better."""
    limits = [float(objective.limit or 0.0) for objective in hypervolume.OBJECTIVES]
    area, height = 0.0, limits[0]
    for distance, macs in sorted(points, key=lambda point: (point[1], point[0])):
        if distance < height and macs < limits[1]:
            area += (height - distance) * (limits[1] - macs)
            height = distance
    return area / (limits[0] * limits[1])


@pytest.mark.parametrize("name", hypervolume.searches(9))
def test_the_volume_is_that_of_the_trials_and_repetitions_differ(name: str) -> None:
    make, seen = hypervolume.searches(9)[name], []

    def measure(parameters: Mapping[str, Any]) -> dict[str, float]:
        steps = parameters["sample.steps"] * (1.0 if parameters["sample.start_level"] else 1.5)
        figures = {hypervolume.DISTANCE: 15.0 / steps, MACS: 2e7 * steps}
        seen.append((figures[hypervolume.DISTANCE], figures[MACS]))
        return figures

    first = hypervolume.volume_of(make(0), 9, measure)
    own = list(seen)
    assert first == pytest.approx(staircase(own))
    assert hypervolume.volume_of(make(0), 9, measure) == first
    seen.clear()
    hypervolume.volume_of(make(1), 9, measure)
    assert seen != own
    assert len(seen) == 9


@pytest.mark.slow
def test_each_setting_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {**hypervolume.SPACE, "sample.steps": {"values": [1, 2]}, "sample.sampler": {"values": ["ddim"]}}
    monkeypatch.setattr(hypervolume, "SPACE", few)
    run, out = lively_run(tmp_path / "run"), tmp_path / "out"
    words = ["--checkpoint", str(run), "--images", "20", "--trials", "4", "--repetitions", "2", "--out", str(out)]
    assert hypervolume.main(words) == 0
    measured = json.loads((out / "measured.json").read_text())
    assert 1 < len(measured) <= 12
    table = (out / "hypervolume.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| random", "| nsga2", "| tpe"]
    changed = {key: {**figures, hypervolume.DISTANCE: 0.0} for key, figures in measured.items()}
    (out / "measured.json").write_text(json.dumps(changed))
    assert hypervolume.main(words) == 0
    assert json.loads((out / "measured.json").read_text()) == changed, "nothing was measured again"
    assert (out / "hypervolume.md").read_text() != table
    assert hypervolume.main([*words[:-2], "--trials", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: --trials = 1: expected an integer >= 2"
