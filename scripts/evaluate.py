"""How good a model is: class agreement of generated images, by a classifier trained on the real ones."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from agent.results import JSON_FILE
from diffusion_core.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from diffusion_core.config import TrainConfig
from diffusion_core.config_io import ConfigError
from diffusion_core.data import DataError, load_data
from diffusion_core.evaluation import PixelClassifier
from diffusion_core.generation import Generator, Request, all_labels
from diffusion_core.hardware import pick_device, pick_precision


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, metavar="PATH", help="a checkpoint, or a run's folder")
    source.add_argument("--sweep", type=Path, metavar="DIR", help="an offline sweep's folder: its best trial")
    parser.add_argument("--num-images", type=int, default=500, metavar="N", help="images to generate (500)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the images (1)")
    arguments = parser.parse_args()
    if arguments.num_images < 1:
        parser.error(f"--num-images = {arguments.num_images}: expected an integer >= 1")
    try:
        path = arguments.checkpoint or best_of_sweep(arguments.sweep)
        evaluate(read_checkpoint(path), arguments.num_images, arguments.seed)
    except (CheckpointError, ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def best_of_sweep(folder: Path) -> Path:
    """The best checkpoint of the best trial of an offline sweep."""
    try:
        trials = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))
        return Path(next(trial["best_checkpoint"] for trial in trials if trial["best_checkpoint"]))
    except (OSError, ValueError, StopIteration, KeyError, TypeError):
        raise CheckpointError(f"--sweep = {str(folder)!r}: no finished trial in its {JSON_FILE}") from None


def evaluate(checkpoint: Checkpoint, count: int, seed: int) -> None:
    """Generate images of all classes in turn, and print how many show the label that was asked for."""
    config = checkpoint.config()
    if not checkpoint.metadata["num_classes"]:
        raise CheckpointError(f"{str(checkpoint.path)!r}: class agreement needs a class-conditional model")
    if not config.has_classifier:
        raise CheckpointError(
            f"{str(checkpoint.path)!r}: trained on data.name={config.data.name} with eval.classifier="
            f"{config.eval.classifier}; class agreement is measured for digits, or with eval.classifier=svc"
        )
    device = pick_device(TrainConfig())  # Where there is a GPU, and not where it was trained.
    network = checkpoint.network().to(device)
    classifier = PixelClassifier(load_data(config.data, progress=True))
    labels = all_labels(network)
    wanted = [Request(labels[i % len(labels)], i // len(labels)) for i in range(count)]
    images = Generator(network, config, pick_precision(config.train, device)).images(
        wanted, config.sample, seed, progress=True
    )
    agreement = classifier.agreement(images, [image.label for image in wanted])
    settings = config.sample
    print(f"checkpoint:      {checkpoint.path}")
    print(f"classifier:      {classifier.accuracy:.2%} of the real held-out images right")
    print(
        f"class agreement: {agreement:.2%} of {count} generated images show the label that was asked for "
        f"({settings.sampler}, {settings.steps} steps, guidance {settings.guidance:g}, seed {seed})"
    )


if __name__ == "__main__":
    sys.exit(main())
