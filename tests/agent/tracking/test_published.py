"""Figures measured afterwards reach W&B: artifacts' metadata, runs' summaries, and the leaderboard of a project."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from server import WandbServer
from wandb_client import Client

PROGRAM = """
import wandb
from pathlib import Path
from agent.tracking.tracker import WandbTracker
from diffusion_core.tracking import Upload
from agent.tracking.registry import publish

run = wandb.init(id="one", project="test")
tracker = WandbTracker(run)
tracker.log({"val/loss": 0.5}, 10)
tracker.summary({"model/params": 7, "model/macs": 11})
Path("weights.bin").write_bytes(b"12345")
metadata = {"step": 10, "figures": {"val/loss": 0.5}}
tracker.artifact(Upload("model-one", "model", [Path("weights.bin")], ["best"], metadata))
tracker.close(0)
result = publish("test/model-one:best", {"eval/fid5k_train": 3.25}, {"eval/fid5k_train": "reference=x, n=5000"})
"""


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server
        assert server.errors == []


@pytest.mark.slow
def test_figures_reach_the_artifact_its_run_and_the_leaderboard(server: WandbServer, tmp_path: Path) -> None:
    client = Client(server, tmp_path)
    name = client.script(PROGRAM)
    assert name.endswith("test/model-one:best")
    metadata = server.artifact("model-one:best").metadata
    assert metadata["figures"] == {"val/loss": 0.5, "eval/fid5k_train": 3.25}
    assert metadata["step"] == 10
    assert metadata["protocols"] == {"eval/fid5k_train": "reference=x, n=5000"}
    (run,) = [run for run in server.runs.values() if run.id == "one"]
    assert run.summary["eval/fid5k_train"] == 3.25
    assert run.summary["protocol/eval/fid5k_train"] == "reference=x, n=5000"
    assert run.summary["val/loss"]["min"] == 0.5  # What was there stays.

    board = client.command(sys.executable, "-m", "agent.leaderboard", "--project", "tester/test", "--upload")
    lines = board.splitlines()
    (row,) = [line for line in lines if line.startswith("one ")]
    assert row.split()[:4] == ["one", "7", "11", "0.5"]
    assert "3.25" in row
    assert "[1] reference=x, n=5000" in lines
    (logged,) = [other for other in server.runs.values() if other.id != "one"]
    assert logged.summary["leaderboard"]["_type"] == "table-file"
    assert (logged.summary["leaderboard"]["nrows"], logged.summary["leaderboard"]["ncols"]) == (1, 6)
