"""Sample images from a trained model: a W&B artifact, or a checkpoint on disk.

  python scripts/sample_images.py --artifact model-abc123:best --labels 0,3,7 --num-images 30
  python scripts/sample_images.py --checkpoint runs/abc123 --labels all --sampler ddpm --steps 1000 --gif

Writes {label}-{index}.png, grid.png and, with --gif, diffusion.gif. The image of a (seed, label, index) is always the
same, whatever else is sampled. Stop it and run it again: it goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from agent.artifacts import download_model
from agent.run_folder import write_json
from diffusion_core import media
from diffusion_core.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from diffusion_core.config import CoreConfig, SampleConfig
from diffusion_core.config_io import ConfigError, build, flatten
from diffusion_core.generation import Generator, Request, requests
from diffusion_core.hardware import pick_device, pick_precision
from diffusion_core.unet import NO_LABEL

SETTINGS_FILE = "samples.json"
IMAGES_PER_LABEL = 8
GRID_ROWS, GRID_COLUMNS = 20, 10
KNOBS = ("sampler", "steps", "guidance", "eta", "variance", "spacing", "batch_size")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--artifact", metavar="NAME:ALIAS", help="a `model` artifact on W&B, such as model-abc123:best")
    source.add_argument("--checkpoint", type=Path, metavar="PATH", help="a checkpoint, or a run's folder (its newest)")
    parser.add_argument("--labels", default="all", help="classes by number or name, such as 0,3,7 or cat,dog; or all")
    parser.add_argument("--num-images", metavar="N", help=f"images in all, dealt out to the labels in turn "
                        f"({IMAGES_PER_LABEL} of each)")  # fmt: skip
    parser.add_argument("--seed", default="0", help="seed of the images (0)")
    parser.add_argument("--out", type=Path, default=Path("samples"), metavar="DIR", help="folder of the images")
    parser.add_argument("--gif", action="store_true", help="also the animation from noise to image")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="averaged weights, or as trained")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    own = parser.add_argument_group("sampling (default: as the model was sampled while training)")
    for name in KNOBS:
        help_text = " ".join(str(SampleConfig.model_fields[name].description).split())
        own.add_argument(f"--{name.replace('_', '-')}", metavar=name.upper(), help=help_text)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 if something asked for cannot be had."""
    arguments = parse_arguments(argv)
    try:
        path = download_model(arguments.artifact) if arguments.artifact else arguments.checkpoint
        checkpoint = read_checkpoint(path)
        return sample_images(checkpoint, arguments)
    except (CheckpointError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from here ({arguments.out})", file=sys.stderr)
        return 130


def sample_images(checkpoint: Checkpoint, arguments: argparse.Namespace) -> int:
    """Sample what was asked for; images that are there from an earlier, equal call are kept."""
    given = {f"sample.{name}": value for name in KNOBS if (value := getattr(arguments, name)) is not None}
    hardware = {"train.device": arguments.device, "train.precision": arguments.precision, "seed": arguments.seed}
    config = build(CoreConfig, flatten(checkpoint.config()), given, hardware)
    if arguments.weights not in checkpoint.parts:
        raise CheckpointError(f"--weights = {arguments.weights!r}: {str(checkpoint.path)!r} does not hold them")
    labels = pick_labels(arguments.labels, checkpoint)
    count = pick_count(arguments.num_images, len(labels))
    device = pick_device(config.train)
    network = checkpoint.network(arguments.weights).to(device)
    generator = Generator(network, config, pick_precision(config.train, device))

    folder: Path = arguments.out
    check_folder(folder, settings(checkpoint, config, arguments.weights))
    wanted = [Request(labels[i % len(labels)], i // len(labels)) for i in range(count)]
    missing = [request for request in wanted if not (folder / file_name(request)).is_file()]
    for batch, images in generator.batches(missing, config.sample, config.seed, progress=True):
        for request, pixels_CHW in zip(batch, images, strict=True):
            save_png(pixels_CHW, folder / file_name(request))

    rows = [label for label in labels[:GRID_ROWS] if Request(label, 0) in wanted]
    names = [class_name(label, checkpoint) for label in rows]
    columns = min(GRID_COLUMNS, count // len(labels) or 1)
    tiles = [read_png(folder / file_name(request)) for request in requests(rows, columns)]
    media.grid(torch.stack(tiles), columns, names).save(folder / "grid.png")
    if arguments.gif:
        columns = min(media.GIF_COLUMNS, columns)
        shown = requests(rows[: media.GIF_ROWS], columns)
        frames = generator.trajectory(shown, config.sample, config.seed, media.spread(config.sample.steps))
        pictures = [media.grid(frame, columns, names[: media.GIF_ROWS]) for frame in frames]
        media.save_gif(pictures, folder / "diffusion.gif")
    print(f"{count} images ({len(missing)} new), grid.png{' and diffusion.gif' if arguments.gif else ''} in {folder}/")
    return 0


def pick_labels(text: str, checkpoint: Checkpoint) -> list[int]:
    """The labels that ``--labels`` names, by number or class name, in its order."""
    number = checkpoint.metadata["num_classes"]
    if not number:
        if text != "all":
            raise ConfigError(f"--labels = {text!r}: the model knows no labels; expected all")
        return [NO_LABEL]
    if text == "all":
        return list(range(number))
    names = {name: label for label, name in enumerate(checkpoint.class_names)}
    labels = []
    for word in (part.strip() for part in text.split(",")):
        label = int(word) if word.isdecimal() else names.get(word, number)
        if label >= number:
            shown = ", ".join(checkpoint.class_names[:GRID_ROWS])
            raise ConfigError(f"--labels = {word!r}: expected all, or some of 0 to {number - 1} or of {shown}")
        labels.append(label)
    return list(dict.fromkeys(labels))


def pick_count(text: str | None, labels: int) -> int:
    """How many images ``--num-images`` asks for."""
    if text is None:
        return IMAGES_PER_LABEL * labels
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--num-images = {text!r}: expected an integer >= 1")
    return int(text)


def class_name(label: int, checkpoint: Checkpoint) -> str:
    return "" if label == NO_LABEL else checkpoint.class_names[label]


def file_name(request: Request) -> str:
    """``{label}-{index}.png``; ``none`` is the label of a model without labels."""
    return f"{'none' if request.label == NO_LABEL else request.label}-{request.index}.png"


def settings(checkpoint: Checkpoint, config: CoreConfig, weights: str) -> dict[str, Any]:
    """What decides how an image looks, besides its label and index."""
    sampling = config.sample.model_dump(exclude={"every", "per_class", "batch_size"})
    hashes = {name: facts["sha256"] for name, facts in checkpoint.metadata["files"].items() if weights in name}
    return {"weights": hashes, "step": checkpoint.step, "seed": config.seed, "sample": sampling}


def check_folder(folder: Path, wanted: dict[str, Any]) -> None:
    """Make the folder of the images, or go on in it if it holds images of these very settings.

    Raises:
        ConfigError: if it holds images of other settings, or of unknown ones.
    """
    file = folder / SETTINGS_FILE
    try:
        if file.is_file():
            if json.loads(file.read_text(encoding="utf-8")) == wanted:
                return
            raise ConfigError(f"--out = {str(folder)!r}: holds images of other settings; choose another folder")
        if any(folder.glob("*.png")):
            raise ConfigError(f"--out = {str(folder)!r}: holds other images already; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, wanted)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"its {SETTINGS_FILE} is damaged"
        raise ConfigError(f"--out = {str(folder)!r}: {reason}; choose another folder") from None


def save_png(pixels_CHW: torch.Tensor, path: Path) -> None:
    """Write an image in one piece, so that what is there is whole."""
    temporary = path.with_name(f".{path.name}.partial")
    media.image(pixels_CHW).save(temporary, format="PNG")
    temporary.replace(path)


def read_png(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        array = np.asarray(image)
    return torch.from_numpy(array.copy())[None] if array.ndim == 2 else torch.from_numpy(array.copy()).permute(2, 0, 1)


if __name__ == "__main__":
    sys.exit(main())
