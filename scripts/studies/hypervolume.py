"""Compare searches for the best images at each cost: the hypervolume of their Pareto fronts at equal trials.

  PYTHONPATH=scripts python -m studies.hypervolume --checkpoint runs/teacher --out runs/hypervolume

A trial samples a trained model with other settings and measures the Fréchet distance in the features of the data set's
classifier. What was measured once is stored in measured.json and not measured again. Writes hypervolume.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from agent.command import run_and_leave
from diffusion_core.checkpoint import Checkpoint
from diffusion_core.choice import choose
from diffusion_core.config import CoreConfig, EvalConfig, build, flatten
from diffusion_core.data.datasets import load_data
from diffusion_core.evaluation.generated import generated
from diffusion_core.evaluation.protocol import sampling_protocol
from diffusion_core.evaluation.suite import Suite
from diffusion_core.hardware import pick_precision
from diffusion_core.registries import SEARCHES
from diffusion_core.sampling.cost import MACS, image_costs
from diffusion_core.sampling.generation import Generator
from diffusion_core.sampling.lows import held_out
from diffusion_core.search import engine, optuna_engine
from diffusion_core.search.method import Search, SearchRequest
from diffusion_core.search.objectives import Objective, front_among, point_of
from diffusion_core.tables import markdown_table, mean_and_range
from studies.command import at_least, parser_of, status_of
from studies.study import Results
from studies.table import write_table

SPACE: dict[str, Any] = {
    "sample.sampler": {"values": ["ddim", "dpmpp_2m", "heun"]},
    "sample.spacing": {"values": ["uniform", "trailing", "karras"]},
    "sample.steps": {"values": [1, 2, 3, 4, 5, 6, 8]},
    "sample.start_level": {"values": [None, 10.0]},
}
DISTANCE = "fd"
OBJECTIVES = (Objective(DISTANCE, "minimize", 20.0), Objective(MACS, "minimize", 2.6e8))
"""The limits: a distance at which digits are hard to read, and 16 evaluations of the digits preset's network."""

SEED_STEP = 1_000_003
"""Distance of the seeds of two repetitions."""

Measure = Callable[[Mapping[str, Any]], dict[str, float]]


def searches(total: int) -> dict[str, Callable[[int], Search]]:
    """Return what makes each search, given the number of the repetition."""

    def by_optuna(sampler: optuna_engine.Sampler, number: int) -> Search:
        request = SearchRequest({"parameters": SPACE}, OBJECTIVES, None, total)
        return optuna_engine.OptunaSearch(
            request, lambda seed, count: sampler((seed + SEED_STEP * number) % 2**32, count)
        )

    return {
        "random": lambda number: Random(number * total),
        "nsga2": partial(by_optuna, optuna_engine.nsga2),
        "tpe": partial(by_optuna, optuna_engine.tpe),
    }


class Random:
    """Random search by W&B's engine, whose n-th draw depends on n alone: each repetition takes other draws.

    Args:
        before: draws to leave out.
    """

    def __init__(self, before: int) -> None:
        self.before = before
        self.search: Search = SEARCHES["random"].make(SearchRequest({"method": "random", "parameters": SPACE}))

    def suggest(self, past: Sequence[Mapping[str, Any]], runs: Callable[[], Sequence[Any]]) -> dict[str, Any] | None:
        return self.search.suggest([{}] * self.before + list(past), runs)


def volume_of(search: Search, trials: int, measure: Measure) -> float:
    """Return the hypervolume after some trials, as a share of the whole between the limits and zero."""
    past: list[dict[str, Any]] = []
    runs: list[Any] = []
    for number in range(trials):
        parameters = search.suggest(past, lambda: runs)
        assert parameters is not None
        past.append(parameters)
        runs.append(engine.past_run(str(number), parameters, "finished", measure(parameters), []))
    points = [point_of(run.summary_metrics, OBJECTIVES) for run in runs]
    whole = float(OBJECTIVES[0].limit or 1.0) * float(OBJECTIVES[1].limit or 1.0)
    return front_among(points, OBJECTIVES).volume / whole


class Measured:
    """Measures the images of a checkpoint with other settings of sampling, and remembers.

    Args:
        checkpoint: the model.
        images: number of images.
        file: where measurements are stored.
    """

    def __init__(self, checkpoint: Checkpoint, images: int, file: Path) -> None:
        self.checkpoint, self.images = checkpoint, images
        self.results = Results(file, (DISTANCE, MACS))
        config = checkpoint.config()
        figures = {"num_images": images, "figures": ["frechet"], "extractors": ["classifier"]}
        self.network = checkpoint.network()
        device = next(self.network.parameters()).device
        dataset = load_data(config.data)
        self.suite = Suite(
            config.data, build(EvalConfig, figures), dataset, with_classifier=True, device=device, must_have=True
        )

    def __call__(self, parameters: Mapping[str, Any]) -> dict[str, float]:
        key = json.dumps(parameters, sort_keys=True)
        if key not in self.results:
            config = build(CoreConfig, flatten(self.checkpoint.config()), parameters)
            lows = held_out(self.suite.dataset, config.upsample)
            generator = Generator(self.network, config, pick_precision(config.train, self.suite.device), lows=lows)
            costs = image_costs(self.network, config.sample, config.diffusion, config.model)
            batches = generated(generator, self.images, config.sample, 1)
            figures = self.suite.judge(batches, self.images, sampling_protocol(config.sample, 1)).figures
            (distance,) = (value for name, value in figures.items() if name.startswith("eval/fd_"))
            self.results.add(key, {DISTANCE: distance, MACS: costs[MACS]})
        return self.results.values[key]


def compare(checkpoint: Path, images: int, trials: int, repetitions: int, out: Path) -> int:
    measure = Measured(choose(checkpoint), images, out / "measured.json")
    rows = []
    for name, make in searches(trials).items():
        volumes = [volume_of(make(number), trials, measure) for number in range(repetitions)]
        rows.append([name, mean_and_range(volumes, ".4f"), ", ".join(f"{volume:.4f}" for volume in volumes)])
        print(*rows[-1], flush=True)
    head = [f"search, {trials} trials", "hypervolume, mean and range", f"each of {repetitions} seeds"]
    write_table(out / "hypervolume.md", markdown_table(head, rows))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = parser_of(__doc__, "runs/hypervolume")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="PATH", help="a trained model, or its run")
    parser.add_argument("--images", type=int, default=200, metavar="N", help="generated images a trial (200)")
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="trials of each search (20)")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="seeds of each search (5)")
    given = parser.parse_args(argv)

    def work() -> int:
        images, trials = at_least("--images", given.images, 2), at_least("--trials", given.trials, 2)
        return compare(given.checkpoint, images, trials, at_least("--repetitions", given.repetitions, 2), given.out)

    return status_of(work, given.out)


if __name__ == "__main__":
    run_and_leave(main, interruptible=True)
