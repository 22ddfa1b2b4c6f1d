"""A small storm over a sweep; ``python tests/storm.py`` makes a large one."""

from __future__ import annotations

from pathlib import Path

import pytest
import storm


@pytest.mark.slow
def test_every_run_of_a_sweep_comes_out_of_a_storm_whole(tmp_path: Path) -> None:
    report = storm.storm(tmp_path, trials=3, agents=2, seed=0, patience_s=400.0, every_s=3.0)
    assert report.wrong == {}
    assert sum(report.faults.values()) >= 2
    assert sum(report.commands.values()) <= report.trials
