"""The benchmarks run, say what they ran on, and judge a figure by its target. Their figures are no test's business."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import benchmark
import pytest
from benchmarks.measurement.rows import HEADER, Row
from benchmarks.scaling import Point, growth


@pytest.mark.parametrize(
    ("value", "target", "at_least", "holds"),
    [(1.7, 1.7, True, True), (1.69, 1.7, True, False), (0.62, 0.62, False, True), (0.63, 0.62, False, False),
     (None, 1.0, True, None), (1.0, None, True, None)],
)  # fmt: skip
def test_a_target_is_met_or_missed(value: float | None, target: float | None, at_least: bool, holds: bool) -> None:
    row = Row("s", "what", value, target=target, at_least=at_least)
    assert row.holds is holds
    cells = row.cells()
    assert len(cells) == len(HEADER)
    assert ("not measured" in cells) == (value is None)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_growth_is_the_exponent(exponent: float) -> None:
    points = [Point("batch size", value, 3.0 * value**exponent, float(value)) for value in (1, 2, 4, 8)]
    assert math.isclose(growth(points), exponent)


@pytest.mark.extra("bench")
def test_a_report_says_on_what_it_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "deep" / "report.json"
    assert benchmark.main(["ema", "loading", "--short", "--rounds", "1", "--json", "--out", str(file)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(file.read_text())
    assert {"date", "processor", "cores", "gpu", "versions", "commit"} <= report["machine"].keys()
    assert report["short"]
    assert [row["subject"] for row in report["rows"]] == ["ema", "loading"]
    assert all(row["value"] > 0 and row["holds"] is (row["value"] >= row["target"]) for row in report["rows"])


def test_a_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ema_pytorch", None)
    assert benchmark.main(["ema", "--short", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert "not measured" in out
    assert "ema_pytorch" in out
    assert "[bench]" in out


@pytest.mark.parametrize("words", [["nothing"], ["ema", "--rounds", "0"], []])
def test_wrong_arguments(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        benchmark.main(words)
    assert refused.value.code == 2
    assert "error" in capsys.readouterr().err
