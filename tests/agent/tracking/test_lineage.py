"""What a run came from, where W&B did not take that at once: it is noted, and `agent.sync` sends it again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import WORDS, Fork, Forks
from server import Fault, WandbServer
from wandb_client import Client

from agent.ending import UNSENT

TRIAL = [*WORDS, "--train.steps=8", "--checkpoint.every=8", "--checkpoint.keep=1"]
DENSE = [*TRIAL, "--model.norm_groups=1", "--log.dir=dense"]
PRUNED = ["--init.checkpoint=dense", "--prune.method=structured", "--prune.keep=0.5", "--prune.step=0"]
PRUNED += ["--model.norm_groups=1"]
STUDENT = ["--steps.method=consistency", "--steps.step=2", "--checkpoint.best_metric=train/loss"]
KINDS = {"plain": [], "pruned": PRUNED, "student": STUDENT}
OWN = {"plain": [], "pruned": ["pruned-one"], "student": ["teacher-one"]}

pytestmark = pytest.mark.slow


class Story:
    """A server, and commands that talk to it from one folder."""

    def __init__(self, server: WandbServer, forks: Forks, folder: Path) -> None:
        self.server, self.forks, self.folder = server, forks, folder

    def start(self, *words: str, module: str = "agent", run: str = "one", **env: str) -> Fork:
        variables = Client(self.server, self.folder).env | {"WANDB_FINISH_TIMEOUT": "20"} | env
        variables |= {"WANDB_X_GRAPHQL_RETRY_WAIT_MAX_SECONDS": "1", "WANDB_RUN_ID": run}
        return self.forks.start(list(words), self.folder, variables, module)

    def unsent(self) -> list[str]:
        return json.loads((self.folder / "run" / "run.json").read_text())["unsent"]

    def used(self) -> list[str]:
        return sorted(artifact.name for artifact in self.server.runs["one"].used_artifacts)

    def sync(self, code: int = 0) -> str:
        return self.start("run", module="agent.sync").end(code)


@pytest.fixture
def story(tmp_path: Path, forks: Forks) -> Iterator[Story]:
    with WandbServer() as server:
        story = Story(server, forks, tmp_path)
        story.start(*DENSE, WANDB_MODE="disabled").end()
        yield story
        assert server.errors == []


@pytest.mark.parametrize("kind", ["plain", "pruned"])
def test_lineage_that_wandb_refused_is_sent_again(story: Story, kind: str) -> None:
    story.server.faults.append(fault := Fault("CreateArtifact", status=403))
    output = story.start(*TRIAL, *KINDS[kind]).end(UNSENT)
    assert {f"lineage from {name}" for name in ["data-digits", *OWN[kind]]} <= set(story.unsent()), output
    story.start(".", "--yes", module="agent.clean").end()  # It leaves alone what is still to be sent.
    story.server.faults.remove(fault)
    for _ in range(2):
        assert "complete on W&B" in story.sync()
        assert story.unsent() == []
        assert story.used() == ["data-digits", *OWN[kind]]


def test_lineage_alone_that_did_not_arrive_is_sent_at_the_end_of_the_trial(story: Story) -> None:
    story.server.faults.append(Fault("CreateArtifact", status=403, times=3))  # The queue tries as often.
    output = story.start(*TRIAL, "--checkpoint.upload=false").end()
    assert "W&B lacks lineage from data-digits; sending it again" in output
    assert (story.used(), story.unsent()) == (["data-digits"], [])


def test_the_same_command_again_sends_what_the_first_had_left(story: Story) -> None:
    story.server.faults.append(fault := Fault("CreateArtifact", status=403))
    story.start(*TRIAL, "--checkpoint.upload=false").end(UNSENT)
    story.server.faults.remove(fault)
    story.start(*TRIAL, "--checkpoint.upload=false").end()
    assert (story.used(), story.unsent()) == (["data-digits"], [])


def test_the_model_that_a_run_starts_from_is_recorded_again(story: Story) -> None:
    story.start(*TRIAL, "--log.dir=known", run="dense").end()
    story.server.faults.append(fault := Fault(".*UseArtifact", status=403))
    story.start(*TRIAL, "--init.artifact=model-dense:latest").end(UNSENT)
    assert set(story.unsent()) == {"lineage from tester/test/model-dense:v0", "lineage from data-digits"}
    story.server.faults.remove(fault)
    story.sync()
    assert (story.used(), story.unsent()) == (["data-digits", "model-dense"], [])


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_recorded_offline_gets_its_lineage(story: Story, kind: str) -> None:
    story.start(*TRIAL, *KINDS[kind], WANDB_MODE="offline").end()
    story.sync()
    assert (story.used(), story.unsent()) == (["data-digits", *OWN[kind]], [])


def test_lineage_that_cannot_be_sent_stays_noted(story: Story) -> None:
    story.start(*TRIAL).end()
    file = story.folder / "run" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"unsent": ["lineage from pruned-one"]}))
    assert "did not arrive: lineage from pruned-one" in story.sync(1)
    assert story.unsent() == ["lineage from pruned-one"]
