"""A sweep on W&B whose agents are an array of jobs of Slurm, one preempted and one killed: every run ends whole."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters.slurm import Cluster, cluster, missing, wait_for
from server import Run, WandbServer
from wandb_client import Client, finish

from diffusion_core.machine.slurm_queue import POLL

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]

STEPS, EVERY = 100, 4
KNOBS: dict[str, Any] = {
    "preset": "digits",
    "model.channels": 16,
    "model.channel_multipliers": [1, 1],
    "model.norm_groups": 2,
    "train.warmup_steps": 0,
    "train.batch_size": 16,
    "train.steps": STEPS,
    "eval.every": 0,
    "eval.val_images": 20,
    "eval.classifier": "none",
    "sample.every": 0,
    "sample.steps": 2,
    "sample.per_class": 1,
    "log.every": EVERY,
    "log.progress": False,
    "checkpoint.best_metric": "val/loss",
    "checkpoint.upload": False,
}


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server
        assert server.errors == []


def steps(run: Run) -> list[int]:
    return [row["step"] for row in run.history if "train/loss" in row]


def processes_of(variable: str) -> list[int]:
    """The processes whose environment has a variable."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if variable.encode() in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
    return found


def test_an_array_of_agents_runs_a_grid_and_hands_on_what_is_preempted(
    slurm: Cluster, server: WandbServer, tmp_path: Path
) -> None:
    client = Client(server, tmp_path)
    client.env = {name: value for name, value in client.env.items() if not name.startswith("SLURM_")}
    content = {
        "method": "grid",
        "metric": {"name": "val/loss", "goal": "minimize"},
        "command": ["${env}", "${interpreter}", "-m", "agent", "${args}"],
        "parameters": {**{key: {"value": value} for key, value in KNOBS.items()}, "seed": {"values": [0, 1, 2]}},
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(content))
    words = ["--launcher", "slurm", "--slurm", "--partition=low --cpus-per-task=3"]
    environment = {**slurm.environment, POLL: "1"}
    command = [sys.executable, "-m", "agent.sweep"]
    submitted = finish(client.popen(*command, "mine.yaml", "--agents", "2", "--detach", *words, **environment))
    (sweep,) = server.sweeps.values()
    assert f"--attach tester/test/{sweep.id}" in submitted
    attached = client.popen(*command, "--attach", sweep.id, *words, **environment)

    wait_for(lambda: [len(steps(run)) > 1 for run in sweep.runs].count(True) == 2, "the first rows", 120)
    for pid in processes_of("SLURM_ARRAY_TASK_ID=2"):  # As if its node had failed: nobody can tell W&B.
        os.kill(pid, signal.SIGKILL)
    slurm.preempt("n1")
    wait_for(lambda: "preempted" in [run.state for run in sweep.runs], "preemption", 60)
    (second,) = slurm.ask("squeue", "--array", "--states=FAILED", "-h", "-o", "%i").split()
    slurm.ask("scontrol", "requeue", second)
    slurm.start_now()
    output = finish(attached)

    assert len(sweep.runs) == 3
    assert sorted(run.config["seed"] for run in sweep.runs) == [0, 1, 2]
    for run in sweep.runs:
        assert (run.state, run.exit_code) == ("finished", 0)
        assert steps(run) == list(range(EVERY, STEPS + 1, EVERY)), "each row once"
        assert run.summary["slurm/partition"] == "low"
        assert run.summary["slurm/node"] in ("n1", "n2")
    assert [run.summary["slurm/restarts"] for run in sweep.runs[:2]] == [1, 1], "both went on in a job that had ended"
    assert "its job was killed; handing it back" in (tmp_path / f"runs/agents/{sweep.id}-2.log").read_text()
    assert f"jobs {sweep.id} are under way; no more are submitted" in output
    assert "agents: 2 completed" in output
