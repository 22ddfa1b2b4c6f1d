"""Train a model, prune it by each importance, fine-tune for a tenth of its training, and judge all by real images.

  PYTHONPATH=scripts python -m studies.recovery --steps 5000 -- --preset=cifar10 --data.name=folder --data.path=DIR
  PYTHONPATH=scripts python -m studies.recovery --rows l2,random --steps 5000 -- ...                      some rows

The experiment of Diff-Pruning (Fang et al. 2023): 56% of the multiply-accumulates are kept. Words after -- are knobs of
all runs. The first row is the real training images, which show how small the distance to the held-out images can be.
Every row has a JSON file and a grid of images in the folder of results; recovery.md is the table of the rows so far.
Stop it and run it again: what has a result is kept.
"""

from __future__ import annotations

if __name__ == "__main__":
    from diffusion_core.signals import leave_at_once

    leave_at_once()  # Until main handles signals: the imports take seconds.

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agent.command import run_and_leave
from agent.config import TrialConfig, build_config
from diffusion_core.checkpoint import Checkpoint
from diffusion_core.choice import choose
from diffusion_core.config import EvalConfig, build, split_argv
from diffusion_core.data.datasets import Dataset, load_data
from diffusion_core.evaluation.generated import generated
from diffusion_core.evaluation.protocol import sampling_protocol
from diffusion_core.evaluation.suite import Judgement, Suite
from diffusion_core.files import write_json
from diffusion_core.hardware import pick_device, pick_precision
from diffusion_core.messages import seed
from diffusion_core.model.cost import count_cost
from diffusion_core.randomness import Purpose, streams
from diffusion_core.run_folder import read_history
from diffusion_core.sampling.generation import Generator
from diffusion_core.sampling.lows import held_out
from diffusion_core.sampling.media import grid
from diffusion_core.tables import markdown_table
from pruning.registries import IMPORTANCES
from studies.command import at_least, numbers, parser_of, some_of, status_of
from studies.study import QUIET, SAMPLING_SEED, check_settings, run_once
from studies.table import write_table

REAL, DENSE = "training images", "dense"
FIGURES = {"FD": "fd_", "diversity": "diversity", "class agreement": "class_agreement"}
"""Columns of the table, and how the figures' names begin after ``eval/``."""
KEEP = 0.56
SHARE = 10
"""Fine-tuning takes this part of the training steps."""
GRID_ROWS = 8


