"""Faults on the way to W&B, one kind a trial: the real client against a server that misbehaves.

Whatever happens, W&B has the whole run at the end, or the exit status, the run's folder and one printed command say
that it has not.
"""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from forks import WAIT_S, WORDS, Fork, Forks
from server import Fault, Run, WandbServer
from wandb_client import Client

from agent.ending import UNSENT
from diffusion_core.run_folder import locked

STEPS = 60
TRIAL = [*WORDS, f"--train.steps={STEPS}", "--checkpoint.every=30", "--checkpoint.keep=1"]
RETRIES = {f"WANDB_X_{what}_RETRY_WAIT_MAX_SECONDS": "1" for what in ("FILE_STREAM", "GRAPHQL", "FILE_TRANSFER")} | {
    "WANDB_FINISH_TIMEOUT": "20",
    "DIFFUSION_SWEEPS_DOWNLOAD_WITHIN": "3",
}

pytestmark = pytest.mark.slow


@dataclass
class Story:
    """A server, and trials that talk to it from folders of their own."""

    server: WandbServer
    forks: Forks
    folder: Path

    def start(self, *words: str, machine: str = "one", module: str = "agent", **env: str) -> Fork:
        client = Client(self.server, self.folder / machine)
        variables = client.env | RETRIES | {"WANDB_RUN_ID": "one"} | env
        return self.forks.start(list(words) or TRIAL, self.folder / machine, variables, module)

    @property
    def run(self) -> Run:
        return self.server.runs["one"]

    def run_file(self, machine: str = "one") -> dict[str, Any]:
        return json.loads((self.folder / machine / "run" / "run.json").read_text())

    def check_whole(self, machine: str = "one") -> None:
        """Nothing is missing, nothing is there twice."""
        assert self.run.state == "finished"
        assert [row["_step"] for row in self.run.history] == list(range(1, STEPS + 1))
        for kind in ("model", "training-state"):
            aliases = {alias for item in self.run.output_artifacts if item.type == kind for alias in item.aliases}
            assert {"latest", f"step-{STEPS}"} <= aliases
        for row in self.run.history:
            if "samples" in row:
                assert self.run.files[row["samples"]["path"]].startswith(b"\x89PNG")
        assert not self.run_file(machine).get("unsent")
        assert self.server.errors == []


@pytest.fixture
def story(tmp_path: Path, forks: Forks) -> Iterator[Story]:
    with WandbServer() as server:
        yield Story(server, forks, tmp_path)


def until(condition: Callable[[], Any], trial: Fork) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, trial.output
        assert trial.poll() is None, trial.output
        time.sleep(0.02)


def steps_done(folder: Path) -> int:
    file = folder / "history.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault("file_stream", status=400, after=1, times=1), id="stream-400"),
        pytest.param(Fault("file_stream", status=404, after=2, times=1), id="stream-404"),
        pytest.param(Fault("file_stream", lose=True, after=1, times=2), id="stream-answers-lost"),
        pytest.param(Fault("CreateArtifact|CommitArtifact", status=404, times=2), id="artifact-404"),
        pytest.param(Fault("PUT storage/runs", status=403, times=2), id="picture-403"),
        pytest.param(Fault("PUT storage/.*", status=500, times=3), id="storage-500"),
        pytest.param(Fault("UpsertBucket", status=400, times=1), id="start-400"),
    ],
)
def test_what_a_passing_fault_cut_off_is_sent_again(story: Story, fault: Fault) -> None:
    story.server.faults.append(fault)
    trial = story.start()
    assert trial.wait() == 0, trial.output
    assert fault.happened
    assert "Traceback" not in trial.output
    story.check_whole()


