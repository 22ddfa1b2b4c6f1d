"""Train every formulation for a few steps in fp32 and bf16, and check that its loss falls and never is NaN.

  python scripts/check_formulations.py --data.name=folder --data.path=DIR
  python scripts/check_formulations.py --preset=digits --train.steps=100 --formulations 'eps;v' --out runs/check

A formulation is a schedule, a prediction, a weighting and a loss (see diffusion_core/config/presets.py); the network is
the preset's with 32 channels and one residual block a resolution, and any knob of `python -m agent` can be given
besides. A loss falls if its mean over the last tenth of the steps is below that over the first tenth. Writes
results.json and table.md. Stop it and run it again: what is done is kept. Exit status: 0, 1 if a formulation fails, 2
if something asked for cannot be had.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agent.command import fail
from agent.config import TrialConfig, build_config
from agent.trial import run_trial
from diffusion_core.config import FORMULATIONS, ConfigError, split_argv
from diffusion_core.data.datasets import DataError, Dataset, load_data
from diffusion_core.files import write_json
from diffusion_core.run_folder import read_history
from diffusion_core.tables import markdown_table
from diffusion_core.tracking import NullTracker
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
PARTS = 10


@dataclass(frozen=True)
class Measured:
    """What one training came to.

    Attributes:
        first: mean loss over the first tenth of the steps.
        last: mean loss over the last tenth.
        diverged: what stopped it; empty if nothing did.
        seconds: wall time, pictures and validation included.
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
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s [--formulations A;B] [--out DIR] [--key=value ...]",
    )
    parser.add_argument("--formulations", metavar="A;B", help=f"all, or some of {'; '.join(FORMULATIONS)} (all)")
    parser.add_argument("--out", type=Path, default=Path("runs/check"), metavar="DIR", help="where it all goes")
    arguments, words = parser.parse_known_args(argv)
    try:
        names = pick_formulations(arguments.formulations)
        results = check(names, split_argv(words), arguments.out)
    except (ConfigError, DataError) as error:
        return fail(str(error))
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from here ({arguments.out})", file=sys.stderr)
        return 130
    return 0 if all(result.verdict == "falls" for result in results.values()) else 1


def pick_formulations(text: str | None) -> list[str]:
    """The formulations that ``--formulations`` names."""
    names = list(FORMULATIONS) if text in (None, "all") else [word.strip() for word in str(text).split(";")]
    for name in names:
        if name not in FORMULATIONS:
            raise ConfigError(f"--formulations = {name!r}: expected all, or some of {'; '.join(FORMULATIONS)}")
    return names


def check(names: Sequence[str], given: Mapping[str, str], folder: Path) -> dict[str, Measured]:
    """Train what is not trained yet, and write the table.

    Raises:
        ConfigError: if a knob is wrong, or the folder holds results of other knobs.
    """
    runs = {
        f"{name}, {precision}": build_config(
            STARTING_POINT, FORMULATIONS[name], given, {"train.precision": precision, "log.every": 1}
        )
        for name in names
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
    table = markdown(wanted)
    (folder / "table.md").write_text(table, encoding="utf-8")
    print(table)
    return wanted


def read_results(file: Path, given: Mapping[str, str]) -> dict[str, Measured]:
    """What earlier calls with the same knobs measured."""
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
        run_trial(config, NullTracker(), dataset=dataset, folder=folder, run_id=folder.name)
    except TrainingDiverged as error:
        diverged = str(error)
    losses = [row["train/loss"] for row in read_history(folder) if "train/loss" in row]
    tenth = max(1, len(losses) // PARTS)
    first, last = (sum(part) / max(1, len(part)) for part in (losses[:tenth], losses[-tenth:]))
    return Measured(first, last, diverged, time.perf_counter() - started)


def markdown(results: Mapping[str, Measured]) -> str:
    """The table: a row a formulation, the losses at both ends in each precision."""
    columns = ["formulation"]
    for precision in PRECISIONS:
        columns += [f"{precision}, first tenth", "last tenth", "loss"]
    rows = []
    for name in dict.fromkeys(key.rpartition(", ")[0] for key in results):
        cells = [name]
        for precision in PRECISIONS:
            measured = results[f"{name}, {precision}"]
            cells += [f"{measured.first:.3f}", f"{measured.last:.3f}", measured.verdict]
        rows.append(cells)
    return markdown_table(columns, rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