@dataclass(frozen=True)
class Recovery:
    """The experiment.

    Attributes:
        folder: folder of all results.
        steps: optimizer steps of the dense model.
        seed: seed of training.
        guidances: guidance scales with which the dense model is judged; the others by the last one.
        images: judged images a row.
        knobs: knobs of all runs.
    """

    folder: Path
    steps: int
    seed: int
    guidances: tuple[float, ...]
    images: int
    knobs: Mapping[str, Any]

    def config(self, row: str) -> TrialConfig:
        """Return the configuration of a row's run."""
        base = QUIET | {"seed": self.seed, "train.steps": self.steps} | dict(self.knobs)
        if row == DENSE:
            return build_config(base)
        tuning = max(1, self.steps // SHARE)
        start = {"init.checkpoint": str(self.place(DENSE)), "train.steps": tuning, "train.warmup_steps": tuning // 10}
        prune = {"prune.method": "structured", "prune.step": 0, "prune.keep": KEEP, "prune.importance": row}
        return build_config(base, start, prune)

    def place(self, row: str) -> Path:
        """Return the folder of a row's run."""
        return self.folder / "runs" / row

    @cached_property
    def dataset(self) -> Dataset:
        return load_data(self.config(DENSE).data)

    @cached_property
    def suite(self) -> Suite:
        config = self.config(DENSE)
        judged = {"num_images": self.images, "figures": ["frechet", "diversity"], "extractors": ["classifier"]}
        return Suite(
            config.data,
            build(EvalConfig, judged, {"reference": "val"}),
            self.dataset,
            with_classifier=True,
            device=pick_device(config.train),
            must_have=True,
        )

    def trained(self, row: str) -> Checkpoint:
        """Return the best checkpoint of a row's run, which is trained unless it has a result."""
        run_once(self.config(row), self.dataset, self.place(row))
        return choose(self.place(row))

    def minutes(self, row: str) -> float:
        """Return the minutes that the steps of a row's run took, also if it was stopped in between."""
        images, seconds, before = self.config(row).train.images_per_step, 0.0, 0
        for line in read_history(self.place(row)):
            if "train/images_per_second" in line:
                seconds += (line["step"] - before) * images / line["train/images_per_second"]
                before = line["step"]
        return seconds / 60.0

    def real_images(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield random training images and their labels."""
        (order,) = streams(2, [(self.seed, Purpose.ORDER, 0)]).permutation(len(self.dataset.train))
        for indices in order[: self.images].split(256):
            chosen = self.dataset.train.select(indices)
            yield chosen.images_NCHW, chosen.labels_N

    def judge_real(self) -> None:
        """Judge the training images."""
        if not self.results_file(REAL).is_file():
            self.store(REAL, self.suite.judge(self.real_images(), self.images, "real"), {})

    def judge_model(self, row: str) -> None:
        """Judge a model with each guidance, and store a grid of its images."""
        guidances = self.guidances if row == DENSE else self.guidances[-1:]
        names = [f"{row}, guidance {guidance:g}" for guidance in guidances]
        if all(self.results_file(name).is_file() for name in names):
            return
        checkpoint = self.trained(row)
        trained, network = checkpoint.config(), checkpoint.network().to(self.suite.device)
        more = {"macs": count_cost(network).macs, "minutes": self.minutes(row)}
        lows = held_out(self.dataset, trained.upsample)
        generator = Generator(network, trained, pick_precision(trained.train, self.suite.device), lows=lows)
        for guidance, name in zip(guidances, names, strict=True):
            sample = trained.sample.model_copy(update={"guidance": guidance})
            batches = list(generated(generator, self.images, sample, SAMPLING_SEED))
            images_NCHW = torch.cat([images for images, _ in batches])
            columns = len(self.dataset.class_names)  # Labels alternate: a column shows one class.
            grid(images_NCHW[: columns * GRID_ROWS], columns).save(self.results_file(name).with_suffix(".png"))
            judged = self.suite.judge(iter(batches), self.images, sampling_protocol(sample, SAMPLING_SEED))
            self.store(name, judged, more)

    def results_file(self, name: str) -> Path:
        """Return the file of a line of the table."""
        return self.folder / (name.replace(", ", "-").replace(" ", "-") + ".json")

    def store(self, name: str, judged: Judgement, more: Mapping[str, float]) -> None:
        """Store the figures of a line of the table."""
        found = {
            column: next(value for name, value in judged.figures.items() if name.startswith(f"eval/{start}"))
            for column, start in FIGURES.items()
        }
        write_json(self.results_file(name), {"name": name, **found, **more})
        print(f"{name}: {found | dict(more)}", flush=True)

    def run(self, rows: Sequence[str]) -> int:
        """Judge the training images, the dense model, and the rows that are missing. Write the table."""
        settings = {"steps": self.steps, "seed": self.seed, "images": self.images, "knobs": dict(self.knobs)}
        check_settings(self.folder, settings)
        self.trained(DENSE)
        self.judge_real()
        for row in (DENSE, *rows):
            self.judge_model(row)
        self.write()
        return 0

    def write(self) -> None:
        """Write the table of the rows so far."""
        lines = [REAL, *(f"{DENSE}, guidance {guidance:g}" for guidance in self.guidances)]
        lines += [f"{row}, guidance {self.guidances[-1]:g}" for row in IMPORTANCES]
        found = [json.loads(file.read_text("utf-8")) for name in lines if (file := self.results_file(name)).is_file()]
        least = found[0]["FD"]
        cells = [
            [
                one["name"],
                f"{one['macs'] / 1e9:.3g} G" if "macs" in one else "",
                f"{one['FD']:.2f}",
                f"{one['FD'] / least:.1f}",
                f"{one['diversity']:.3f}",
                f"{one['class agreement']:.1%}",
                f"{one['minutes']:.1f}" if one.get("minutes") else "",
            ]
            for one in found
        ]
        heading = (
            f"A model of {self.steps} steps, channels removed to {KEEP:.0%} of the multiply-accumulates by each "
            f"importance, and {max(1, self.steps // SHARE)} steps of fine-tuning. {self.images} images a row against "
            f"the held-out images, seed {self.seed}; the classifier is right on {self._accuracy():.2%} of them."
        )
        columns = ["images", "MACs", "FD", "of the training images'", "diversity", "class agreement", "training, min"]
        write_table(self.folder / "recovery.md", [heading, "", *markdown_table(columns, cells)])

    def _accuracy(self) -> float:
        assert self.suite.classifier is not None
        return self.suite.classifier.accuracy


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = parser_of(__doc__, "runs/recovery")
    parser.add_argument("--steps", type=int, default=5000, metavar="N", help="of the dense model (5000)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of training (0)")
    parser.add_argument(
        "--rows",
        default=",".join(IMPORTANCES),
        metavar="A,B,...",
        help="importances, or dense for the dense model alone (all)",
    )
    parser.add_argument("--guidances", default="1,1.5", metavar="A,B,...", help="of the dense model; the last for all")
    parser.add_argument("--images", type=int, default=5000, metavar="N", help="judged images a row (5000)")
    parser.add_argument("knobs", nargs="*", metavar="--KNOB=VALUE", help="after --: knobs of all runs")
    given = parser.parse_args(argv)

    def work() -> int:
        rows = some_of("--rows", given.rows, [DENSE, *IMPORTANCES], ",")
        guidances = numbers("--guidances", given.guidances, float, lambda g: g > 0.0, "numbers > 0, such as 1,1.5")
        study = Recovery(
            given.out,
            at_least("--steps", given.steps, SHARE),
            given.seed,
            tuple(guidances),
            at_least("--images", given.images, 100),
            split_argv(given.knobs),
        )
        return study.run([row for row in rows if row != DENSE])

    return status_of(work, given.out)


if __name__ == "__main__":
    run_and_leave(main, interruptible=True)
