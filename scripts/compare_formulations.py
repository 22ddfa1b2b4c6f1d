"""Train each formulation on the built-in digits, sample it with several samplers, and print class agreement.

  python scripts/compare_formulations.py --seeds 0,1,2 --out runs/formulations
  python scripts/compare_formulations.py --formulations 'eps;EDM' --samplers 'ddim 50;heun 18'

Class agreement is the share of 500 generated images in which a classifier of real digits sees the requested label.
Writes results.json and table.md. Stop it and run it again: finished measurements are kept.
"""

from __future__ import annotations

if __name__ == "__main__":
    from diffusion_core.signals import leave_at_once

    leave_at_once()  # Until main handles signals: the imports take seconds.

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from studies.command import at_least, parser_of, some_of, status_of
from studies.study import Results, run_once
from studies.table import write_table

from agent.command import run_and_leave
from agent.config import build_config
from agent.trial import TrialResult
from diffusion_core.checkpoint import read_checkpoint
from diffusion_core.config import FORMULATIONS, PRESETS, CoreConfig, build, flatten
from diffusion_core.data.datasets import Dataset, load_data
from diffusion_core.diffusion.schedule import build_schedule
from diffusion_core.evaluation.classifier.classifier import Classifier, classifier_for
from diffusion_core.hardware import pick_device, pick_precision
from diffusion_core.messages import seed_list
from diffusion_core.sampling.generation import Generator, round_robin
from diffusion_core.sampling.samplers import evaluations
from diffusion_core.tables import markdown_table, mean_and_range

COMPARED = ("eps", "v", "x0", "EDM", "learned variance")
SAMPLERS: dict[str, dict[str, Any]] = {
    "ddim 50": {"sample.sampler": "ddim", "sample.steps": 50},
    "ddpm 100": {"sample.sampler": "ddpm", "sample.steps": 100},
    "dpmpp_2m 10": {"sample.sampler": "dpmpp_2m", "sample.steps": 10},
    "heun 18": {"sample.sampler": "heun", "sample.steps": 18},
    "heun 10, karras": {"sample.sampler": "heun", "sample.steps": 10, "sample.spacing": "karras"},
}
IMAGES = 500
SAMPLING_SEED = 1
SECONDS = "seconds"
"""Key of the training time, beside the figures of the samplers."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = parser_of(__doc__, "runs/formulations")
    parser.add_argument("--seeds", type=seed_list, default=[0], metavar="A,B,...", help="training seeds (0)")
    parser.add_argument("--steps", type=int, default=500, metavar="N", help="optimizer steps (500)")
    parser.add_argument("--formulations", metavar="A;B", help=f"some of {'; '.join(COMPARED)} (all)")
    parser.add_argument("--samplers", metavar="A;B", help=f"some of {'; '.join(SAMPLERS)} (all)")
    arguments = parser.parse_args(argv)
    return status_of(lambda: compare(arguments), arguments.out)


def compare(arguments: argparse.Namespace) -> int:
    """Measure what is missing, and write the table."""
    seeds, steps = arguments.seeds, at_least("--steps", arguments.steps, 2)
    names = some_of("--formulations", arguments.formulations, COMPARED)
    samplers = some_of("--samplers", arguments.samplers, tuple(SAMPLERS))
    config = build_config({"preset": "digits"})
    dataset = load_data(config.data)
    classifier = classifier_for(dataset, "digits", mirrored=config.data.flips, device=pick_device(config.train))
    results = Results(arguments.out / "results.json", samplers)
    for name in names:
        for seed in seeds:
            key = f"{name}, {steps} steps, seed {seed}"
            if key not in results:
                print(key, file=sys.stderr, flush=True)
                model = train(name, seed, steps, arguments.out, dataset)
                results.add(key, {SECONDS: model.seconds})
                for sampler in samplers:
                    if sampler not in results.values[key]:
                        results.add(key, {sampler: agreement(model.best_checkpoint, sampler, classifier)})
    lines = [
        f"{steps} optimizer steps, seeds {', '.join(map(str, seeds))} (mean, and range in brackets), {IMAGES} images "
        f"sampled with seed {SAMPLING_SEED} and guidance 2; the classifier is right on {classifier.accuracy:.2%} of "
        "the real held-out digits.",
        "",
        *markdown_table(
            ["formulation", *samplers, "network evaluations per image"], table_rows(results, names, seeds, steps)
        ),
        "",
        "Guidance doubles the evaluations.",
    ]
    write_table(arguments.out / "table.md", lines)
    return 0


def train(name: str, seed: int, steps: int, folder: Path, dataset: Dataset) -> TrialResult:
    """Train one formulation with one seed, or return the result of an earlier call."""
    quiet = {"sample.every": 0, "eval.every": 0, "checkpoint.every": 0, "checkpoint.upload": False}
    fixed = {"preset": "digits", "seed": seed, "train.steps": steps, "train.device": "cpu", "log.progress": False}
    run = folder / f"{name.replace(' ', '-')}-{steps}-{seed}"
    config = build_config(fixed | quiet | FORMULATIONS[name])
    return run_once(config, dataset, run)


def agreement(path: Path, sampler: str, classifier: Classifier) -> float:
    """Return the class agreement of a checkpoint with one of the samplers, in [0, 1]."""
    checkpoint = read_checkpoint(path)
    config = sampling(checkpoint.config(), SAMPLERS[sampler])
    classes = checkpoint.metadata["num_classes"]
    wanted = round_robin(range(classes), range(IMAGES))
    device = pick_device(config.train)
    generator = Generator(checkpoint.network().to(device), config, pick_precision(config.train, device))
    images = generator.images(wanted, config.sample, SAMPLING_SEED)
    return classifier.class_agreement(images, [request.label for request in wanted])


def sampling(config: CoreConfig, settings: Mapping[str, Any]) -> CoreConfig:
    """Return the configuration with a sampler, adapted to the formulation."""
    more: dict[str, Any] = {}
    if config.diffusion.schedule == "karras":
        more["sample.spacing"] = "karras"
    if config.model.learned_variance and settings["sample.sampler"] == "ddpm":
        more["sample.variance"] = "learned"
    return build(CoreConfig, flatten(config), settings, more)


def table_rows(results: Results, names: Sequence[str], seeds: Sequence[int], steps: int) -> list[list[str]]:
    """Return a row per formulation: class agreement per sampler, then evaluations of the network per sampler."""
    rows = []
    for name in names:
        config = build(CoreConfig, PRESETS["digits"], FORMULATIONS[name])
        schedule = build_schedule(config.diffusion)
        counts = [evaluations(sampling(config, SAMPLERS[sampler]).sample, schedule) for sampler in results.figures]
        cells = [
            mean_and_range(results.over_seeds(f"{name}, {steps} steps", seeds, sampler), ".1%")
            for sampler in results.figures
        ]
        rows.append([name, *cells, ", ".join(map(str, counts))])
    return rows


if __name__ == "__main__":
    run_and_leave(main, interruptible=True)
