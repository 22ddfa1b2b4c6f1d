"""What the process that runs a sweep does for a trial stays the same however many trials there were."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from agent.sweep.file import check_sweep
from diffusion_core.machine.jobs import AgentTasks, Job, Outcome, Task
from diffusion_core.search import offline
from diffusion_core.search.offline import OfflineSweep


class Ended:
    """A job that has done its work."""

    id: str | None = "1"
    seconds = 1.0
    total_seconds: float | None = None

    def poll(self) -> Outcome:
        return Outcome(0)

    def stop(self) -> None: ...

    def kill(self) -> None: ...


class AtOnce:
    """A launcher whose jobs end at once, with a figure."""

    slots = 4

    @contextmanager
    def listening(self) -> Iterator[list[int]]:
        yield []

    @contextmanager
    def locked(self, folder: Path) -> Iterator[None]:
        yield

    def start(self, task: Task, submitted: Callable[[str | None], object]) -> Job:
        submitted("")
        task.folder.mkdir(parents=True)
        figures = {"val/loss": hash(task.name) % 1000 / 1000}
        (task.folder / "result.json").write_text(json.dumps({"figures": figures}))
        submitted("1")
        return Ended()

    def adopt(self, name: str, folder: Path, job: str, submitted: Callable[[str | None], object]) -> Job:
        return Ended()

    def leave(self, jobs: Sequence[Job], received: Sequence[int]) -> bool:
        return False

    def log(self, folder: Path) -> Path | None:
        return None

    def run_agents(self, agents: AgentTasks) -> tuple[list[int], bool]:
        return [], False

    def preview(self, task: Task | AgentTasks) -> str:
        return ""


def calls_each(method: str, trials: int) -> float:
    """Run a sweep. Return the number of functions that are called for each trial."""
    space = {"values": list(range(trials))} if method == "grid" else {"min": 0, "max": 10**6}
    content = {
        "method": method,
        "metric": {"name": "val/loss", "goal": "minimize"},
        "command": ["${interpreter}", "-m", "agent", "${args}"],
        "parameters": {"preset": {"value": "digits"}, "seed": space},
        "run_cap": trials,
    }
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    # In memory, where there is such a place: the state is flushed to the disk four times a trial.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        coordinator = OfflineSweep(check_sweep(content, "x", "x"), Path(folder) / "x", launcher=AtOnce())
        assert coordinator.sweep.total == trials  # Counted once.
        sys.setprofile(count)
        try:
            records = coordinator.run()
        finally:
            sys.setprofile(None)
        assert [record.state for record in records] == ["finished"] * trials
        stored = json.loads((Path(folder) / "x/sweep.json").read_text())["trials"]
        assert [trial["state"] for trial in stored] == ["finished"] * trials
    return calls / trials


@pytest.mark.parametrize("method", ["grid", "random"])
def test_a_trial_costs_the_same_among_many(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "POLL_SECONDS", 0.0)
    calls_each(method, 4)  # Imports are counted for none.
    few, many = calls_each(method, 64), calls_each(method, 256)
    # The engine is asked for as many combinations of a grid as there are trials; the share that is used varies.
    assert many < 1.25 * few