def test_what_a_lasting_fault_holds_back_is_told_and_can_be_sent(story: Story) -> None:
    fault = Fault("file_stream", status=403, after=1)
    story.server.faults.append(fault)
    trial = story.start()
    assert trial.wait() == UNSENT, trial.output
    assert "Traceback" not in trial.output
    assert any(name.startswith("history") for name in story.run_file()["unsent"])
    story.server.faults.remove(fault)
    command = re.search(r"to send it: python -m (agent\.sync) (\S+)\n", trial.output)
    assert command is not None, trial.output
    for _ in range(2):  # The second time, there is nothing to do.
        sync = story.start(command[2], module=command[1])
        assert sync.wait() == 0, sync.output
        story.check_whole()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(".*", status=401), "error: WANDB_API_KEY: W&B refuses the API key (status 401); check it"),
        (Fault("UpsertBucket", status=403), "error: W&B refuses this run (a fault of the test); check WANDB_ENTITY"),
    ],
    ids=["key", "project"],
)
def test_a_refusal_is_called_what_it_is_and_stops_the_trial(story: Story, fault: Fault, message: str) -> None:
    story.server.faults.append(fault)
    trial = story.start()
    assert trial.wait() == 2, trial.output
    assert trial.output.count("error: ") == 1
    assert message in trial.output
    assert "Traceback" not in trial.output
    assert steps_done(story.folder / "one" / "run") == 0


def test_slow_uploads_arrive_in_pairs(story: Story) -> None:
    """An upload takes longer than the time between checkpoints; every checkpoint on W&B can be resumed from."""
    story.server.faults.append(Fault("PUT storage/.*", wait_s=0.3))
    trial = story.start(*TRIAL, "--checkpoint.every=2")
    until(lambda: steps_done(story.folder / "one" / "run") == STEPS, trial)
    steps = {
        kind: {item.metadata["step"] for item in story.run.output_artifacts if item.type == kind and item.metadata}
        for kind in ("model", "training-state")
    }
    assert trial.wait() == 0, trial.output
    # Of the last one, one half may be on its way.
    assert steps["model"] - steps["training-state"] <= {max(steps["model"], default=0)}
    story.check_whole()


@pytest.mark.parametrize("operation", ["GET (storage|artifactsV2)/.*", "ProjectArtifacts"])
def test_a_checkpoint_that_cannot_be_downloaded_hands_the_trial_back(story: Story, operation: str) -> None:
    first = story.start()
    until(lambda: len(story.run.output_artifacts) >= 2 if "one" in story.server.runs else 0, first)
    first.send(signal.SIGTERM)
    assert first.wait() == 128 + signal.SIGTERM, first.output
    at = len(story.run.history)
    fault = Fault(operation, status=404)
    story.server.faults.append(fault)
    second = story.start(machine="two")
    assert second.wait() == UNSENT, second.output
    assert "Traceback" not in second.output
    assert "start over with --checkpoint.resume=false" in second.output
    assert (story.run.state, len(story.run.history)) == ("preempted", at)
    assert [alert["title"] for alert in story.run.alerts] == ["Checkpoint not downloaded"]
    fault.times = fault.happened + 2  # A passing fault: the download is tried again.
    third = story.start(machine="three", DIFFUSION_SWEEPS_DOWNLOAD_WITHIN="60")
    assert third.wait() == 0, third.output
    assert [row["_step"] for row in story.run.history] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("moment", ["data", "start"])
def test_a_signal_before_the_run_has_started_hands_the_trial_back(story: Story, moment: str) -> None:
    if moment == "start":
        story.server.faults.append(Fault("UpsertBucket", wait_s=2.0, times=1))
    trial = story.start()
    if moment == "start":
        until(lambda: story.server.faults[0].happened, trial)
    else:
        until(lambda: (story.folder / "one" / "run" / "lock").exists(), trial)
    trial.send(signal.SIGTERM)
    began = time.monotonic()
    assert trial.wait() == 128 + signal.SIGTERM, trial.output
    assert time.monotonic() - began < 20.0
    assert "Traceback" not in trial.output
    assert story.run.state == "preempted"
    assert steps_done(story.folder / "one" / "run") < STEPS


def test_a_signal_to_all_processes_of_a_trial_hands_it_back_whole(story: Story) -> None:
    trial = story.start(*TRIAL, "--train.steps=100000")
    until(lambda: steps_done(story.folder / "one" / "run") > 40, trial)
    processes = [*psutil.Process(trial.pid).children(recursive=True), psutil.Process(trial.pid)]
    assert len(processes) > 1, "W&B's core is a process of its own"
    for process in processes:
        process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert trial.wait() == 128 + signal.SIGTERM, trial.output
    assert time.monotonic() - began < 25.0
    assert "Traceback" not in trial.output
    assert story.run.state == "preempted"
    done = steps_done(story.folder / "one" / "run")
    assert [row["_step"] for row in story.run.history] == list(range(1, done + 1))
    assert not story.run_file().get("unsent")


