"""Sweeps whose disk is full: no trial fails of it, nothing more is started, and the same command goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from clusters import fake_slurm
from clusters.trials import EVERY, sweep_of
from stub_sweep import stub_content

from agent.sweep.file import SweepFile, check_sweep
from agent.sweep.offline import offline_sweep
from diffusion_core.machine.job import full_disk_file
from diffusion_core.machine.slurm.queue import POLL
from diffusion_core.registries import LAUNCHERS
from diffusion_core.search.offline import OfflineSweep
from diffusion_core.search.state import Trial
from diffusion_core.search.sweep import SweepError

STUB_CONTENT = stub_content(3, [0.3, 0.2, 0.1])


def sweep(content: dict[str, Any]) -> SweepFile:
    return check_sweep(content, "mine.yaml", "mine")


def outcomes(coordinator: OfflineSweep) -> list[tuple[str, int]]:
    return [(trial.state, trial.failures) for trial in coordinator.state.trials]


def test_a_trial_that_ends_on_a_full_disk_waits_and_nothing_more_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    full.touch()
    (tmp_path / "notes").mkdir()
    monkeypatch.setenv("STUB_NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("STUB_FULL", str(full))
    folder = tmp_path / "sweep"
    for _ in range(3):  # More often than a trial may fail.
        first = offline_sweep(sweep(STUB_CONTENT), folder)
        with pytest.raises(SweepError) as caught:
            first.run()
        (trial,) = first.state.trials
        place = str(folder / "trials" / trial.id)
        assert str(caught.value) == f"{place!r}: the disk is full; free some space, then repeat the command"
        assert outcomes(first) == [("waiting", 0)]
    assert capsys.readouterr().out.count(" ended, as the disk is full, ") == 3
    full.unlink()
    last = offline_sweep(sweep(STUB_CONTENT), folder)
    last.run()
    assert outcomes(last) == [("finished", 0)] * 3


@pytest.mark.slow
def test_a_checkpoint_that_a_full_disk_refuses_costs_no_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A real trial, of whose process no file may grow beyond a limit, as on a full disk."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("GIT_DIR", str(tmp_path))  # Git would leave a lock in this repository.
    limit = tmp_path / "limit"
    limit.write_text('#!/bin/bash\nulimit -f 32\nexec "$@"\n')  # In KiB.
    limit.chmod(0o755)
    content = sweep_of("grid", {"seed": {"values": [0]}}, {"train.steps": 2 * EVERY})
    content["command"] = ["${env}", str(limit), "${interpreter}", "-m", "agent", "${args}"]
    first = offline_sweep(sweep(content), tmp_path / "sweep")
    with pytest.raises(SweepError, match="the disk is full; free some space, then repeat the command"):
        first.run()
    assert outcomes(first) == [("waiting", 0)]
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: cannot write checkpoint '")
    assert "': File too large; free some space, and continue with --log.dir=" in line
    limit.write_text('#!/bin/bash\nexec "$@"\n')
    last = offline_sweep(sweep(content), tmp_path / "sweep")
    last.run()
    assert outcomes(last) == [("finished", 0)]


def test_a_job_that_could_not_even_note_its_end_is_submitted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sweep's process could not write either, and is started again once there is room."""
    for name, value in {**fake_slurm.install(tmp_path / "bin"), POLL: "0.1"}.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "sweep"

    def coordinator() -> OfflineSweep:
        content = STUB_CONTENT | {"command": ["${interpreter}", "-m", "agent", "${args}"], "run_cap": 1}
        return offline_sweep(sweep(content), folder, launcher=LAUNCHERS["slurm"].make([{}], ""))

    first = coordinator()
    first.state.trials.append(Trial("one", {"train.lr": 0.3}, "submitted", failures=1, job="1"))
    (folder / "trials/one").mkdir(parents=True)
    full_disk_file(folder / "trials/one", "1").touch()
    first.state.write()
    job = {"id": "1", "name": "one", "folder": str(folder / "trials/one"), "state": "FAILED", "restarts": 0, "since": 0}
    (tmp_path / "bin/state.json").write_text(json.dumps({"call": 0, "next": 1, "jobs": [job]}))
    last = coordinator()
    last.run()
    assert outcomes(last) == [("finished", 1)]
