"""Trials that are told to stop, through the real agent: preempted ones go on elsewhere, ended ones stay ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from forks import WORDS, Forks, handles, until
from server import Run, Sweep, WandbServer
from tiny import assert_same_tensors
from wandb_client import Client, finish

from diffusion_core.checkpoint import Checkpoint, newest_checkpoint

STEPS = 300
ENDLESS = 1_000_000
KNOBS: dict[str, Any] = {
    **dict(word[2:].split("=") for word in WORDS if not word.startswith("--log.dir")),
    "model.attention_resolutions": [],
    "train.steps": STEPS,
    "checkpoint.every": 50,
    "checkpoint.keep": 1,
    "log.every": 5,
}


def sweep(client: Client, config: dict[str, Any]) -> Sweep:
    (client.directory / "sweep.json").write_text(json.dumps(config))
    before = set(client.server.sweeps)
    client.wandb("sweep", "sweep.json")
    (sweep_id,) = set(client.server.sweeps) - before
    return client.server.sweeps[sweep_id]


def trial_of(agent: int) -> int:
    """The process that an agent runs a trial in. A child that is still a copy of the agent is another one."""
    found: list[int] = []

    def look() -> bool:
        for child in psutil.Process(agent).children():
            with contextlib.suppress(psutil.Error):
                if child.cmdline()[1:3] == ["-m", "agent"]:
                    found.append(child.pid)
        return bool(found)

    until(look)
    return found[0]


def steps_on_disk(folder: Path) -> int:
    file = folder / "history.jsonl"
    return 5 * file.read_text().count("\n") if file.exists() else 0


@dataclass
class Story:
    """What happened: one trial was preempted on one machine and went on on another; the next one was ended.

    Attributes:
        server: as it was left.
        moved: the run of the first trial.
        ended: that of the second.
        unbroken: the newest checkpoint of a trial of the first one's configuration that nobody disturbed.
        here: the folder of the second machine.
        output: of the second machine's agent.
        handed_back: the state of the first run, and its rows, when its first machine was gone.
        rows: of the unbroken run.
    """

    server: WandbServer
    moved: Run
    ended: Run
    unbroken: Checkpoint
    here: Path
    output: str
    handed_back: tuple[str, int]
    rows: list[dict[str, Any]]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Iterator[Story]:
    one, other, quiet = (tmp_path_factory.mktemp(name) for name in ("one", "other", "quiet"))
    with WandbServer() as server:
        first, second = (Client(server, folder, forked=False) for folder in (one, other))
        fixed = {key: {"value": value} for key, value in KNOBS.items()}
        made = sweep(first, {
            "method": "grid",
            "metric": {"name": "val/loss", "goal": "minimize"},
            "command": [sys.executable, "-m", "agent", "${args}"],
            # The second one has no end of its own.
            "parameters": fixed | {"train.steps": {"values": [STEPS, ENDLESS]}},
        })  # fmt: skip
        agent = first.agent(made, "--count", "1")
        undisturbed = forks.start(
            [f"--{key}={value if value != [] else ''}" for key, value in KNOBS.items()] + ["--log.dir=run"], quiet
        )
        trial = trial_of(agent.pid)
        moved = made.runs[0]
        until(lambda: steps_on_disk(one / "runs" / moved.id) > 110)
        os.kill(trial, signal.SIGTERM)  # The machine is being taken away.
        finish(agent)
        handed_back = moved.state, len(moved.history)

        agent = second.agent(made)
        until(lambda: len(made.runs) == 2 and any(row["step"] > 110 for row in made.runs[1].history))
        with server.backend.lock:  # A user, or hyperband: the agent is told at its next heartbeat.
            made.runs[1].stop_requested = True
        output = finish(agent)
        assert undisturbed.wait() == 0
        unbroken = newest_checkpoint(quiet / "run" / "checkpoints")
        assert unbroken is not None
        rows = [json.loads(line) for line in (quiet / "run" / "history.jsonl").read_text().splitlines()]
        yield Story(server, moved, made.runs[1], unbroken, other, output, handed_back, rows)
        assert server.errors == []


@pytest.mark.slow
def test_a_preempted_trial_is_handed_back(story: Story) -> None:
    state, rows = story.handed_back
    assert state == "preempted"
    assert 0 < rows < STEPS / 5


@pytest.mark.slow
def test_it_goes_on_on_an_empty_disk_and_ends_as_if_nothing_had_happened(story: Story) -> None:
    moved = story.moved
    assert (moved.state, moved.exit_code) == ("finished", 0)
    here = newest_checkpoint(story.here / "runs" / moved.id / "checkpoints")
    assert here is not None
    assert here.step == story.unbroken.step == STEPS
    for part in story.unbroken.parts:
        assert_same_tensors(here.tensors(part), story.unbroken.tensors(part))
    assert [row["step"] for row in moved.history] == list(range(5, STEPS + 1, 5))
    for ours, theirs in zip(moved.history, story.rows, strict=True):  # Also the row that spans the stop.
        for name in theirs.keys() - {"train/images_per_second"}:
            assert ours[name] == theirs[name], (name, theirs["step"])
    assert moved.summary["preemptions"] == 1
    assert steps_on_disk(story.here / "runs" / moved.id) == STEPS


@pytest.mark.slow
def test_a_trial_that_w_and_b_ends_is_not_handed_back(story: Story) -> None:
    ended = story.ended
    assert ended.state == "killed"
    assert "as W&B asked; the run is over" in story.output
    last = ended.history[-1]["step"]
    assert 110 < last < ENDLESS
    assert [row["step"] for row in ended.history] == list(range(5, last + 1, 5))
    assert ended.summary["step"] == last
    assert "preemptions" not in ended.summary


@pytest.mark.slow
def test_w_and_b_keeps_what_is_needed_and_gives_the_rest_a_time_to_live(story: Story) -> None:
    """The best and the latest; of training states the time to live is set from the start."""
    versions = [artifact for artifact in story.moved.output_artifacts if artifact.type == "model"]
    assert len(versions) >= 4
    for version in versions:
        kept = {"best", "latest"} & set(version.aliases)
        assert bool(kept) == (version.ttl is None), version
        if not kept:
            assert version.aliases == []
    states = [artifact for artifact in story.moved.output_artifacts if artifact.type == "training-state"]
    assert {state.ttl for state in states} == {30 * 24 * 3600}


@pytest.mark.slow
def test_a_trial_that_is_preempted_while_it_imports_is_handed_back(tmp_path: Path) -> None:
    with WandbServer() as server:
        client = Client(server, tmp_path, forked=False)
        words = [word for word in WORDS if not word.startswith("--log.dir")]
        made = sweep(client, {
            "method": "grid",
            "command": [sys.executable, "-m", "agent", *words, "--train.steps=10", "${args}"],
            "parameters": {"seed": {"values": [0, 1]}},
        })  # fmt: skip
        agent = client.agent(made)
        trial = trial_of(agent.pid)
        until(lambda: handles(trial, signal.SIGTERM))  # Python has begun to import the trial.
        os.kill(trial, signal.SIGTERM)
        output = finish(agent)
        assert [run.state for run in made.runs] == ["finished", "finished"], output
        assert [run.summary.get("preemptions") for run in made.runs] == [1, None], output
        assert "Traceback" not in output
        assert server.errors == []
