"""Sample images from a trained model: a W&B artifact, or a checkpoint on disk.

  python scripts/sample_images.py --artifact model-abc123:best --labels 0,3,7 --num-images 30
  python scripts/sample_images.py --checkpoint runs/abc123 --labels all --sampler ddpm --steps 1000 --gif
  python scripts/sample_images.py --checkpoint runs/abc123 --mode denoise --labels cat,dog --num-images 4
  python scripts/sample_images.py --checkpoint runs/abc123 --mode interpolate --labels cat,dog --num-images 4
  python scripts/sample_images.py --checkpoint runs/base64 --upsample runs/up256 model-up1024:best
  python scripts/sample_images.py --checkpoint runs/up256 --low folder
  accelerate launch --num_processes 8 scripts/sample_images.py --checkpoint runs/abc123 --num-images 50000

Modes:
  sample       {label}-{index}.png, grid.png and, with --gif, diffusion.gif; stop it and run it again: it goes on
  denoise      from noise to image, as a strip (denoise.png, a row an image) and as denoise.gif
  progressive  the clean image that the network expects, step by step: progressive.png and progressive.gif
  interpolate  between two labels (--labels cat,dog) or two seeds (--seeds 0,1): interpolate.png and interpolate.gif

The image of a (seed, label, index) is always the same, whatever else is sampled, and by however many processes.

A model that upsamples (upsample.factor) starts from the images of the model before it (--upsample), from a folder
(--low), or else from the held-out images of its data set. Each model of --upsample is sampled as it was trained to be.
"""

from __future__ import annotations

if __name__ == "__main__":
    from diffusion_core.signals import leave_at_once

    leave_at_once()  # Until main handles signals: the imports take seconds.

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState

from agent.command import fail, run_and_leave
from agent.tracking.artifacts import download_model, open_source
from diffusion_core.checkpoint import Checkpoint, CheckpointError
from diffusion_core.choice import add_which_flag, announce, check_weights, choose
from diffusion_core.config import ConfigError, CoreConfig, build, flatten
from diffusion_core.config.plugins import add_plugins_flag
from diffusion_core.data.datasets import DataError
from diffusion_core.distributed import first_process_first
from diffusion_core.evaluation.features import ExtractorError
from diffusion_core.evaluation.folders import FolderLows, small_images
from diffusion_core.hardware import pick_device, pick_precision
from diffusion_core.machine.launch import launch_errors
from diffusion_core.messages import Parser, out_folder, seed, two_seeds
from diffusion_core.model.unet import NO_LABEL
from diffusion_core.sampling import media
from diffusion_core.sampling.autoguidance import FREE_OF_LABELS, check_guide
from diffusion_core.sampling.chain import check_chain, images_of
from diffusion_core.sampling.flags import LOW_NOISE, add_sampling_flags, sampling_knobs, student_note
from diffusion_core.sampling.generation import Generator, Lows, Request, round_robin
from diffusion_core.sampling.image_folder import check_folder, file_name, is_whole_png, read_png, save_png, settings
from diffusion_core.sampling.interpolation import between_labels, between_seeds
from diffusion_core.sampling.labels import pick_count, pick_labels
from diffusion_core.sampling.lows import HeldOut

