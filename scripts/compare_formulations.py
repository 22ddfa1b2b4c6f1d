"""Train each formulation on the built-in digits, sample it with several samplers, and print class agreement.

  python scripts/compare_formulations.py --seeds 0,1,2 --out runs/formulations
  python scripts/compare_formulations.py --formulations 'eps;EDM' --samplers 'ddim 50;heun 18'

Class agreement is the share of 500 generated images in which a classifier of real digits sees the label that was asked
for. Writes results.json and table.md. Stop it and run it again: what is done is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.command import fail
from agent.config import build_config
from agent.trial import TrialResult, run_trial
from diffusion_core.checkpoint import read_checkpoint
from diffusion_core.config import FORMULATIONS, PRESETS, ConfigError, CoreConfig, build, flatten
from diffusion_core.data.datasets import Dataset, load_data
from diffusion_core.diffusion.schedule import build_schedule
from diffusion_core.evaluation.classifier.classifier import Classifier, classifier_for
from diffusion_core.files import write_json
from diffusion_core.hardware import pick_device, pick_precision
from diffusion_core.sampling.generation import Generator, round_robin
from diffusion_core.sampling.samplers import evaluations
from diffusion_core.tables import markdown_table, mean_and_range
from diffusion_core.tracking import NullTracker

COMPARED = ("eps", "v", "x0", "EDM", "learned variance")
SAMPLERS: dict[str, dict[str, Any]] = {
    "ddim 50": {"sample.sampler": "ddim", "sample.steps": 50},
    "ddpm 100": {"sample.sampler": "ddpm", "sample.steps": 100},
    "dpmpp_2m 10": {"sample.sampler": "dpmpp_2m", "sample.steps": 10},
    "heun 18": {"sample.sampler": "heun", "sample.steps": 18},
    "heun 10, karras": {"sample.sampler": "heun", "sample.steps": 10, "sample.spacing": "karras"},
}
FOR_EDM = {"sample.spacing": "karras"}
IMAGES = 500
SAMPLING_SEED = 1
SECONDS = "seconds"
"""Of training, kept beside the figures of the samplers."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", default="0", metavar="A,B,...", help="seeds to train with (0)")
    parser.add_argument("--steps", type=int, default=500, metavar="N", help="optimizer steps (500)")
    parser.add_argument("--formulations", metavar="A;B", help=f"some of {'; '.join(COMPARED)} (all)")
    parser.add_argument("--samplers", metavar="A;B", help=f"some of {'; '.join(SAMPLERS)} (all)")
    parser.add_argument("--out", type=Path, default=Path("runs/formulations"), metavar="DIR", help="where it all goes")
    arguments = parser.parse_args(argv)
    try:
        seeds = [int(word) for word in arguments.seeds.split(",")]
        if arguments.steps < 2 or min(seeds) < 0:
            raise ValueError
    except ValueError:
        return fail(
            f"--seeds = {arguments.seeds!r}, --steps = {arguments.steps}: expected integers >= 0, such as 0,1,2, and "
            "at least 2 steps"
        )
    try:
        names = some_of("--formulations", arguments.formulations, COMPARED)
        samplers = some_of("--samplers", arguments.samplers, tuple(SAMPLERS))
        compare(names, samplers, seeds, arguments.steps, arguments.out)
    except ConfigError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from here ({arguments.out})", file=sys.stderr)
        return 130
    return 0


def some_of(key: str, text: str | None, choices: Sequence[str]) -> list[str]:
    """What an option names of the choices, in its order; all of them if it is not given."""
    names = list(choices) if text is None else [word.strip() for word in text.split(";")]
    for name in names:
        if name not in choices:
            raise ConfigError(f"{key} = {name!r}: expected some of {'; '.join(choices)}")
    return names


