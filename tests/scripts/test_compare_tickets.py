"""The table of tickets and controls: who stands where, mean and range over seeds."""

from __future__ import annotations

import json
from pathlib import Path

import compare_tickets
import pytest
from tiny import TINY

from pruning.lottery.report import Trained


def chain(shift: float) -> list[Trained]:
    """Two rounds and the controls of the second, with figures that say which is which."""

    def stage(number: int, kind: str, agreement: float) -> Trained:
        figures = {"val/loss": 1.0 - agreement + shift, "eval/class_agreement": agreement + shift}
        return Trained(number, kind, 0.5**number, figures, {})

    return [
        stage(0, "ticket", 0.9),
        stage(1, "ticket", 0.8),
        stage(2, "ticket", 0.7),
        stage(2, "random mask", 0.3),
        stage(2, "random reinitialisation", 0.5),
    ]


def test_the_table_has_each_method_at_each_level() -> None:
    chains = {"global": [chain(0.0), chain(0.02)], "layer": [chain(0.0), chain(0.04)]}
    lines = compare_tickets.table_lines(chains, [2], [0, 1], 500)
    assert lines[0] == "500 optimizer steps a round, seeds 0, 1 (mean, and range in brackets)."
    start = lines.index("| class agreement | 75.0% pruned |")
    assert lines[start + 2 : start + 9] == [
        "| dense | 91.0% (90.0% to 92.0%) |",
        "| ticket, ranked together | 71.0% (70.0% to 72.0%) |",
        "| random mask, ranked together | 31.0% (30.0% to 32.0%) |",
        "| random reinitialisation, ranked together | 51.0% (50.0% to 52.0%) |",
        "| ticket, ranked by layer | 72.0% (70.0% to 74.0%) |",
        "| random mask, ranked by layer | 32.0% (30.0% to 34.0%) |",
        "| random reinitialisation, ranked by layer | 52.0% (50.0% to 54.0%) |",
    ]
    assert "| ticket, ranked together | 0.3100 (0.3000 to 0.3200) |" in lines


def test_levels_are_whole_rounds() -> None:
    left = [(1.0 - compare_tickets.PER_ROUND) ** number for number in (7, 10, 13)]
    assert left == pytest.approx([0.2, 0.1, 0.05], abs=1e-3)


def test_every_flag_says_what_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare_tickets, "FIXED", compare_tickets.FIXED | TINY | {"eval.num_images": 10})
    words = ["--seeds", "3", "--steps", "2", "--sparsities", "40", "--per-round", "0.4", "--out", str(tmp_path)]
    assert compare_tickets.main(words) == 0
    written = json.loads((tmp_path / "results.json").read_text())
    assert (written["seeds"], written["steps"], written["rounds"]) == ([3], 2, [1])
    for scope in ("global", "layer"):
        assert (tmp_path / f"{scope}-2-3").is_dir()
        (chain,) = written["chains"][scope]
        assert [stage["kind"] for stage in chain].count("ticket") == 2
        assert {stage["round_number"] for stage in chain} == {0, 1}
        assert chain[-1]["remaining"] == pytest.approx(0.6, abs=0.01)
    table = (tmp_path / "table.md").read_text()
    assert "2 optimizer steps a round, seeds 3" in table
    assert "40.0% pruned" in table
    assert capsys.readouterr().out.endswith(f"{table}\n")
