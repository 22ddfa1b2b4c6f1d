"""Train every formulation for a few steps in fp32 and bf16, and check that its loss falls and is never NaN.

  python scripts/check_formulations.py --data.name=folder --data.path=DIR
  python scripts/check_formulations.py --preset=digits --train.steps=100 --formulations 'eps;v' --out runs/check

A formulation is a schedule, a prediction, a weighting and a loss (see diffusion_core/config/presets.py). The network is
that of the preset with 32 channels and one residual block per resolution; every knob of `python -m agent` can be set. A
loss falls if its mean over the last tenth of the steps is below that over the first tenth. Writes results.json and
table.md. Stop it and run it again: finished trainings are kept. Exit status: 0; 1 if a formulation fails; 2 if an
argument is unusable.
"""

from __future__ import annotations

if __name__ == "__main__":
    from diffusion_core.signals import leave_at_once

    leave_at_once()  # Until main handles signals: the imports take seconds.

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from studies.command import parser_of, some_of, status_of
from studies.study import run_once
from studies.table import write_table

from agent.command import run_and_leave
from agent.config import TrialConfig, build_config
from diffusion_core.config import FORMULATIONS, ConfigError, split_argv
from diffusion_core.data.datasets import Dataset, load_data
from diffusion_core.files import write_json
from diffusion_core.run_folder import read_history
from diffusion_core.tables import markdown_table
from diffusion_core.training.trainer import TrainingDiverged

PRECISIONS = ("fp32", "bf16")
STARTING_POINT: dict[str, Any] = {
    "model.channels": 32,
    "model.num_res_blocks": 1,
    "train.steps": 200,
    "train.batch_size": 8,
    "train.lr": 1e-3,
    "train.warmup_steps": 20,
    "ema.decay": 0.99,
    "sample.every": 0,
    "sample.steps": 4,
    "sample.per_class": 1,
    "eval.every": 0,
    "eval.val_images": 16,
    "eval.classifier": "none",
    "checkpoint.every": 0,
    "checkpoint.best_metric": "val/loss",
    "checkpoint.upload": False,
}


@dataclass(frozen=True)
class Measured:
    """The outcome of a training.

    Attributes:
        first: mean loss over the first tenth of the steps.
        last: mean loss over the last tenth.
        diverged: message of the error that stopped it; empty without one.
        seconds: wall time, including images and validation.
    """

    first: float
    last: float
    diverged: str
    seconds: float

    @property
    def verdict(self) -> str:
        return self.diverged or ("falls" if self.last < self.first else "does not fall")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = parser_of(__doc__, "runs/check", "%(prog)s [--formulations A;B] [--out DIR] [--key=value ...]")
    parser.add_argument("--formulations", metavar="A;B", help=f"all, or some of {'; '.join(FORMULATIONS)} (all)")
    arguments, words = parser.parse_known_args(argv)
    return status_of(lambda: check(arguments, words), arguments.out)


def check(arguments: argparse.Namespace, words: list[str]) -> int:
    """Train what is missing, write the table, and return the exit status.

    Raises:
        ConfigError: if a knob is wrong, or the folder holds results of other knobs.
    """
    given, folder = split_argv(words), arguments.out
    runs = {
        f"{name}, {precision}": build_config(
            STARTING_POINT, FORMULATIONS[name], given, {"train.precision": precision, "log.every": 1}
        )
        for name in some_of("--formulations", arguments.formulations, list(FORMULATIONS))
        for precision in PRECISIONS
    }
    folder.mkdir(parents=True, exist_ok=True)
    results = read_results(folder / "results.json", given)
    dataset = load_data(next(iter(runs.values())).data, progress=True)
    for number, (key, config) in enumerate(runs.items(), start=1):
        if key not in results:
            print(f"{number} of {len(runs)}: {key}", file=sys.stderr, flush=True)
            results[key] = measure(config, dataset, folder / f"{number:02d}")
            done = {name: asdict(result) for name, result in results.items()}
            write_json(folder / "results.json", {"given": given, "results": done})
    wanted = {key: results[key] for key in runs}
    columns = [column for precision in PRECISIONS for column in (f"{precision}, first tenth", "last tenth", "loss")]
    write_table(folder / "table.md", markdown_table(["formulation", *columns], table_rows(wanted)))
    return 0 if all(result.verdict == "falls" for result in wanted.values()) else 1


def read_results(file: Path, given: Mapping[str, str]) -> dict[str, Measured]:
    """Return the results of earlier calls with the same knobs."""
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["given"] != given:
        raise ConfigError(f"--out = {str(file.parent)!r}: holds results of other knobs; choose another folder")
    return {key: Measured(**values) for key, values in content["results"].items()}


def measure(config: TrialConfig, dataset: Dataset, folder: Path) -> Measured:
    """Train one formulation in one precision."""
    started, diverged = time.perf_counter(), ""
    try:
        run_once(config, dataset, folder)
    except TrainingDiverged as error:
        diverged = str(error)
    losses = [row["train/loss"] for row in read_history(folder) if "train/loss" in row]
    tenth = max(1, len(losses) // 10)
    first, last = (sum(part) / max(1, len(part)) for part in (losses[:tenth], losses[-tenth:]))
    return Measured(first, last, diverged, time.perf_counter() - started)


def table_rows(results: Mapping[str, Measured]) -> list[list[str]]:
    """Return a row per formulation: its first and last loss and the verdict, in each precision."""
    rows = []
    for name in dict.fromkeys(key.rpartition(", ")[0] for key in results):
        measured = [results[f"{name}, {precision}"] for precision in PRECISIONS]
        rows.append(
            [name, *(cell for one in measured for cell in (f"{one.first:.3f}", f"{one.last:.3f}", one.verdict))]
        )
    return rows


if __name__ == "__main__":
    run_and_leave(main, interruptible=True)
