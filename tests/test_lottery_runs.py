"""A chain of tickets in W&B, by the real client and agent: one trial of the sweep, its rounds a group with lineage."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb_client import Client, finish
from wandb_server import Run, WandbServer

FIXED: dict[str, Any] = {
    "preset": "digits",
    "model.channels": 8,
    "model.channel_multipliers": [1, 2],
    "model.norm_groups": 2,
    "train.steps": 3,
    "train.warmup_steps": 0,
    "eval.classifier": "none",
    "eval.val_images": 16,
    "sample.steps": 2,
    "sample.per_class": 1,
    "checkpoint.best_metric": "val/loss",
    "prune.rounds": 2,
    "prune.per_round": 0.5,
    "prune.rewind_step": 1,
}
SWEEP = {
    "method": "grid",
    "metric": {"name": "val/loss", "goal": "minimize"},
    "command": ["${env}", "${interpreter}", "-m", "agent", "${args}"],
    "parameters": {key: {"value": value} for key, value in FIXED.items()} | {"prune.method": {"values": ["lottery"]}},
}


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server
        assert server.errors == []


@pytest.fixture(scope="module")
def runs(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The runs of a sweep with one trial, by the end of their id: the chain's (``""``) and its rounds'."""
    client = Client(server, tmp_path_factory.mktemp("lottery"))
    (client.directory / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    client.wandb("sweep", "sweep.yaml")
    (sweep,) = server.sweeps.values()
    finish(client.agent(sweep))
    (trial,) = [run for run in server.runs.values() if run.sweep_id == sweep.id]
    return {run.id.removeprefix(trial.id): run for run in server.runs.values()}


@pytest.mark.slow
def test_a_chain_is_one_trial_and_its_rounds_are_runs_of_its_group(runs: dict[str, Run]) -> None:
    assert runs.keys() == {"", "-00", "-01", "-02"}
    trial = runs[""]
    assert {run.group for run in runs.values()} == {trial.id}
    assert {run.state for run in runs.values()} == {"finished"}
    assert [runs[name].sweep_id for name in ("-00", "-01", "-02")] == [None] * 3
    methods = {name: (run.config["prune.method"], run.config["prune.rounds"]) for name, run in runs.items()}
    assert methods == {"": ("lottery", 2), "-00": ("none", 35), "-01": ("lottery", 1), "-02": ("lottery", 2)}
    rows = [(row["step"], row["lottery/remaining"], "val/loss" in row) for row in trial.history]
    assert rows == [(0, 1.0, False), (1, 0.5, False), (2, 0.25, True)]
    assert trial.history[-1]["val/loss"] == runs["-02"].history[-1]["val/loss"]
    assert trial.summary["prune/sparsity"] == pytest.approx(0.75, abs=1e-3)
    assert trial.history[-1]["lottery/plots/blocks"]["_type"] == "image-file"
    assert [row["step"] for row in runs["-01"].history] == [3]  # From step 1 to the end.


@pytest.mark.slow
def test_each_round_is_made_from_the_one_before(runs: dict[str, Run]) -> None:
    names = {
        name: {artifact.name.removeprefix(f"training-state-{runs[''].id}") for artifact in run.used_artifacts
               if artifact.type == "training-state"}
        for name, run in runs.items()
    }  # fmt: skip
    assert names == {"": set(), "-00": set(), "-01": {"-00", "-rewind"}, "-02": {"-01", "-rewind"}}
    made = {artifact.name for artifact in runs["-02"].output_artifacts}
    assert {f"model-{runs[''].id}-02", f"training-state-{runs[''].id}-02"} <= made


@pytest.mark.slow
def test_offline_the_rounds_are_runs_of_the_folder(tmp_path: Path) -> None:
    with WandbServer() as idle:
        client = Client(idle, tmp_path)
        words = [f"--{key}={value}" for key, value in (FIXED | {"prune.rounds": 1}).items()]
        script = str(Path(__file__).parents[1] / "scripts" / "lottery_ticket.py")
        output = client.command(sys.executable, script, *words, "--out", "chain", WANDB_MODE="offline")
    assert "round 01 of 1: 50.00% of the weights" in output
    assert len([path for path in tmp_path.rglob("offline-run-*") if path.is_dir()]) == 3
    assert (tmp_path / "chain" / "summary.md").is_file()
