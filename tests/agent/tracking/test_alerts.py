"""Alerts of whole trials, as they arrive on the server."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from forks import WAIT_S, WORDS, Forks
from server import WandbServer
from wandb_client import Client

from diffusion_core.checkpoint import read_checkpoint, write_checkpoint
from diffusion_core.training.callbacks import DIVERGED, PREEMPTED


def explode(run: Path) -> None:
    """Leave of a run that is over a checkpoint from its middle, with weights from which nothing finite comes."""
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    checkpoint = read_checkpoint(run)
    parts = {part: checkpoint.tensors(part) for part in checkpoint.parts}
    parts["model"] = {name: tensor * 1e30 for name, tensor in parts["model"].items()}
    write_checkpoint(run / "checkpoints", checkpoint.step, checkpoint.metadata, parts)


@pytest.mark.slow
def test_a_diverged_trial_and_one_that_is_preempted_a_third_time_raise_alerts(tmp_path: Path, forks: Forks) -> None:
    with WandbServer() as server:
        words = [*WORDS, "--train.steps=8", "--checkpoint.every=4"]
        forks.run(words, tmp_path / "diverging")
        explode(tmp_path / "diverging" / "run")
        diverging = forks.start(
            words,
            tmp_path / "diverging",
            Client(server, tmp_path / "diverging").env | {"WANDB_RUN_ID": "diverging"},
        )
        folder = tmp_path / "moved" / "run"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"id": "moved", "preemptions": 2}))
        moved = forks.start(
            [*WORDS, "--train.steps=1000000", "--checkpoint.every=0"],
            tmp_path / "moved",
            Client(server, tmp_path / "moved").env,
        )
        end = time.monotonic() + WAIT_S
        while not (folder / "history.jsonl").exists() or not (folder / "history.jsonl").read_text():
            assert moved.poll() is None, moved.output
            assert time.monotonic() < end, moved.output
            time.sleep(0.05)
        moved.send(signal.SIGUSR1)
        assert moved.wait() == 128 + signal.SIGUSR1, moved.output
        assert diverging.wait() == 1, diverging.output

        assert server.runs["moved"].state == "preempted"
        (alert,) = server.runs["moved"].alerts
        assert (alert["title"], alert["text"]) == (PREEMPTED, "This trial was preempted 3 times")
        (alert,) = server.runs["diverging"].alerts
        assert alert["title"] == DIVERGED
        assert alert["text"].startswith("train/loss = nan at step ")
        assert server.runs["diverging"].state == "failed"
        (line,) = [line for line in diverging.output.splitlines() if "error" in line]
        assert line.startswith("error: train/loss = nan at step ")
        assert server.errors == []
