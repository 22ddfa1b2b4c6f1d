"""A chain of tickets in W&B, by the real client and agent: one trial of the sweep, its rounds a group with lineage."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from forks import until
from server import Run, WandbServer
from tiny import assert_same_tensors
from wandb_client import Client, finish

from diffusion_core.checkpoint import read_checkpoint
from pruning.masks.mask import MASKS_PART

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
        script = str(Path(__file__).parents[2] / "scripts" / "lottery_ticket.py")
        output = client.python(script, *words, "--out", "chain", WANDB_MODE="offline")
    assert "round 01 of 1: 50.00% of the weights" in output
    assert len([path for path in tmp_path.rglob("offline-run-*") if path.is_dir()]) == 3
    assert (tmp_path / "chain" / "summary.md").is_file()
    assert "report: chain/report.html" in output.splitlines()
    assert 'id="ticket-plot"' in (tmp_path / "chain" / "report.html").read_text()


STEPS = 60
MOVED = FIXED | {
    "prune.method": "lottery",
    "prune.rounds": 3,
    "prune.rewind_step": 10,
    "train.steps": STEPS,
    "train.lr": 0.01,
    "train.batch_size": 8,
    "train.device": "cpu",
    "train.precision": "fp32",
    "log.every": 1,
    "sample.every": 0,
    "checkpoint.every": 0,
    "eval.every": 0,
    "eval.consistency_images": 10,
}


def rounds_started(output: str) -> list[str]:
    return [line.split()[1] for line in output.splitlines() if line.startswith("round ")]


@dataclass
class Journey:
    """A chain that was moved twice, each time to an empty disk, and one that nobody disturbed.

    Attributes:
        server: as it was left.
        words: the command.
        folder: the chain's, on the last machine.
        output: what was printed there.
        undisturbed: the folder of the other chain.
    """

    server: WandbServer
    words: list[str]
    folder: Path
    output: str
    undisturbed: Path


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journey]:
    words = ["-m", "agent", *(f"--{key}={value}" for key, value in MOVED.items())]
    with WandbServer() as server:
        machines = [Client(server, tmp_path_factory.mktemp(name)) for name in ("preempted", "lost", "last", "quiet")]
        rounds = [machine.directory / "runs" / "chain" / "rounds" for machine in machines]
        # Handed back in round 1, with a checkpoint; then lost in round 2, which has none yet.
        for machine, folder, stage, number in (
            (machines[0], rounds[0], "01", signal.SIGTERM),
            (machines[1], rounds[1], "02", signal.SIGKILL),
        ):
            process = machine.fork(*words, WANDB_RUN_ID="chain")
            history = folder / stage / "history.jsonl"
            until(lambda file=history: file.exists() and file.read_text().count("\n") > 20)  # type: ignore[misc]
            process.send(number)
            process.end(143 if number == signal.SIGTERM else -9)
        output = machines[2].python(*words, WANDB_RUN_ID="chain")
        machines[3].python(*words, WANDB_RUN_ID="chain", WANDB_MODE="disabled")
        yield Journey(server, words, rounds[2].parent, output, rounds[3].parent)
        assert server.errors == []


@pytest.mark.slow
def test_a_chain_goes_on_on_an_empty_disk_and_ends_as_if_nothing_had_happened(journey: Journey) -> None:
    """Bit for bit: the weights of each round, its mask, and all figures but those that are measured times."""
    assert rounds_started(journey.output) == ["02", "03"]
    for stage in ("00", "01", "02", "03"):
        ours, theirs = (read_checkpoint(at / "rounds" / stage) for at in (journey.folder, journey.undisturbed))
        assert ours.step == theirs.step == STEPS
        # Nobody trains on from a round that was over elsewhere.
        assert set(theirs.parts) - set(ours.parts) == ({"optimizer"} if stage in ("00", "01") else set())
        for part in ours.parts:
            assert_same_tensors(ours.tensors(part), theirs.tensors(part))
        assert (MASKS_PART in ours.parts) == (stage != "00")
    timed = (
        "sample/seconds",
        "model/latency",
        "model/peak_memory",
        "model/checkpoint_bytes",
        "train/images_per_second",
    )
    summaries = [
        [
            stage | {"figures": {key: value for key, value in stage["figures"].items() if not key.startswith(timed)}}
            for stage in json.loads((at / "summary.json").read_text())
        ]
        for at in (journey.folder, journey.undisturbed)
    ]
    assert summaries[0] == summaries[1]
    assert "prune/consistency_ssim_10" in summaries[0][-1]["figures"]
    histories = [(at / "history.jsonl").read_text() for at in (journey.folder, journey.undisturbed)]
    assert histories[0] == histories[1]


@pytest.mark.slow
def test_w_and_b_has_every_row_of_a_moved_chain_once(journey: Journey) -> None:
    runs = journey.server.runs
    assert set(runs) == {"chain", "chain-00", "chain-01", "chain-02", "chain-03"}
    assert {run.state for run in runs.values()} == {"finished"}
    assert [row["step"] for row in runs["chain-00"].history] == list(range(1, STEPS + 1))
    for stage in ("01", "02", "03"):
        assert [row["step"] for row in runs[f"chain-{stage}"].history] == list(range(11, STEPS + 1))
    assert [row["step"] for row in runs["chain"].history] == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_finished_chain_is_given_a_control_on_an_empty_disk(journey: Journey, tmp_path: Path) -> None:
    """Made from a round and from a step to rewind to that this disk never held; only the control is trained."""
    words = [*journey.words, "--prune.control=random_mask"]
    machine = Client(journey.server, tmp_path)
    assert rounds_started(machine.python(*words, WANDB_RUN_ID="chain")) == ["03-random-mask"]
    quiet = Client(journey.server, journey.undisturbed.parents[1])
    quiet.python(*words, WANDB_RUN_ID="chain", WANDB_MODE="disabled")
    at = Path("rounds") / "03-random-mask"
    ours, theirs = (read_checkpoint(chain / at) for chain in (tmp_path / "runs" / "chain", journey.undisturbed))
    for part in theirs.parts:
        assert_same_tensors(ours.tensors(part), theirs.tensors(part))

    other = Client(journey.server, tmp_path / "other")
    output = other.python(*journey.words, "--prune.per_round=0.3", WANDB_RUN_ID="chain", code=2)
    assert "error: prune.per_round = 0.3: the run in 'runs/chain/rounds/01' was started with 0.5" in output
