"""Figures measured afterwards reach W&B: artifacts' metadata, runs' summaries, and the leaderboard of a project."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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

    board = client.python("-m", "agent.leaderboard", "--project", "tester/test", "--upload")
    lines = board.splitlines()
    (row,) = [line for line in lines if line.startswith("one ")]
    assert row.split()[:5] == ["one", "10", "7", "11", "0.5"]
    assert "3.25" in row
    assert "[1] reference=x, n=5000" in lines
    (logged,) = [other for other in server.runs.values() if other.id != "one"]
    assert logged.summary["leaderboard"]["_type"] == "table-file"
    assert (logged.summary["leaderboard"]["nrows"], logged.summary["leaderboard"]["ncols"]) == (1, 7)

    client.python("-m", "agent.report", "tester/test/one", "--out", "one.md")
    page = (tmp_path / "one.md").read_text()
    assert "one is the best: val/loss 0.5 (lower is better) at step 10" in page
    assert "--artifact tester/test/model-one" in page
    assert "reference=x, n=5000" in page


TWO_VERSIONS = """
import wandb
from pathlib import Path
from agent.tracking.tracker import WandbTracker
from diffusion_core.tracking import Upload
from agent.tracking.registry import publish

run = wandb.init(id="two", project="test")
tracker = WandbTracker(run)
rows = {10: {"val/loss": 0.5, "eval/class_agreement": 0.7}, 20: {"val/loss": 0.9, "eval/class_agreement": 0.8}}
for step, row in rows.items():
    tracker.log(row, step)
    folder = Path(str(step))
    folder.mkdir()
    (folder / "weights.bin").write_bytes(str(step).encode())
    aliases = ["latest", f"step-{step}", *(["best"] if step == 10 else [])]
    tracker.artifact(Upload("model-two", "model", [folder / "weights.bin"], aliases, {"step": step, "figures": row}))
tracker.summary({"model/params": 7})
tracker.close(0)
alone = wandb.init(id="alone", project="test")
tracker = WandbTracker(alone)
tracker.log({"val/loss": 0.6}, 10)
tracker.summary({"model/params": 8})
tracker.close(0)
publish("test/model-two:latest", {"eval/fid5k_train": 9.0}, {"eval/fid5k_train": "of the newest"})
publish("test/model-two", {"eval/fid5k_train": 3.0}, {"eval/fid5k_train": "of the best"})
"""


@pytest.mark.slow
def test_a_row_of_a_project_is_a_version_of_a_model(server: WandbServer, tmp_path: Path) -> None:
    """The summary of the run holds the best value of each figure, and those are of two versions."""
    client = Client(server, tmp_path)
    client.script(TWO_VERSIONS)
    assert server.artifact("model-two:best").metadata["figures"]["eval/fid5k_train"] == 3.0
    assert server.artifact("model-two:latest").metadata["figures"]["eval/fid5k_train"] == 9.0
    summary = server.runs["two"].summary
    assert (summary["val/loss"]["min"], summary["eval/class_agreement"]["max"]) == (0.5, 0.8)
    assert summary["eval/fid5k_train"] == 3.0  # That of the newest is not the run's.

    def rows(*words: str) -> dict[str, dict[str, Any]]:
        command = ["-m", "agent.leaderboard", "--project", "tester/test", *words, "--out", "board"]
        printed = client.python(*command)
        found = {row["model"]: row for row in json.loads((tmp_path / "board" / "leaderboard.json").read_text())}
        assert ("rows without a step" in printed) == any(row["step"] is None for row in found.values())
        return found

    best = rows()
    assert best["two"]["step"] == 10
    assert best["two"]["figures"] == {"val/loss": 0.5, "eval/class_agreement": 0.7, "eval/fid5k_train": 3.0}
    assert best["two"]["protocols"] == {"eval/fid5k_train": "of the best"}
    assert (best["alone"]["step"], best["alone"]["figures"]) == (None, {"val/loss": 0.6})
    newest = rows("--which", "newest")
    assert newest["two"]["step"] == 20
    assert newest["two"]["figures"] == {"val/loss": 0.9, "eval/class_agreement": 0.8, "eval/fid5k_train": 9.0}
    assert newest["two"]["protocols"] == {"eval/fid5k_train": "of the newest"}
    only = rows("--which", "20")
    assert only == {"two": newest["two"]}
    found = client.script("""
from agent.tracking.api import find_artifact
names = ["model-two", "test/model-two", "tester/test/model-two", "model-two:latest"]
result = [find_artifact(name).metadata["step"] for name in names]
result += [find_artifact("model-two", which).metadata["step"] for which in ("best", "newest", "20", "10")]
try:
    find_artifact("model-two:best", "newest")
except ValueError as error:
    result.append(str(error))
""")
    *steps, refusal = found
    assert steps == [10, 10, 10, 20, 10, 20, 20, 10]
    assert refusal == "--which = 'newest': 'tester/test/model-two:best' names a version already; leave one of them out"
