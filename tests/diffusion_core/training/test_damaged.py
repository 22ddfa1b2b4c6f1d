"""A run says where it continues, and which damaged checkpoint it has passed over."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from forks import WORDS, Forks

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
