"""Train each formulation on the built-in digits, sample it with several samplers, and print class agreement.

  python scripts/compare_formulations.py --seeds 0,1,2 --out runs/formulations

Class agreement is the share of 500 generated images in which a classifier of real digits sees the label that was asked
for. Writes results.json and table.md. Stop it and run it again: what is done is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent.config import TrialConfig, build_config
from agent.run_folder import write_json
from agent.trial import run_trial
from diffusion_core.checkpoint import read_checkpoint
from diffusion_core.config_io import ConfigError
from diffusion_core.data import Dataset, load_data
from diffusion_core.evaluation.classifier import Classifier, classifier_for
from diffusion_core.generation import Generator, Request
from diffusion_core.hardware import pick_device, pick_precision
from diffusion_core.samplers import evaluations
from diffusion_core.tracking import NullTracker

EDM = {
    "diffusion.schedule": "karras",
    "diffusion.prediction": "edm",
    "diffusion.weighting": "edm",
    "diffusion.timestep_sampling": "lognormal",
}
FORMULATIONS: dict[str, dict[str, Any]] = {
    "eps": {},
    "v": {"diffusion.prediction": "v"},
    "x0": {"diffusion.prediction": "x0"},
    "edm": EDM,
    "learned variance": {"model.learned_variance": True},
}
SAMPLERS: dict[str, dict[str, Any]] = {
    "ddim 50": {"sample.sampler": "ddim", "sample.steps": 50},
    "ddpm 100": {"sample.sampler": "ddpm", "sample.steps": 100},
    "dpmpp_2m 10": {"sample.sampler": "dpmpp_2m", "sample.steps": 10},
    "heun 18": {"sample.sampler": "heun", "sample.steps": 18},
}
FOR_EDM = {"sample.spacing": "karras"}
IMAGES = 500
SAMPLING_SEED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", default="0", metavar="A,B,...", help="seeds to train with (0)")
    parser.add_argument("--steps", type=int, default=500, metavar="N", help="optimizer steps (500)")
    parser.add_argument("--out", type=Path, default=Path("runs/formulations"), metavar="DIR", help="where it all goes")
    arguments = parser.parse_args(argv)
    try:
        seeds = [int(word) for word in arguments.seeds.split(",")]
        if arguments.steps < 2 or min(seeds) < 0:
            raise ValueError
    except ValueError:
        print(
            f"error: --seeds = {arguments.seeds!r}, --steps = {arguments.steps}: expected integers >= 0, such as "
            "0,1,2, and at least 2 steps",
            file=sys.stderr,
        )
        return 2
    try:
        compare(seeds, arguments.steps, arguments.out)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def compare(seeds: list[int], steps: int, folder: Path) -> None:
    """Measure what is not measured yet, and write the table."""
    config = build_config({"preset": "digits"})
    dataset = load_data(config.data)
    classifier = classifier_for(dataset, "digits", mirrored=config.data.flips, device=pick_device(config.train))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    results: dict[str, dict[str, float]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name, overrides in FORMULATIONS.items():
        for seed in seeds:
            key = f"{name}, {steps} steps, seed {seed}"
            if key not in results:
                print(key, flush=True)
                results[key] = measure(name, overrides, seed, steps, folder, dataset, classifier)
                write_json(file, results)
    table = markdown(results, seeds, steps, classifier.accuracy)
    (folder / "table.md").write_text(table, encoding="utf-8")
    print(table)


def measure(
    name: str,
    overrides: dict[str, Any],
    seed: int,
    steps: int,
    folder: Path,
    dataset: Dataset,
    classifier: Classifier,
) -> dict[str, float]:
    """Train one formulation with one seed; class agreement for each sampler, in [0, 1]."""
    quiet = {"sample.every": 0, "eval.every": 0, "checkpoint.every": 0, "checkpoint.upload": False}
    fixed = {"preset": "digits", "seed": seed, "train.steps": steps, "train.device": "cpu", "log.progress": False}
    config = build_config(fixed | quiet | overrides)
    run = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{steps}-{seed}"
    result = run_trial(config, NullTracker(), dataset=dataset, folder=run, run_id=run.name)
    checkpoint = read_checkpoint(result.best_checkpoint)
    device = pick_device(config.train)
    network = checkpoint.network().to(device)
    wanted = [Request(i % dataset.num_classes, i // dataset.num_classes) for i in range(IMAGES)]
    measured = {"seconds": result.seconds}
    for sampler, settings in SAMPLERS.items():
        chosen = sampling(config, overrides, settings)
        generator = Generator(network, chosen, pick_precision(config.train, device))
        images = generator.images(wanted, chosen.sample, SAMPLING_SEED)
        measured[sampler] = classifier.agreement(images, [request.label for request in wanted])
    return measured


def sampling(config: TrialConfig, overrides: dict[str, Any], settings: dict[str, Any]) -> TrialConfig:
    """The configuration with a sampler that suits the formulation."""
    more: dict[str, Any] = dict(settings)
    if config.diffusion.schedule == "karras":
        more |= FOR_EDM
    if config.model.learned_variance and settings["sample.sampler"] == "ddpm":
        more["sample.variance"] = "learned"
    return build_config({"preset": "digits"} | overrides | more)


def markdown(results: dict[str, dict[str, float]], seeds: list[int], steps: int, accuracy: float) -> str:
    """The table: mean over seeds, and range where there are several."""
    lines = [
        f"{steps} optimizer steps, seeds {', '.join(map(str, seeds))} (mean, and range in brackets), {IMAGES} images "
        f"sampled with seed {SAMPLING_SEED} and guidance 2; the classifier is right on {accuracy:.2%} of the real "
        "held-out digits.",
        "",
        "| formulation | " + " | ".join(SAMPLERS) + " |",
        "|---|" + "---|" * len(SAMPLERS),
    ]
    for name in FORMULATIONS:
        cells = []
        for sampler in SAMPLERS:
            values = [100.0 * results[f"{name}, {steps} steps, seed {seed}"][sampler] for seed in seeds]
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.1f}%{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    counts = ", ".join(f"{name}: {evaluations(build_config(settings).sample)}" for name, settings in SAMPLERS.items())
    lines += ["", f"Network evaluations an image (twice that under guidance): {counts}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
