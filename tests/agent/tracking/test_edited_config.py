"""`agent.sync` sends the configuration that a run was trained with, whatever `config.yaml` says by then."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from forks import WORDS, Fork, Forks
from server import WandbServer
from wandb_client import Client

TRIAL = [*WORDS, "--train.steps=3", "--checkpoint.every=3", "--train.lr=0.002"]

pytestmark = pytest.mark.slow


class Story:
    """An offline run, and a server to send it to."""

    def __init__(self, server: WandbServer, forks: Forks, folder: Path) -> None:
        self.server, self.forks, self.folder = server, forks, folder
        self.config = folder / "run" / "config.yaml"
        forks.run(TRIAL, folder, {"WANDB_MODE": "offline", "WANDB_RUN_ID": "one"})

    def edit(self, **values: object) -> None:
        known = yaml.safe_load(self.config.read_text())
        self.config.write_text(yaml.safe_dump(known | {key.replace("__", "."): value for key, value in values.items()}))

    def sync(self) -> Fork:
        return self.forks.start(["run"], self.folder, Client(self.server, self.folder).env, "agent.sync")


@pytest.fixture
def story(tmp_path: Path, forks: Forks) -> Iterator[Story]:
    with WandbServer() as server:
        yield Story(server, forks, tmp_path)


def test_what_the_run_was_trained_with_is_sent_and_the_difference_told(story: Story) -> None:
    assert "config.yaml" not in story.sync().end()
    story.edit(train__lr=0.5, train__stepz="eight")
    output = story.sync().end()
    line = "run/config.yaml: differs from the checkpoint of step 3 in train.lr, train.stepz; W&B gets the checkpoint's"
    assert output.count(f"{line}\n") == 1
    config = story.server.runs["one"].config
    assert config["train.lr"] == 0.002
    assert "train.stepz" not in config


def test_a_broken_file_does_not_matter_where_there_is_a_checkpoint(story: Story) -> None:
    story.config.write_text("train.lr: [0.5\n")
    output = story.sync().end()
    assert "'run/config.yaml': not valid YAML" in output
    assert "; W&B gets the configuration of the checkpoint of step 3\n" in output
    assert "--config" not in output
    assert story.server.runs["one"].config["train.lr"] == 0.002
    assert {"model-one", "training-state-one"} <= {one.name for one in story.server.runs["one"].output_artifacts}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("train.lr: [0.5\n", "error: 'run/config.yaml': not valid YAML: "),
        (None, "error: 'run/config.yaml': No such file or directory; "),
        (
            "train.stepz: eight\n",
            "error: 'run/config.yaml': train.stepz = 'eight': unknown key; did you mean train.steps?",
        ),
        ("train.lr: much\n", "error: 'run/config.yaml': train.lr = 'much': expected "),
    ],
)
def test_without_a_checkpoint_the_file_is_checked(story: Story, content: str | None, problem: str) -> None:
    shutil.rmtree(story.folder / "run" / "checkpoints")
    if content is None:
        story.config.unlink()
    else:
        story.config.write_text(content)
    output = story.sync().end(2)
    (line,) = [line for line in output.splitlines() if "error" in line]
    assert line.startswith(problem)
    assert line.endswith("; correct it, or repeat the trial's command with --log.dir=run, which writes it anew")
    assert not story.server.runs