def test_training_goes_on_if_the_client_dies(story: Story) -> None:
    trial = story.start()
    until(lambda: "one" in story.server.runs and len(story.run.history) > 5, trial)
    for process in psutil.Process(trial.pid).children(recursive=True):
        process.kill()
    assert trial.wait() == 0, trial.output
    assert "Traceback" not in trial.output
    story.check_whole()


@pytest.mark.parametrize("trial_too", [False, True])
def test_a_picture_that_the_dead_client_had_not_sent_is_sent_again(story: Story, trial_too: bool) -> None:
    """Its row has arrived, and names it."""
    story.server.faults.append(fault := Fault("PUT storage/runs", drop=True))
    trial = story.start(*TRIAL, "--sample.every=20")
    until(lambda: fault.happened and len(story.run.history) > 20, trial)
    for process in [*psutil.Process(trial.pid).children(recursive=True), *[psutil.Process(trial.pid)] * trial_too]:
        process.kill()
    story.server.faults.remove(fault)
    if trial_too:
        trial.wait()
        trial = story.start(*TRIAL, "--sample.every=20")
    assert trial.wait() == 0, trial.output
    assert sum("samples" in row for row in story.run.history) == 3
    story.check_whole()


def test_a_checkpoint_that_a_killed_trial_had_not_uploaded_is_uploaded(story: Story) -> None:
    """It is the last one: the trial that goes on has nothing left to train, and writes no other."""
    story.server.faults.append(fault := Fault("CreateArtifact", drop=True))
    trial = story.start()
    until((story.folder / "one" / "run" / "checkpoints" / f"step-{STEPS:08d}").exists, trial)
    for process in [*psutil.Process(trial.pid).children(recursive=True), psutil.Process(trial.pid)]:
        process.kill()
    trial.wait()
    story.server.faults.remove(fault)
    again = story.start()
    assert again.wait() == 0, again.output
    story.check_whole()


def test_runs_that_were_recorded_offline_are_sent_from_wherever_they_are(story: Story) -> None:
    trial = story.start(WANDB_MODE="offline")
    assert trial.wait() == 0, trial.output
    assert "to put this run on W&B: python -m agent.sync run\n" in trial.output
    (story.folder / "one" / "run").rename(story.folder / "moved")
    (story.folder / "two").mkdir()
    (story.folder / "moved").rename(story.folder / "two" / "run")
    for _ in range(2):
        sync = story.start(".", machine="two", module="agent.sync")
        assert sync.wait() == 0, sync.output
        story.check_whole("two")


def test_a_trial_that_was_preempted_is_sent_as_such(story: Story) -> None:
    trial = story.start(WANDB_MODE="offline")
    assert trial.wait() == 0, trial.output
    sync = story.start("run", "--ended=143", "--preempted", module="agent.sync")
    assert sync.wait() == 0, sync.output
    assert (story.run.state, story.run.exit_code, len(story.run.history)) == ("preempted", 143, STEPS)


def test_a_run_that_goes_on_elsewhere_is_not_handed_back(story: Story) -> None:
    trial = story.start(*TRIAL, "--train.steps=100000")
    until(lambda: steps_done(story.folder / "one/run") > 2, trial)
    sync = story.start("run", "--ended=143", "--preempted", module="agent.sync")
    assert sync.wait() == 0, sync.output
    assert re.fullmatch(
        r"run: goes on elsewhere \(log\.dir = 'run': process \d+ works on this run; .*\)\n", sync.output
    )
    assert story.run.state == "running"
    psutil.Process(trial.pid).terminate()
    assert trial.wait() == 143, trial.output
    assert (story.run.state, story.run.exit_code) == ("preempted", 143)


def test_a_trial_has_its_run_sent_while_it_holds_its_lock(story: Story) -> None:
    trial = story.start(WANDB_MODE="offline")
    assert trial.wait() == 0, trial.output
    with locked(story.folder / "one" / "run"):
        refused = story.start("run", "--ended=0", module="agent.sync")
        assert refused.wait() == 2, refused.output
        sync = story.start("run", "--ended=0", "--locked", module="agent.sync")
        assert sync.wait() == 0, sync.output
    story.check_whole("one")