def compare(names: Sequence[str], samplers: Sequence[str], seeds: Sequence[int], steps: int, folder: Path) -> None:
    """Measure what is not measured yet, and write the table."""
    config = build_config({"preset": "digits"})
    dataset = load_data(config.data)
    classifier = classifier_for(dataset, "digits", mirrored=config.data.flips, device=pick_device(config.train))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    results: dict[str, dict[str, float]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name in names:
        for seed in seeds:
            key = f"{name}, {steps} steps, seed {seed}"
            figures = results.setdefault(key, {})
            missing = [sampler for sampler in samplers if sampler not in figures]
            if missing:
                print(key, file=sys.stderr, flush=True)
                model = train(name, seed, steps, folder, dataset)
                figures.setdefault(SECONDS, model.seconds)
                for sampler in missing:
                    figures[sampler] = agreement(model.best_checkpoint, sampler, classifier)
                    write_json(file, results)
    table = markdown(results, names, samplers, seeds, steps, classifier.accuracy)
    (folder / "table.md").write_text(table, encoding="utf-8")
    print(table)


def train(name: str, seed: int, steps: int, folder: Path, dataset: Dataset) -> TrialResult:
    """Train one formulation with one seed, or find the model that an earlier call trained."""
    quiet = {"sample.every": 0, "eval.every": 0, "checkpoint.every": 0, "checkpoint.upload": False}
    fixed = {"preset": "digits", "seed": seed, "train.steps": steps, "train.device": "cpu", "log.progress": False}
    run = folder / f"{name.replace(' ', '-')}-{steps}-{seed}"
    config = build_config(fixed | quiet | FORMULATIONS[name])
    return run_trial(config, NullTracker(), dataset=dataset, folder=run, run_id=run.name)


def agreement(path: Path, sampler: str, classifier: Classifier) -> float:
    """Class agreement of a checkpoint's images by one of the samplers, in [0, 1]."""
    checkpoint = read_checkpoint(path)
    config = sampling(checkpoint.config(), SAMPLERS[sampler])
    classes = checkpoint.metadata["num_classes"]
    wanted = round_robin(range(classes), range(IMAGES))
    device = pick_device(config.train)
    generator = Generator(checkpoint.network().to(device), config, pick_precision(config.train, device))
    images = generator.images(wanted, config.sample, SAMPLING_SEED)
    return classifier.agreement(images, [request.label for request in wanted])


def sampling(config: CoreConfig, settings: Mapping[str, Any]) -> CoreConfig:
    """The configuration with a sampler, as it suits the formulation."""
    more: dict[str, Any] = {}
    if config.diffusion.schedule == "karras":
        more |= FOR_EDM
    if config.model.learned_variance and settings["sample.sampler"] == "ddpm":
        more["sample.variance"] = "learned"
    return build(CoreConfig, flatten(config), settings, more)


def markdown(
    results: Mapping[str, Mapping[str, float]],
    names: Sequence[str],
    samplers: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    accuracy: float,
) -> str:
    """The table: mean over seeds, and range where there are several."""
    heading = (
        f"{steps} optimizer steps, seeds {', '.join(map(str, seeds))} (mean, and range in brackets), {IMAGES} images "
        f"sampled with seed {SAMPLING_SEED} and guidance 2; the classifier is right on {accuracy:.2%} of the real "
        "held-out digits."
    )
    rows = []
    for name in names:
        cells = [name]
        for sampler in samplers:
            values = [results[f"{name}, {steps} steps, seed {seed}"][sampler] for seed in seeds]
            cells.append(mean_and_range(values, ".1%"))
        config = build(CoreConfig, PRESETS["digits"], FORMULATIONS[name])
        schedule = build_schedule(config.diffusion)
        counts = [evaluations(sampling(config, SAMPLERS[sampler]).sample, schedule) for sampler in samplers]
        rows.append([*cells, ", ".join(map(str, counts))])
    table = markdown_table(["formulation", *samplers, "network evaluations an image"], rows)
    return f"{heading}\n\n{table}\n\nGuidance doubles the evaluations.\n"


if __name__ == "__main__":
    sys.exit(main())
