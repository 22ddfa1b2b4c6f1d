"""A run says where it continues, and which damaged checkpoint it has passed over."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from forks import WORDS, Forks
from tiny import TINY, digits, metadata, tiny_network

from agent.config import build_config
from diffusion_core.checkpoint import list_checkpoints, read_checkpoint, step_of, write_checkpoint
from diffusion_core.tracking import MemoryTracker
from diffusion_core.training.checkpoints import SaveCheckpoints
from diffusion_core.training.trainer import TrainState

TRIAL = [*WORDS, "--train.steps=6", "--checkpoint.every=2", "--checkpoint.keep=9"]


@pytest.mark.slow
def test_a_run_says_where_it_continues(tmp_path: Path, forks: Forks) -> None:
    assert "continues from" not in forks.run(TRIAL, tmp_path)
    newest = tmp_path / "run/checkpoints/step-00000006"
    shutil.rmtree(newest)
    output = forks.run(TRIAL, tmp_path)
    assert output.splitlines().count("continues from step 4") == 1
    model = newest / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    output = forks.run(TRIAL, tmp_path)
    why = "model.safetensors is damaged (its size or SHA-256 is not what was written)"
    assert f"'run/checkpoints/step-00000006': {why}; continues from step 4\n" in output
    assert "damaged" not in forks.run(TRIAL, tmp_path)  # It was written again.


@pytest.mark.slow
def test_a_longer_run_names_the_damaged_checkpoint_too(tmp_path: Path, forks: Forks) -> None:
    forks.run(TRIAL, tmp_path)
    (tmp_path / "run/checkpoints/step-00000006/checkpoint.json").write_text("{")
    output = forks.run([*TRIAL, "--train.steps=8"], tmp_path)
    (line,) = [line for line in output.splitlines() if "cannot be read as JSON" in line]
    assert "; train.steps = 8: the run was started with 6 and continues from step 4; " in line


def test_what_is_written_before_a_damaged_checkpoint_is_kept(tmp_path: Path) -> None:
    """A machine that is preempted again and again before its step goes on all the same."""
    config = build_config(TINY, {"checkpoint.keep": 1})
    state = TrainState.start(tiny_network(config, seed=0), config.train, config.ema, 0)
    state.step = 3
    for step in (3, 6, 9):
        described = metadata(state.network, config) | state.metadata() | {"figures": {}, "best": None}
        write_checkpoint(tmp_path, step, described, state.parts())
    resumed = read_checkpoint(tmp_path / "step-00000003")
    saver = SaveCheckpoints(config, digits(), MemoryTracker(), tmp_path, "run", resumed)
    there = []
    for state.step in (4, 5, 6, 8, 10):
        saver.save(state)
        there.append([step_of(path) for path in list_checkpoints(tmp_path)])
    assert there == [[4, 6, 9], [5, 6, 9], [6, 9], [8, 9], [10]]
