"""What a resumed run has measured: its figures are comparable, and its best checkpoint is among those kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from forks import WORDS, Forks

from diffusion_core.checkpoint import list_checkpoints, read_checkpoint

STEPS = 8
BASE = [
    *WORDS,
    "--log.every=2",
    "--eval.every=2",
    "--eval.classifier=network",
    "--eval.num_images=20",
    "--sample.steps=3",
    "--checkpoint.every=2",
    "--checkpoint.keep=8",
    "--train.warmup_steps=0",
    "--train.lr=0.003",
]


def words(steps: int, *more: str) -> list[str]:
    return [*BASE, f"--train.steps={steps}", *more]


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--sample.steps=1", "sample.steps = 1: the run in 'run' has measured eval/class_agreement with 3"),
        ("--sample.guidance=3", "sample.guidance = 3.0: the run in 'run' has measured eval/class_agreement with 2.0"),
        ("--eval.num_images=30", "eval.num_images = 30: the run in 'run' has measured eval/class_agreement with 20"),
        ("--eval.val_images=16", "eval.val_images = 16: the run in 'run' has measured val/loss with"),
    ],
)
def test_figures_of_one_run_are_measured_in_one_way(tmp_path: Path, forks: Forks, word: str, said: str) -> None:
    """Else the best of them, and the best checkpoint, would be chosen among figures that cannot be compared."""
    forks.run(words(4), tmp_path)
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    other = forks.start(words(STEPS, word), tmp_path)
    assert other.wait() == 2, other.output
    assert said in other.output
    assert "scripts/evaluate.py" in other.output
    assert "Traceback" not in other.output
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


@pytest.mark.slow
def test_a_checkpoint_of_another_machine_knows_what_was_measured(tmp_path: Path, forks: Forks) -> None:
    forks.run(words(4), tmp_path)
    (tmp_path / "run" / "history.jsonl").unlink()
    other = forks.start(words(STEPS, "--sample.steps=1"), tmp_path)
    assert other.wait() == 2, other.output
    assert "has measured eval/class_agreement with 3" in other.output


@pytest.mark.slow
def test_what_measures_nothing_may_change(tmp_path: Path, forks: Forks) -> None:
    forks.run(words(4), tmp_path)
    free = ["--sample.per_class=2", "--sample.batch_size=7", "--eval.every=4", "--sample.every=4"]
    forks.run(words(STEPS, *free), tmp_path)
    assert rows(tmp_path / "run")[-1]["step"] == STEPS


@pytest.mark.slow
def test_a_run_without_such_figures_may_begin_to_measure(tmp_path: Path, forks: Forks) -> None:
    forks.run(words(4, "--eval.classifier=none"), tmp_path)
    forks.run(words(STEPS, "--sample.steps=2", "--eval.num_images=10"), tmp_path)
    assert [row["step"] for row in rows(tmp_path / "run") if "eval/class_agreement" in row] == [6, 8]


@pytest.mark.slow
def test_another_metric_chooses_among_the_checkpoints_that_are_kept(tmp_path: Path, forks: Forks) -> None:
    forks.run(words(STEPS, "--checkpoint.best_metric=val/loss"), tmp_path)
    run = tmp_path / "run"
    forks.run(words(STEPS + 2, "--checkpoint.best_metric=train/loss"), tmp_path)
    losses = {
        (found := read_checkpoint(path, verify=False)).step: found.metadata["figures"]["train/loss"]
        for path in list_checkpoints(run / "checkpoints")
    }
    best = min(losses, key=lambda step: losses[step])
    assert best != STEPS + 2, "else this test shows nothing: choose another seed"
    result = json.loads((run / "result.json").read_text())
    assert Path(result["best_checkpoint"]).name == f"step-{best:08d}"
    assert read_checkpoint(run).metadata["best"] == {"metric": "train/loss", "value": losses[best], "step": best}