MODES = ("sample", "denoise", "progressive", "interpolate")
IMAGES_PER_LABEL = 8
GRID_ROWS, GRID_COLUMNS = 20, 10
STRIP_COLUMNS = 10


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--artifact", metavar="NAME:ALIAS", help="a `model` artifact on W&B, such as model-abc123:best")
    source.add_argument("--checkpoint", type=Path, metavar="PATH", help="a checkpoint, or a run's folder")
    add_which_flag(parser, "a run's folder, or version of an artifact without alias")
    parser.add_argument("--mode", choices=MODES, default="sample", help="see above (sample)")
    parser.add_argument("--labels", default="all", help="classes by name or number from 0, such as cat,dog or "
                        "0,3,7; or all. A name counts before a number, and may hold commas and spaces")  # fmt: skip
    parser.add_argument(
        "--num-images",
        metavar="N",
        help=f"images in all, dealt out to the labels in turn (sample: {IMAGES_PER_LABEL} of each label; else one of "
        "each, as many as fit in a picture); with interpolate, the number of rows",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the images (0)")
    parser.add_argument("--seeds", type=two_seeds, metavar="A,B", help="interpolate between these two seeds")
    parser.add_argument("--out", type=out_folder, default="samples", metavar="DIR", help="folder of images (samples)")
    parser.add_argument(
        "--gif",
        action="store_true",
        help="mode sample: also an animation, the noisy images beside those that the network expects",
    )
    parser.add_argument(
        "--weights",
        default="ema",
        help="ema: the average that was validated; model: as trained; or another average of the checkpoint, such as "
        "ema-power0_1 (model and others: from a run's folder or a training-state artifact)",
    )
    guide = parser.add_mutually_exclusive_group()
    guide.add_argument(
        "--guide-artifact", metavar="NAME:ALIAS", help="guide away from this weaker model (autoguidance)"
    )
    guide.add_argument("--guide-checkpoint", type=Path, metavar="PATH", help="the same, from disk: pruned, or early")
    parser.add_argument("--upsample", nargs="+", default=[], metavar="MODEL", help="enlarge the images by these "
                        "models in turn: run folders, checkpoints, or artifacts (NAME:ALIAS)")  # fmt: skip
    parser.add_argument("--low", type=Path, metavar="DIR", help="folder of small images that the model upsamples")
    parser.add_argument("--data-path", metavar="DIR", help="folder of the data set whose held-out images it upsamples")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("auto", "fp32", "tf32", "bf16", "fp16"), default="auto")
    add_sampling_flags(parser)
    add_plugins_flag(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 if something asked for cannot be had."""
    arguments = parse_arguments(argv)
    try:
        task = prepare(arguments)
        if arguments.mode == "sample":
            sample(task, arguments.gif)
        elif arguments.mode == "interpolate":
            interpolate(task, arguments.seeds)
        else:
            show_steps(task, arguments.mode)
    except (CheckpointError, ConfigError, DataError, ExtractorError) as error:
        return fail(str(error))
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from here ({arguments.out})", file=sys.stderr)
        return 130
    return 0


@dataclass(frozen=True)
class SamplingTask:
    """The checked arguments of a call.

    Attributes:
        checkpoints: the models: the first one, those that upsample its images, the guide.
        notes: what is printed of them.
        config: how the last model of the chain is sampled.
        generator: that model.
        labels: classes of the images.
        wanted: the images to sample.
        folder: where images are written.
        processes: all processes.
    """

    checkpoints: Sequence[Checkpoint]
    notes: Sequence[str]
    config: CoreConfig
    generator: Generator
    labels: list[int]
    wanted: list[Request]
    folder: Path
    processes: PartialState

    def names(self, labels: Sequence[int]) -> list[str]:
        """The class names of labels, for the rows of a picture."""
        known = dict(enumerate(self.checkpoints[0].class_names)) | {NO_LABEL: ""}
        return [known.get(label, str(label)) for label in labels]

    def announce(self) -> None:
        """Print which checkpoints are sampled, and whether a student is not sampled as it was distilled for."""
        announce(*self.checkpoints)
        if self.processes.is_main_process:
            for note in self.notes:
                print(note, file=sys.stderr)


def prepare(arguments: argparse.Namespace) -> SamplingTask:
    """Check everything, and load the model, before anything is written.

    Raises:
        CheckpointError: if a model cannot be had.
        ConfigError: if something that was asked for cannot be done.
    """
    if arguments.seeds is not None and arguments.mode != "interpolate":
        given = ",".join(map(str, arguments.seeds))
        raise ConfigError(f"--seeds = {given!r}: only for --mode interpolate; --seed is that of other modes")
    with launch_errors():
        processes = PartialState(cpu=arguments.device == "cpu")
    with first_process_first(processes):
        source = open_source(arguments.checkpoint, arguments.artifact, "--", arguments.which)
        weaker = open_source(arguments.guide_checkpoint, arguments.guide_artifact, "--guide-")
        stages = [open_stage(name, arguments.which) for name in arguments.upsample]
    assert source is not None
    checkpoint, guide = source.checkpoint, weaker.checkpoint if weaker else None
    check_chain(checkpoint, stages)
    hardware = {"train.device": arguments.device, "train.precision": arguments.precision, "seed": arguments.seed}
    lifted, knobs = FREE_OF_LABELS if guide else {}, sampling_knobs(arguments)
    low_noise = {LOW_NOISE: knobs[LOW_NOISE]} if LOW_NOISE in knobs else {}
    upsamples = checkpoint.config().upsample.wanted
    if stages and not upsamples:
        knobs.pop(LOW_NOISE, None)  # It is meant for the models after this one.
    data = {"data.path": arguments.data_path} if arguments.data_path and upsamples else {}
    config = build(CoreConfig, flatten(checkpoint.config()), lifted, knobs, data, hardware)
    pick_device(config.train)
    labels = pick_labels(arguments.labels, checkpoint)
    if arguments.mode == "interpolate" and (arguments.low or arguments.upsample):
        raise ConfigError("--mode = 'interpolate': not with --low or --upsample; expected another mode")
    if arguments.mode == "interpolate" and arguments.seeds is None and len(labels) != 2:
        raise ConfigError(f"--labels: interpolate needs two labels, or --seeds A,B; got {len(labels)} labels")
    lows: Lows | None = small_images(checkpoint, config, {"--low": arguments.low, "--data-path": arguments.data_path})
    reference = load_generator(guide, config, "ema", processes, lows=lows) if guide else None
    generator = load_generator(checkpoint, config, arguments.weights, processes, reference, lows)
    size = (stages or [checkpoint])[-1].shape_CHW[1]
    most = None if arguments.mode == "sample" else media.most_rows(size)
    wanted = pick_images(arguments, labels, lows, most)
    described = settings(arguments.mode, checkpoint, guide, config, arguments.weights, generator.precision)
    described |= describe_lows(lows)
    notes = [student_note(checkpoint, config)]
    for stage in stages:
        lows = images_of(generator, config.sample, config.seed)
        config = build(CoreConfig, flatten(stage.config()), low_noise, hardware)
        generator = load_generator(stage, config, "ema", processes, lows=lows)
        stored = settings(arguments.mode, stage, None, config, "ema", generator.precision)
        described.setdefault("stages", []).append(stored)
        notes.append(student_note(stage, config))
    with first_process_first(processes):
        check_folder(arguments.out, described)
    checkpoints = [checkpoint, *stages, *([guide] if guide else [])]
    said = [note for note in notes if note]
    return SamplingTask(checkpoints, said, config, generator, labels, wanted, arguments.out, processes)


def open_stage(name: str, which: str) -> Checkpoint:
    """Return a model of ``--upsample``: a path if there is one, or else an artifact."""
    if not Path(name).exists() and ":" in name:
        model = download_model(name, "--upsample", "a path", which)
        return choose(model.path, name=model.name)
    try:
        return choose(Path(name), which)
    except CheckpointError as error:
        raise CheckpointError(f"--upsample = {error}") from None


def describe_lows(lows: Lows | None) -> dict[str, str]:
    """Return which small images are upsampled, for the settings of a folder."""
    return {"lows": lows.sha256} if isinstance(lows, FolderLows | HeldOut) else {}


def pick_images(
    arguments: argparse.Namespace, labels: Sequence[int], lows: Lows | None, most: int | None
) -> list[Request]:
    """Return the images to sample: of a folder of small images all, or those of the labels; else labels take turns."""
    if isinstance(lows, FolderLows):
        everything = arguments.labels == "all"
        found = [image for image in lows.requests if everything or image.label in labels]
        if not found:
            raise ConfigError(f"--labels = {arguments.labels!r}: no image of --low has such a label")
        return found[: pick_count(arguments.num_images, len(found), most)]
    between = arguments.mode == "interpolate" and arguments.seeds is None
    default = 1 if between else len(labels) * (IMAGES_PER_LABEL if arguments.mode == "sample" else 1)
    return round_robin(labels, range(pick_count(arguments.num_images, default, most)))


def load_generator(
    checkpoint: Checkpoint,
    config: CoreConfig,
    weights: str,
    processes: PartialState,
    reference: Generator | None = None,
    lows: Lows | None = None,
) -> Generator:
    """A checkpoint's model on this process's device.

    Raises:
        CheckpointError: if the checkpoint does not hold such weights, or the reference makes other images.
    """
    check_weights(checkpoint, weights)
    own = checkpoint.config()
    noise = {LOW_NOISE: config.upsample.sample_noise} if own.upsample.wanted and config.upsample.wanted else {}
    own = build(CoreConfig, flatten(own), noise, {"train.precision": config.train.precision})
    network = checkpoint.network(weights).to(processes.device)
    if reference is not None:
        check_guide(reference, network, config)
    return Generator(network, own, pick_precision(config.train, processes.device), reference, lows)


def sample(task: SamplingTask, gif: bool) -> None:
    """Single images and a grid; images that are there from an earlier, equal call are kept."""
    task.announce()
    wanted = task.wanted
    missing = [request for request in wanted if not is_whole_png(task.folder / file_name(request))]
    task.processes.wait_for_everyone()  # All have seen the same folder before anyone writes.
    own = missing[task.processes.process_index :: task.processes.num_processes]
    progress = task.processes.is_main_process
    for batch, images in task.generator.batches(own, task.config.sample, task.config.seed, progress=progress):
        for request, pixels_CHW in zip(batch, images, strict=True):
            save_png(pixels_CHW, task.folder / file_name(request))
    task.processes.wait_for_everyone()
    if not task.processes.is_main_process:
        return
    by_label: dict[int, list[Request]] = {}
    for request in wanted:
        by_label.setdefault(request.label, []).append(request)
    rows = list(by_label)[: min(GRID_ROWS, media.most_rows(task.generator.shape_CHW[1]))]
    columns = min(GRID_COLUMNS, *(len(by_label[label]) for label in rows))
    tiles = [read_png(task.folder / file_name(image)) for label in rows for image in by_label[label][:columns]]
    media.grid(torch.stack(tiles), columns, task.names(rows)).save(task.folder / "grid.png")
    if gif:
        columns = min(media.GIF_COLUMNS, columns)
        shown = [image for label in rows[: media.GIF_ROWS] for image in by_label[label][:columns]]
        keep = media.spread(task.config.sample.steps)
        noisy, expected = task.generator.trajectories(shown, task.config.sample, task.config.seed, keep)
        names = task.names(rows[: media.GIF_ROWS])
        media.save_gif(media.animation(noisy, expected, columns, names), task.folder / "diffusion.gif")
    print(f"{len(wanted)} images ({len(missing)} new), grid.png{' and diffusion.gif' if gif else ''} in {task.folder}/")


def show_steps(task: SamplingTask, mode: str) -> None:
    """How images come about: a strip with a row an image, and an animation."""
    if not task.processes.is_main_process:
        return
    task.announce()
    wanted = task.wanted
    keep = media.spread(task.config.sample.steps)
    frames = task.generator.trajectory(wanted, task.config.sample, task.config.seed, keep, clean=mode == "progressive")
    chosen = [frames[i] for i in sorted(media.spread(len(frames), STRIP_COLUMNS))]
    names = task.names([request.label for request in wanted])
    strip = torch.stack(chosen, dim=1).flatten(0, 1)
    media.grid(strip, len(chosen), names).save(task.folder / f"{mode}.png")
    media.save_gif([media.grid(frame, 1, names) for frame in frames], task.folder / f"{mode}.gif")
    print(f"{mode}.png and {mode}.gif in {task.folder}/")


def interpolate(task: SamplingTask, ends: tuple[int, int] | None) -> None:
    """From one label or seed to another: a strip with a row an image, and an animation there and back."""
    if not task.processes.is_main_process:
        return
    task.announce()
    weights, sample = torch.linspace(0.0, 1.0, STRIP_COLUMNS).tolist(), task.config.sample
    if ends is not None:
        rows = [between_seeds(task.generator, request, sample, ends, weights) for request in task.wanted]
        names = task.names([request.label for request in task.wanted])
    else:
        first, second = task.labels
        rows = [
            between_labels(task.generator, index, sample, task.config.seed, (first, second), weights)
            for index in range(len(task.wanted))
        ]
        names = [" to ".join(task.names(task.labels))] * len(rows)
    media.grid(torch.cat(rows), len(weights), names).save(task.folder / "interpolate.png")
    frames = [media.grid(torch.stack(frame), 1, names) for frame in zip(*rows, strict=True)]
    media.save_gif([*frames, *frames[-2::-1]], task.folder / "interpolate.gif")
    print(f"interpolate.png and interpolate.gif in {task.folder}/")


if __name__ == "__main__":
    run_and_leave(main, interruptible=True)
