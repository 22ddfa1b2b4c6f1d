"""A run that is stopped by a signal and started again ends, bit for bit, where the unbroken one does.

Every part is a process of its own, as on a cluster: ``python -m agent`` (forked), SIGTERM, the same command again.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Fork, Forks
from tiny import assert_same_tensors

from diffusion_core.checkpoint import newest_checkpoint
from diffusion_core.hardware import has_bf16

STEPS = 160
PRUNED_AT = 80
TIMEOUT_S = 300

WORDS = [
    "--preset=digits",
    "--model.channels=8",
    "--model.norm_groups=4",
    "--model.dropout=0.2",
    "--train.batch_size=8",
    "--train.warmup_steps=10",
    "--train.weight_decay=0.01",
    "--train.device=cpu",
    f"--train.steps={STEPS}",
    "--eval.every=0",
    "--eval.classifier=none",
    "--eval.val_images=32",
    "--checkpoint.best_metric=val/loss",
    "--checkpoint.every=40",
    "--sample.every=0",
    "--sample.steps=2",
    "--sample.per_class=1",
    "--log.every=1",
    "--log.progress=false",
]
BF16 = has_bf16(torch.device("cpu"))
CASES = {
    # In bf16, if this processor has it.
    "none": ["--prune.method=none", f"--train.precision={'bf16' if BF16 else 'fp32'}"],
    "magnitude": [
        "--prune.method=magnitude",
        "--prune.keep=0.4",
        f"--prune.step={PRUNED_AT}",
        "--train.precision=fp32",
    ],
    "structured": [
        "--prune.method=structured",
        "--prune.keep=0.5",
        "--prune.depth=0.5",
        "--prune.calibration_batches=2",
        f"--prune.step={PRUNED_AT}",
        "--train.precision=fp32",
    ],
}


@dataclass
class Run:
    """A run's folder, and the command that works on it."""

    forks: Forks
    folder: Path
    case: str

    def words(self) -> list[str]:
        return [*WORDS, *CASES[self.case], f"--log.dir={self.folder}"]

    def start(self) -> Fork:
        return self.forks.start(self.words(), self.folder.parent / f"by {self.case}")

    def finish(self) -> None:
        process = self.start()
        assert process.wait() == 0, process.output

    def interrupt(self, step: int, number: signal.Signals = signal.SIGTERM) -> int:
        """Run until the history has that step, and stop by a signal; returns the step of the newest checkpoint."""
        process = self.start()
        deadline = time.monotonic() + TIMEOUT_S
        while process.poll() is None and (not self.history() or self.history()[-1]["step"] < step):
            assert time.monotonic() < deadline, "no progress"
            time.sleep(0.01)
        process.send(number)
        if number == signal.SIGTERM:
            assert process.wait() == 143, process.output
            assert "stopped by SIGTERM" in process.output
            assert "Traceback" not in process.output
        else:
            assert process.wait() == -number, process.output
        return self.checkpoint().step

    def checkpoint(self) -> Any:
        return newest_checkpoint(self.folder / "checkpoints")

    def history(self) -> list[dict[str, Any]]:
        """Complete rows; the last one may be being written."""
        file = self.folder / "history.jsonl"
        text = file.read_text() if file.is_file() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """What of a row follows from the configuration: all but speed."""
    return {key: value for key, value in row.items() if key != "train/images_per_second"}


def assert_same_run(straight: Run, broken: Run) -> None:
    one, other = straight.checkpoint(), broken.checkpoint()
    assert one.step == other.step == STEPS
    assert set(one.parts) == set(other.parts) >= {"model", "ema", "optimizer"}
    for part in one.parts:
        assert_same_tensors(one.tensors(part), other.tensors(part))
    for key in ("structure", "ema_updates", "extra", "figures"):
        ours, theirs = one.metadata[key], other.metadata[key]
        assert (figures(ours) if key == "figures" else ours) == (figures(theirs) if key == "figures" else theirs)
    assert [row["step"] for row in broken.history()] == list(range(1, STEPS + 1))  # No gap and no repeat.
    assert [figures(row) for row in broken.history()] == [figures(row) for row in straight.history()]


@pytest.fixture(scope="module")
def unbroken(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The run of each case in one go, while the tests do theirs."""
    folder = tmp_path_factory.mktemp("unbroken")
    runs = {case: Run(forks, folder / case, case) for case in CASES}
    processes = {case: run.start() for case, run in runs.items()}

    def get(case: str) -> Run:
        assert processes[case].wait() == 0, processes[case].output
        return runs[case]

    return get


@pytest.mark.slow
def test_a_run_without_pruning(tmp_path: Path, forks: Forks, unbroken: Callable[[str], Run]) -> None:
    """Killed without warning, which costs the steps since the last checkpoint; then stopped; then left to finish."""
    run = Run(forks, tmp_path / "run", "none")
    saved = run.interrupt(45, signal.SIGKILL)
    assert saved % 40 == 0 < saved < run.history()[-1]["step"] < 90  # The history is ahead, and will be taken back.
    with (run.folder / "history.jsonl").open("a") as file:
        file.write('{"step": 9')  # A row cut short.
    step = run.interrupt(90)
    assert 90 <= step < STEPS
    run.finish()
    assert_same_run(unbroken("none"), run)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["magnitude", "structured"])
def test_a_run_with_pruning(tmp_path: Path, case: str, forks: Forks, unbroken: Callable[[str], Run]) -> None:
    """Stopped before pruning and after it."""
    run = Run(forks, tmp_path / "run", case)
    assert run.interrupt(15) < PRUNED_AT
    assert "pruning" not in run.checkpoint().metadata["extra"]
    assert PRUNED_AT < run.interrupt(PRUNED_AT + 5) < STEPS
    assert run.checkpoint().metadata["extra"]["pruning"][-1]["step"] == PRUNED_AT
    run.finish()
    assert_same_run(unbroken(case), run)
    if case == "structured":
        assert {"removed": 1} in run.checkpoint().metadata["structure"].values()
    else:
        masks = run.checkpoint().tensors("masks")
        total = sum(mask.numel() for mask in masks.values())
        assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.6 * total)
        for part in ("model", "ema"):
            weights = run.checkpoint().tensors(part)
            assert sum(int((weights[name] == 0).sum()) for name in masks) == round(0.6 * total)


@pytest.mark.slow
@pytest.mark.parametrize("every", [3, 7])
def test_rows_span_stops_and_kills(tmp_path: Path, forks: Forks, every: int) -> None:
    """Stopped after steps that have no row, again and again, and once killed: every row is the unbroken run's."""
    words = [*WORDS, *CASES["none"], f"--log.every={every}", "--checkpoint.every=10"]
    unbroken = forks.start([*words, "--log.dir=run"], tmp_path / "unbroken")
    run = Run(forks, tmp_path / "broken" / "run", "none")
    run.words = lambda: [*words, f"--log.dir={run.folder}"]  # type: ignore[method-assign]
    steps = [run.interrupt(step) for step in range(20, 120, 20)]
    assert run.interrupt(125, signal.SIGKILL) % 10 == 0
    run.finish()
    assert any(step % every for step in steps), steps
    assert unbroken.wait() == 0, unbroken.output
    whole = Run(forks, tmp_path / "unbroken" / "run", "none").history()
    assert [row["step"] for row in whole] == [*range(every, STEPS, every), *([] if STEPS % every == 0 else [STEPS])]
    assert [figures(row) for row in run.history()] == [figures(row) for row in whole]
