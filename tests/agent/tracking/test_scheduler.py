"""Sweeps that W&B's client searches on the user's machine: `wandb sweep-scheduler` with Optuna (experimental)."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters.trials import sweep_of
from server import WandbServer
from wandb_client import Client, finish

from diffusion_core.checkpoint import read_checkpoint


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server
        assert server.errors == []


@pytest.mark.slow
def test_optuna_searches_two_objectives_online(server: WandbServer, tmp_path: Path) -> None:
    """Our trials under the client's own scheduler. It reads plain values of summaries: ``best/...``, and costs."""
    client = Client(server, tmp_path)
    objectives = [{"name": "best/val/loss", "goal": "minimize"}, {"name": "sample/macs", "goal": "minimize"}]
    knobs = {"train.steps": 8, "eval.every": 4, "checkpoint.every": 4}
    content = sweep_of("random", {"sample.steps": {"values": [1, 2]}, "train.lr": {"min": 0.001, "max": 0.01}}, knobs)
    del content["metric"]
    (tmp_path / "mine.yaml").write_text(
        json.dumps(content | {"metrics": objectives, "scheduler": {"engine": "optuna"}})
    )
    printed = client.wandb("sweep", "mine.yaml")
    (sweep,) = server.sweeps.values()
    path = f"tester/test/{sweep.id}"
    assert f"wandb sweep-scheduler {path}" in printed
    words = ["sweep-scheduler", path, "--poll-interval", "0.5", "--batch-size", "1"]
    scheduler = client.popen(sys.executable, "-m", "wandb", *words)
    agent = client.popen(sys.executable, "-m", "wandb", "agent", "--count", "2", path)
    finish(agent)
    assert scheduler.stdout is not None
    said = ""
    while said.count("finished with value: [") < 2 and (line := scheduler.stdout.readline()):
        said += line
    scheduler.send_signal(signal.SIGINT)
    said += finish(scheduler)
    done = [run for run in sweep.runs if run.state == "finished"]
    assert len(done) == 2
    for run in done:
        assert f"Run {run.id} is finished" in said
        best = read_checkpoint(tmp_path / "runs" / run.id)
        figures = {name: value for name, value in run.summary.items() if name.startswith("best/")}
        assert figures["best/val/loss"] == pytest.approx(best.metadata["best"]["value"])
        assert figures["best/step"] == best.metadata["best"]["step"]
        assert isinstance(run.summary["sample/macs"], int | float)
    assert "failed to record" not in said
    assert said.count("finished with value: [") == 2, said
