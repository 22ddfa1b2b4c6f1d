"""Trials that a cluster disturbs: tiny, and the same bit for bit as undisturbed ones."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from forks import Forks
from tiny import assert_same_tensors
from torch import Tensor

from clusters.slurm import wait_for
from diffusion_core.checkpoint import Checkpoint, read_checkpoint

EVERY = 4
KNOBS: dict[str, Any] = {
    "preset": "digits",
    "model.channels": 16,
    "model.channel_multipliers": [1, 1],
    "model.norm_groups": 2,
    "model.dropout": 0.1,
    "train.warmup_steps": 0,
    "train.batch_size": 16,
    "train.device": "cpu",
    "eval.every": 0,
    "eval.val_images": 20,
    "eval.classifier": "none",
    "sample.every": 0,
    "sample.steps": 2,
    "sample.per_class": 1,
    "log.every": EVERY,
    "log.progress": False,
    "checkpoint.best_metric": "val/loss",
    "checkpoint.upload": False,
}


def sweep_of(method: str, varied: Mapping[str, Any], knobs: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The content of a sweep file over these trials."""
    return {
        "method": method,
        "metric": {"name": "val/loss", "goal": "minimize"},
        "command": ["${env}", "${interpreter}", "-m", "agent", "${args}"],
        "parameters": {key: {"value": value} for key, value in {**KNOBS, **knobs}.items()} | dict(varied),
        **more,
    }


def assert_as_undisturbed(folder: Path, knobs: Mapping[str, Any], forks: Forks, scratch: Path) -> None:
    """The run in a folder has the weights and averages of one with these knobs that nothing has disturbed."""
    ours, theirs = read_checkpoint(folder), undisturbed(knobs, forks, scratch)
    assert ours.step == theirs.step
    assert ours.parts == theirs.parts
    for part in ours.parts:
        assert_same_tensors(ours.tensors(part), theirs.tensors(part))


def undisturbed(knobs: Mapping[str, Any], forks: Forks, scratch: Path) -> Checkpoint:
    """The last checkpoint of a run with these knobs that nothing disturbs, in one process."""
    words = [f"--{key}={json.dumps(value)}" for key, value in {**KNOBS, **knobs}.items()]
    forks.run([word.replace('"', "") for word in words] + ["--log.dir=run"], scratch)
    return read_checkpoint(scratch / "run")


def difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The norm of the difference of two sets of weights, relative to that of the second."""
    apart = sum(float((ours[name] - tensor).square().sum()) for name, tensor in theirs.items())
    return math.sqrt(apart / sum(float(tensor.square().sum()) for tensor in theirs.values()))


def processes_of(*variables: str) -> list[int]:
    """The processes whose environment has these variables."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if {variable.encode() for variable in variables} <= set(file.read_bytes().split(b"\0")):
                found.append(int(file.parent.name))
    return found


def rows_in(folder: Path) -> list[int]:
    """The steps of the rows in a run's folder so far."""
    file = folder / "history.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [row["step"] for row in rows if "train/loss" in row]


def hold(folders: Path, node: str) -> list[int]:
    """Stop the trial that runs on a node once it has two rows, so that it cannot end. Return its processes.

    Args:
        folders: the folder of the runs' folders.
        node: the node's name.
    """
    held: list[int] = []

    def stopped() -> bool:
        for folder in folders.glob("*"):
            if len(rows_in(folder)) > 1:
                held.extend(processes_of(f"WANDB_RUN_ID={folder.name}", f"SLURMD_NODENAME={node}"))
        signal_all(held, signal.SIGSTOP)
        return bool(held)

    wait_for(stopped, f"the first rows on {node}", 120)
    return held


@contextlib.contextmanager
def released(processes: Iterable[int], when: Callable[[], bool]) -> Iterator[None]:
    """Inside this context stopped processes go on once a condition holds; after it in any case."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2) and not when():
            pass
        signal_all(processes, signal.SIGCONT)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def signal_all(processes: Iterable[int], number: int) -> None:
    """Send a signal to the processes that are still there."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
