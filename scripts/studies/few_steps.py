"""Compare models that draw an image in one or two steps: students of a dense model and of one with half its MACs.

  PYTHONPATH=scripts python -m studies.few_steps --seeds 0,1,2 --lengths 1300,2600
  PYTHONPATH=scripts python -m studies.few_steps --out runs/mnist --teacher-steps 4000 -- \\
      --preset=mnist --data.name=folder --data.path=MNIST        # other images; words after -- are knobs of all runs

For each seed it trains a teacher, prunes and fine-tunes it, and distils a student of both for each length. Every model
is judged by the Frechet distance in the features of the data set's classifier, by diversity, and by what classifiers
learn from its images. Writes few-steps.json and few-steps.md. Stop it and run it again: what has a result is kept.
"""

from __future__ import annotations

if __name__ == "__main__":
    from diffusion_core.signals import leave_at_once

    leave_at_once()  # Until main handles signals: the imports take seconds.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from agent.command import run_and_leave
from agent.config import TrialConfig, build_config
from diffusion_core.checkpoint import Checkpoint
from diffusion_core.choice import choose
from diffusion_core.config import EvalConfig, build, split_argv
from diffusion_core.data.datasets import Dataset, load_data
from diffusion_core.evaluation.generated import generated
from diffusion_core.evaluation.protocol import sampling_protocol
from diffusion_core.evaluation.suite import Suite
from diffusion_core.hardware import pick_device, pick_precision
from diffusion_core.messages import seed_list
from diffusion_core.run_folder import RESULT_FILE
from diffusion_core.sampling.cost import MACS, image_costs
from diffusion_core.sampling.generation import Generator
from diffusion_core.sampling.lows import held_out
from diffusion_core.tables import markdown_table, mean_and_range
from studies.command import at_least, numbers, parser_of, status_of
from studies.study import QUIET, SAMPLING_SEED, Results, check_settings, run_once
from studies.table import write_table

FIGURES = {
    "FD": ("fd_", ".2f"),
    "diversity": ("diversity", ".3f"),
    "train-on-synthetic": ("synthetic_accuracy", ".3f"),
    "train-on-synthetic, SVC": ("svc_synthetic_accuracy", ".3f"),
    "class agreement": ("class_agreement", ".1%"),
    "class agreement, SVC": ("svc_agreement", ".1%"),
}
"""Columns of the table: how the figures' names begin after ``eval/``, and how they are written."""

BASE = {
    "preset": "digits",
    "diffusion.prediction": "v",
    "sample.guidance": 1.0,
    "sample.sampler": "ddim",
    "sample.steps": 50,
}
"""The teacher: the prediction whose clean image is defined at pure noise, drawn without guidance."""
HALF = {"prune.method": "structured", "prune.step": 0, "prune.keep": 0.5, "prune.target": "macs"}
METHOD = {"steps.method": "consistency_distillation", "steps.loss": "l2", "steps.doublings": 3, "steps.target": 2}
FORWARD_PASSES = {"training": 3.0, "distillation": 6.0}
"""Cost of a step: a backward pass counts as two; distillation also asks the teacher twice and the student once."""


@dataclass(frozen=True)
class Row:
    """A row of the table: a model, how it is drawn, and what its distillation cost in trainings of the teacher."""

    name: str
    run: str
    sample: Mapping[str, Any]
    cost: float | None = None


