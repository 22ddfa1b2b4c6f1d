"""A run that is killed, again and again, at any moment, ends bit for bit where the unbroken one does."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import STEPS, WORDS, Fork, Forks
from tiny import assert_same_tensors

from diffusion_core.checkpoint import newest_checkpoint, read_checkpoint
from diffusion_core.machine.jobs import NO_SPACE

KILLS = 25


def history(folder: Path) -> list[dict[str, float]]:
    """The rows of a run but for their speed."""
    rows = [json.loads(line) for line in (folder / "run" / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "train/images_per_second"} for row in rows]


def kill(trial: Fork, checkpoints: Path, chance: random.Random) -> bool:
    """Kill a trial some time after it has made progress; every other time as it writes a checkpoint."""
    before = {path.name for path in checkpoints.glob("step-*")}
    wait(trial, lambda: before != {path.name for path in checkpoints.glob("step-*")})
    time.sleep(chance.uniform(0.0, 0.1))
    if chance.random() < 0.5:
        wait(trial, lambda: any(checkpoints.glob(".step-*.partial")))
    if trial.poll() is not None:
        return False
    trial.send(signal.SIGKILL)
    return trial.wait() == -signal.SIGKILL


def wait(trial: Fork, condition: Callable[[], bool]) -> None:
    """Until something holds, or the trial has ended."""
    looked = 0
    while not condition() and (looked % 100 or trial.poll() is None):
        looked += 1
        time.sleep(0.0005)


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(tmp_path: Path, forks: Forks) -> None:
    chance = random.Random(0)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    unbroken = forks.start(WORDS, straight)
    interrupted_writes = 0
    for kills in range(KILLS):
        trial = forks.start(WORDS, broken)
        checkpoints = broken / "run" / "checkpoints"
        killed = kill(trial, checkpoints, chance)
        assert killed, f"the run was over after {kills} kills: {trial.output}"
        interrupted_writes += any(checkpoints.glob(".step-*.partial"))
        assert newest_checkpoint(checkpoints) is not None
    assert interrupted_writes >= KILLS // 10
    assert not (broken / "run" / "result.json").exists()
    forks.run(WORDS, broken)
    assert unbroken.wait() == 0

    one, other = (read_checkpoint(folder / "run") for folder in (straight, broken))
    assert one.step == other.step == STEPS
    for part in one.parts:
        assert_same_tensors(one.tensors(part), other.tensors(part))
    assert [row["step"] for row in history(broken)] == list(range(1, STEPS + 1))
    assert history(broken) == history(straight)
    assert not list(broken.rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("file", ["checkpoints/step-00000008/optimizer.safetensors", "history.jsonl"])
def test_a_trial_on_a_full_disk_ends_with_one_line_and_goes_on_when_there_is_room(
    tmp_path: Path, forks: Forks, file: str
) -> None:
    """A limit on the size of files stands for it; the one that meets it is cut short."""
    words = [*WORDS, "--train.steps=8", "--checkpoint.every=8"]
    forks.run([*words, "--log.dir=room"], tmp_path)
    limit = (tmp_path / "room" / file).stat().st_size - 1
    full = forks.start(words, tmp_path, {"WANDB_MODE": "disabled"}, file_limit=limit)
    assert full.wait() == NO_SPACE, full.output
    (line,) = [line for line in full.output.splitlines() if "error" in line]
    assert "File too large" in line
    assert "Traceback" not in full.output
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    forks.run(words, tmp_path)
    assert read_checkpoint(tmp_path / "run").step == 8
    assert [row["step"] for row in history(tmp_path)] == list(range(1, 9))