@dataclass(frozen=True)
class FewSteps:
    """The comparison.

    Attributes:
        folder: folder of all results.
        seeds: training seeds.
        teacher_steps: optimizer steps of a teacher.
        tune_steps: optimizer steps of fine-tuning after pruning.
        lengths: optimizer steps of the students.
        counts: steps an image of the students and of the undistilled models beside them.
        lr: learning rate of the students.
        images: generated images a model.
        knobs: knobs of all runs.
    """

    folder: Path
    seeds: tuple[int, ...]
    teacher_steps: int
    tune_steps: int
    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    lr: float
    images: int
    knobs: Mapping[str, Any]

    @cached_property
    def dataset(self) -> Dataset:
        return load_data(self.config("teacher", 0).data)

    @cached_property
    def suite(self) -> Suite:
        config = self.config("teacher", 0)
        figures = ["frechet", "diversity", "synthetic_accuracy", "svc_agreement", "svc_synthetic_accuracy"]
        judged = build(EvalConfig, {"num_images": self.images, "figures": figures, "extractors": ["classifier"]})
        device = pick_device(config.train)
        return Suite(config.data, judged, self.dataset, with_classifier=True, device=device, must_have=True)

    def rows(self) -> list[Row]:
        """Return the rows: both models as they are, undistilled in few steps, and their students."""
        rows = []
        training = FORWARD_PASSES["training"] * self.teacher_steps
        for size, source, share in (("dense", "teacher", 1.0), ("half the MACs", "half", 0.5)):
            rows.append(Row("teacher" if source == "teacher" else size, source, {}))
            few = {"sample.sampler": "ddim", "sample.spacing": "trailing"}
            rows += [Row(f"{size}, undistilled", source, few | {"sample.steps": steps}) for steps in self.counts]
            tuning = FORWARD_PASSES["training"] * self.tune_steps if source == "half" else 0.0
            for length in self.lengths:
                cost = share * (tuning + FORWARD_PASSES["distillation"] * length) / training
                rows += [
                    Row(
                        f"{size}, student of {length} steps",
                        f"student-{source}-{length}",
                        {"sample.steps": steps},
                        cost,
                    )
                    for steps in self.counts
                ]
        return rows

    def config(self, run: str, seed: int) -> TrialConfig:
        """Return the configuration of a run by its name."""
        base = BASE | QUIET | {"seed": seed} | dict(self.knobs)
        if run == "teacher":
            return build_config(base, {"train.steps": self.teacher_steps})
        kind, _, rest = run.partition("-")
        source, _, length = rest.partition("-")
        start = {"init.checkpoint": str(self.place("teacher" if kind == "half" else source, seed))}
        if kind == "half":
            return build_config(base, start, HALF, {"train.steps": self.tune_steps, "train.lr": self.lr / 2})
        student = {"train.steps": int(length), "steps.lr": self.lr, "checkpoint.best_metric": "train/loss"}
        return build_config(base, start, METHOD, student)

    def place(self, run: str, seed: int) -> Path:
        """Return the folder of a run."""
        lengths = {"teacher": f"{self.teacher_steps}", "half": f"{self.teacher_steps}-{self.tune_steps}"}
        return self.folder / "runs" / f"{run}-{lengths.get(run, self.teacher_steps)}-seed{seed}"

    def trained(self, run: str, seed: int) -> Checkpoint:
        """Return the best checkpoint of a run, which is trained unless it has a result; so are those before it."""
        folder = self.place(run, seed)
        if not (folder / RESULT_FILE).is_file():
            if run != "teacher":
                self.trained("half" if run.startswith("student-half") else "teacher", seed)
            run_once(self.config(run, seed), self.dataset, folder)
        return choose(folder)

    def measure(self, row: Row, seed: int) -> dict[str, float]:
        """Return the figures of a row, and what an image costs."""
        checkpoint = self.trained(row.run, seed)
        trained = checkpoint.config()
        sample = trained.sample.model_copy(
            update={key.removeprefix("sample."): value for key, value in row.sample.items()}
        )
        network = checkpoint.network().to(self.suite.device)
        precision, lows = pick_precision(trained.train, self.suite.device), held_out(self.dataset, trained.upsample)
        generator = Generator(network, trained, precision, lows=lows)
        batches = generated(generator, self.images, sample, SAMPLING_SEED)
        figures = self.suite.judge(batches, self.images, sampling_protocol(sample, SAMPLING_SEED)).figures
        found = {
            column: next(value for name, value in figures.items() if name.startswith(f"eval/{start}"))
            for column, (start, _) in FIGURES.items()
        }
        return found | {MACS: image_costs(network, sample, trained.diffusion, trained.model)[MACS]}

    def compare(self) -> int:
        """Measure all rows, seed by seed. Write the table of the seeds so far.

        Raises:
            ConfigError: if the folder holds results of other settings. Seeds, lengths and counts may be added.
        """
        settings = {"teacher_steps": self.teacher_steps, "tune_steps": self.tune_steps, "lr": self.lr,
                    "images": self.images, "knobs": dict(self.knobs)}  # fmt: skip
        check_settings(self.folder, settings)
        results = Results(self.folder / "few-steps.json", [*FIGURES, MACS])
        for done, seed in enumerate(self.seeds, 1):
            for row in self.rows():
                if (key := self._key(row, seed)) not in results:
                    results.add(key, self.measure(row, seed))
                    print(key, results.values[key], flush=True)
            self.write(results, self.seeds[:done])
        return 0

    @staticmethod
    def _key(row: Row, seed: int) -> str:
        return f"{row.name}, {row.sample.get('sample.steps', 'all')} steps, seed {seed}"

    def write(self, results: Results, seeds: Sequence[int]) -> None:
        """Write the table over some seeds."""
        cells = []
        for row in self.rows():
            each = [results.values[self._key(row, seed)] for seed in seeds]
            macs = sum(one[MACS] for one in each) / len(each)
            steps = row.sample.get("sample.steps", "all")
            cost = "" if row.cost is None else f"{row.cost:.1f}"
            quality = [mean_and_range([one[name] for one in each], form) for name, (_, form) in FIGURES.items()]
            cells.append([row.name, str(steps), f"{macs / 1e6:.3g} M", *quality, cost])
        heading = (
            f"Images in few steps: a teacher of {self.teacher_steps} steps, fine-tuning of {self.tune_steps} after "
            f"pruning, {self.images} images a model, seeds {', '.join(map(str, seeds))} (mean, and range in brackets). "
            f"Cost is that of pruning and distillation in trainings of the teacher, by forward passes and MACs."
        )
        columns = ["model", "steps an image", "MACs an image", *FIGURES, "cost"]
        write_table(results.file.with_suffix(".md"), [heading, "", *markdown_table(columns, cells)])


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = parser_of(__doc__, "runs/few-steps")
    parser.add_argument("--seeds", type=seed_list, default=[0, 1, 2], metavar="A,B,...", help="training seeds (0,1,2)")
    parser.add_argument("--teacher-steps", type=int, default=2000, metavar="N", help="of a teacher (2000)")
    parser.add_argument("--tune-steps", type=int, default=300, metavar="N", help="of fine-tuning (300)")
    parser.add_argument("--lengths", default="1300", metavar="A,B,...", help="optimizer steps of the students (1300)")
    parser.add_argument("--counts", default="2,1", metavar="A,B,...", help="steps an image of the students (2,1)")
    parser.add_argument("--lr", type=float, default=2e-3, metavar="X", help="learning rate of the students (0.002)")
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="generated images a model (2000)")
    parser.add_argument("knobs", nargs="*", metavar="--KNOB=VALUE", help="after --: knobs of all runs")
    given = parser.parse_args(argv)

    def work() -> int:
        lengths = numbers("--lengths", given.lengths, int, lambda length: length > 0, "integers > 0, such as 1300,2600")
        counts = numbers("--counts", given.counts, int, lambda count: count > 0, "integers > 0, such as 4,2,1")
        return FewSteps(
            given.out,
            tuple(given.seeds),
            at_least("--teacher-steps", given.teacher_steps, 2),
            at_least("--tune-steps", given.tune_steps, 1),
            tuple(lengths),
            tuple(counts),
            given.lr,
            at_least("--images", given.images, 100),
            split_argv(given.knobs),
        ).compare()

    return status_of(work, given.out)


if __name__ == "__main__":
    run_and_leave(main, interruptible=True)
