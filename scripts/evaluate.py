"""Evaluate a model or a set of images: print figures as a table, and write them as JSON and to W&B.

  python scripts/evaluate.py --checkpoint runs/ID --num-images 5000           a model, against its training images
  python scripts/evaluate.py --artifact model-ID:best --wandb                 a model on W&B; figures go there too
  python scripts/evaluate.py --sweep runs/sweeps/quickstart                   the best trial of an offline sweep
  python scripts/evaluate.py samples --data digits                            a folder of images, against a data set
  python scripts/evaluate.py PATH1 PATH2                                      two folders, or .npz statistics: FID
  python scripts/evaluate.py --save-stats FOLDER STATISTICS.npz               statistics, in pytorch-fid's format
  python scripts/evaluate.py --checkpoint runs/A --against runs/B             two models, image by image
  accelerate launch --num_processes 8 scripts/evaluate.py --checkpoint runs/ID --num-images 50000

FID needs pytorch-fid's Inception weights, which are downloaded once; or give --inception-weights FILE. With fewer than
2,048 images, no figure is called FID. In other feature spaces (--extractor classifier, or a file), names of figures
contain the name of the space.
"""

from __future__ import annotations

if __name__ == "__main__":
    from diffusion_core.signals import leave_at_once

    leave_at_once()  # Until main handles signals: the imports take seconds.

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState

from agent.command import fail, run_and_leave
from agent.tracking.artifacts import open_source
from agent.tracking.registry import publish
from diffusion_core.checkpoint import Checkpoint
from diffusion_core.choice import add_which_flag, announce, best_of_sweep, choose
from diffusion_core.config import ConfigError, CoreConfig, DataConfig, EvalConfig, build, flatten
from diffusion_core.config.checks import leaking_problems
from diffusion_core.config.knobs import MOST_IMAGES
from diffusion_core.config.metrics import INCEPTION
from diffusion_core.config.plugins import add_plugins_flag
from diffusion_core.data.announcement import announce_data
from diffusion_core.data.datasets import Dataset, load_data
from diffusion_core.data.fingerprint import say_others
from diffusion_core.distributed import first_process_first, own_positions
from diffusion_core.evaluation.baseline import bilinear_judgement
from diffusion_core.evaluation.consistency import consistency_of_models, sampled_alike
from diffusion_core.evaluation.extractors.find import agreed_extractor
from diffusion_core.evaluation.features import Extractor, ExtractorError, with_channels
from diffusion_core.evaluation.folders import (
    announce_folder,
    check_paths,
    compare_paths,
    image_folder,
    is_statistics,
    save_statistics,
)
from diffusion_core.evaluation.generated import costs_of_images, estimate_seconds, generated
from diffusion_core.evaluation.measure import LABELS, check_enough, check_figures
from diffusion_core.evaluation.protocol import protocol, sampling_protocol
from diffusion_core.evaluation.record import EVALUATION_FILE, check_place, merged, show, write
from diffusion_core.evaluation.suite import Judgement, Suite
from diffusion_core.hardware import pick_precision
from diffusion_core.machine.launch import launch_errors
from diffusion_core.messages import Parser, UserError, out_file, positive, seed
from diffusion_core.model.unet import NO_LABEL
from diffusion_core.registries import DATASETS, METRICS
from diffusion_core.sampling.autoguidance import FREE_OF_LABELS, check_guide
from diffusion_core.sampling.flags import add_sampling_flags, sampling_knobs, tell_students
from diffusion_core.sampling.generation import Generator, all_labels, round_robin
from diffusion_core.sampling.lows import held_out

NOTHING = "--figures = '': nothing to measure; name a figure"


def metrics_of_images() -> list[str]:
    """Return the figures that can be measured here."""
    return [name for name, record in METRICS.items() if record.of_images]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("path", type=Path, nargs="*", help="one or two folders of images, or .npz statistics")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--artifact", metavar="NAME:ALIAS", help="a `model` artifact on W&B, such as model-abc123:best")
    source.add_argument("--checkpoint", type=Path, metavar="PATH", help="a checkpoint, or a run's folder")
    source.add_argument("--sweep", type=Path, metavar="DIR", help="an offline sweep's folder: its best trial")
    add_which_flag(parser, "a run's folder or a sweep's best trial, or version of an artifact without alias")
    parser.add_argument("--against", type=Path, metavar="PATH", help="another model, to compare images with")
    parser.add_argument(
        "--guide-checkpoint", type=Path, metavar="PATH", help="guide away from this weaker model (autoguidance)"
    )
    known = [name for name, record in DATASETS.items() if record.path != "required"]
    parser.add_argument("--data", choices=known, metavar="NAME",
                        help="data set to compare a folder of images with")  # fmt: skip
    parser.add_argument("--data-path", metavar="DIR", help="folder of the data set's images (default: as configured)")
    parser.add_argument("--save-stats", action="store_true", help="write the statistics of PATH1 to PATH2 (.npz)")
    parser.add_argument("--num-images", type=positive, default=500, metavar="N", help="images to generate (500)")
    parser.add_argument("--seed", type=seed, default=1, help="seed of the images (1)")
    parser.add_argument("--figures", metavar="A,B,...", help=f"some of: {', '.join(metrics_of_images())} (default: "
                        "those in features that need no labels)")  # fmt: skip
    parser.add_argument("--extractor", action="append", metavar="WHAT", help="feature network: inception, classifier, "
                        "efficientnet-lite0, or a file (TorchScript, or a classifier); may be repeated")  # fmt: skip
    parser.add_argument("--inception-weights", metavar="FILE", help="Inception-v3 weights in pytorch-fid's format")
    parser.add_argument(
        "--reference", choices=("train", "val"), default="train", help="real images to compare with (train)"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=50, metavar="N", help="batch size for images of a folder (50)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=out_file, metavar="FILE", help="where figures and protocols go (default for a "
                        "model: evaluation.json beside the checkpoint; --against: none)")  # fmt: skip
    parser.add_argument("--wandb", action="store_true", help="write to the artifact's metadata and its run's summary")
    add_sampling_flags(parser)
    add_plugins_flag(parser)
    arguments = parser.parse_args(argv)
    if problem := problem_of(arguments):
        parser.error(problem)
    return arguments


def problem_of(arguments: argparse.Namespace) -> str | None:
    """Return the error in the arguments, or None."""
    is_model = bool(arguments.artifact or arguments.checkpoint or arguments.sweep)
    if is_model == bool(arguments.path) or len(arguments.path) > 2:
        return "PATH: expected one of --artifact, --checkpoint, --sweep, PATH, or PATH1 PATH2"
    if arguments.save_stats:
        if len(arguments.path) != 2 or is_statistics(arguments.path[0]):
            return "--save-stats: expected a folder of images and the file to write"
        try:
            out_file(two := str(arguments.path[1]))
        except argparse.ArgumentTypeError as error:
            return f"PATH2 = {error}"
        if arguments.path[1].exists():
            return f"PATH2 = {two!r}: exists already; choose another file for the statistics"
    if len(arguments.path) == 1 and not arguments.data:
        return f"PATH = {str(arguments.path[0])!r}: expected --data NAME, or a second PATH, to compare it to"
    if arguments.against and not is_model:
        return "--against: expected a first model, by --checkpoint, --artifact or --sweep"
    if arguments.guide_checkpoint and not is_model:
        return "--guide-checkpoint: expected a model to guide, by --checkpoint, --artifact or --sweep"
    if arguments.wandb and not arguments.artifact:
        return "--wandb: expected --artifact, whose metadata and run are updated"
    if arguments.num_images > MOST_IMAGES:
        return f"--num-images = {arguments.num_images}: expected an integer >= 1 and <= {MOST_IMAGES:,}"
    if len(arguments.path) == 2 and not (arguments.save_stats or wanted_figures(arguments)):
        return NOTHING
    for figure in wanted_figures(arguments):
        if figure not in metrics_of_images():
            return f"--figures = {figure!r}: expected some of {', '.join(metrics_of_images())}"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 0, or 2 for unusable input."""
    arguments = parse_arguments(argv)
    if arguments.device not in ("auto", "cpu", "cuda") and not arguments.device.startswith("cuda:"):
        return fail(f"--device = {arguments.device!r}: expected auto, cpu or cuda")
    try:
        with launch_errors():
            processes = PartialState(cpu=arguments.device == "cpu")
        if arguments.device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"--device = {arguments.device!r}: this machine has no usable GPU; expected auto or cpu")
        source = None
        if len(arguments.path) == 2:
            found = of_two_paths(arguments, processes)
        elif arguments.path:
            found = of_folder(arguments, processes)
        else:
            with first_process_first(processes):
                path = best_of_sweep(arguments.sweep) if arguments.sweep else arguments.checkpoint
                source = open_source(path, arguments.artifact, "--", arguments.which)
            assert source is not None
            if arguments.json is None and not arguments.against:
                check_place(source.checkpoint.path)
            found = of_model(arguments, source.checkpoint, processes)
        if processes.is_main_process and found is not None:
            report(found, arguments, source.checkpoint if source else None)
            if arguments.wandb and source and source.artifact:
                print(f"W&B: {publish(source.artifact, found.figures, found.protocols)}")
    except UserError as error:
        return fail(str(error))
    return 0


def report(found: Judgement, arguments: argparse.Namespace, checkpoint: Checkpoint | None) -> None:
    """Print figures, and write them: to --json, or among those of earlier evaluations of a checkpoint, if it is one."""
    show(found)
    step = None if checkpoint is None else checkpoint.step
    if arguments.json is not None:
        write(arguments.json, found, step)
    elif checkpoint is not None and not arguments.against:  # Which is no evaluation of one checkpoint.
        file = checkpoint.path / EVALUATION_FILE
        write(file, merged(file, found, checkpoint.step), step)


def wanted_figures(arguments: argparse.Namespace) -> list[str]:
    """Return the figures of --figures, or its default, of which only those are measured that can be."""
    if arguments.figures is None:
        return [name for name in metrics_of_images() if METRICS[name].in_features and not METRICS[name].labels]
    return [figure for figure in arguments.figures.split(",") if figure]


def of_two_paths(arguments: argparse.Namespace, processes: PartialState) -> Judgement | None:
    """Compare two sets of images, as pytorch-fid does; or write the statistics of one."""
    one, two = arguments.path
    figures = wanted_figures(arguments)
    if arguments.figures and not arguments.save_stats:
        check_paths(figures, one, two)
    for path in (one,) if arguments.save_stats else (one, two):
        if not is_statistics(path):
            # Errors are reported before long work starts.
            announce_folder(image_folder(path), shown=processes.is_main_process)
    if arguments.save_stats:
        (network,) = extractors_of(arguments, processes.device)
        save_statistics(one, two, network, arguments.batch_size, shown=processes.is_main_process)
        return None
    no_images = is_statistics(one) and is_statistics(two)
    extractors: list[Extractor | None] = [None] if no_images else [*extractors_of(arguments, processes.device)]
    return compare_paths(figures, one, two, extractors, arguments.batch_size)


def extractors_of(arguments: argparse.Namespace, device: torch.device) -> list[Extractor]:
    """Return the feature networks of --extractor, without a data set to train a classifier on."""
    wanted = arguments.extractor or [INCEPTION]
    if "classifier" in wanted:
        raise ExtractorError("--extractor = 'classifier': no data set to train it on; name a classifier's file")
    return [agreed_extractor(each, arguments.inception_weights, device) for each in wanted]


def suite_of(
    arguments: argparse.Namespace,
    data: DataConfig,
    dataset: Dataset,
    processes: PartialState,
    *,
    count: int,
    conditional: bool,
) -> Suite:
    """Return the evaluation for images of a data set, by default with Inception, or with a classifier for digits."""
    default = "classifier" if DATASETS[data.name].quick_classifier and not arguments.inception_weights else INCEPTION
    extractors = arguments.extractor or [default]
    settings = {
        "num_images": count,
        "figures": wanted_figures(arguments),
        "extractors": extractors,
        "reference": arguments.reference,
        "inception_weights": arguments.inception_weights,
    }
    if processes.is_main_process:
        announce_data(data, dataset)
    suite = Suite(
        data,
        build(EvalConfig, settings),
        dataset,
        with_classifier=conditional and "classifier" in extractors,
        device=processes.device,
        must_have=True,
    )
    if not suite.networks and not wanted_figures(arguments):
        raise ConfigError(NOTHING)
    return suite


def of_folder(arguments: argparse.Namespace, processes: PartialState) -> Judgement:
    """Compare a folder of images with a data set."""
    folder, figures = image_folder(arguments.path[0]), wanted_figures(arguments)
    check_figures(figures, repr(str(folder.path)), () if folder.labels else (LABELS,))
    announce_folder(folder, shown=processes.is_main_process)
    data = build(DataConfig, {"name": arguments.data, "path": arguments.data_path})
    dataset = load_data(data, progress=processes.is_main_process)
    folder = folder.labelled_for(data.name, dataset.num_classes, shown=processes.is_main_process)
    labels_N = torch.tensor(folder.labels or [NO_LABEL] * len(folder))
    check_figures(figures, repr(str(folder.path)), () if folder.labels else (LABELS,))
    check_enough(figures, labels_N, repr(str(folder.path)), dataset, arguments.reference)
    suite = suite_of(arguments, data, dataset, processes, count=len(folder), conditional=folder.labels is not None)
    channels, _, _ = suite.dataset.shape_CHW
    batches = (
        (with_channels(images_BCHW, channels), labels_B)
        for images_BCHW, labels_B in folder.batches(own_positions(len(folder)), arguments.batch_size)
    )
    return suite.judge(batches, len(folder), str(folder.path))


def of_model(arguments: argparse.Namespace, checkpoint: Checkpoint, processes: PartialState) -> Judgement:
    """Compare generated images of a model with its training images, or with another model's images."""
    more = {"data.path": arguments.data_path} if arguments.data_path else {}
    guide = choose(arguments.guide_checkpoint) if arguments.guide_checkpoint else None
    free = FREE_OF_LABELS if guide else {}
    config = build(CoreConfig, flatten(checkpoint.config()), free, sampling_knobs(arguments), more)
    precision = pick_precision(config.train, processes.device)
    network = checkpoint.network().to(processes.device)
    dataset = load_data(config.data, recorded=checkpoint.class_names) if config.upsample.wanted else None
    lows, reference = held_out(dataset, config.upsample) if dataset else None, None
    if guide:
        reference = Generator(guide.network().to(processes.device), guide.config(), precision, lows=lows)
        check_guide(reference, network, config)
    generator = Generator(network, config, precision, reference, lows)
    if arguments.against:
        return of_two_models(arguments, checkpoint, generator, choose(arguments.against), processes)
    measured = build(EvalConfig, {"figures": wanted_figures(arguments), "reference": arguments.reference})
    for problem in leaking_problems(config.upsample, measured, "--figures", "--reference"):
        raise ConfigError(problem)
    total, sample, conditional = arguments.num_images, config.sample, bool(checkpoint.metadata["num_classes"])
    check_figures(measured.figures, f"the model {str(checkpoint.path)!r}", () if conditional else (LABELS,))
    dataset = dataset or load_data(config.data, progress=processes.is_main_process, recorded=checkpoint.class_names)
    labels_N = torch.tensor([image.label for image in round_robin(all_labels(network), range(total))])
    check_enough(measured.figures, labels_N, f"--num-images = {total}", dataset, arguments.reference)
    suite = suite_of(arguments, config.data, dataset, processes, count=total, conditional=conditional)
    announce(checkpoint, *([guide] if guide else []))
    if processes.is_main_process:
        say_others(checkpoint.metadata, config.data.name, dataset, str(checkpoint.path))
        tell_students((checkpoint, config))
        seconds = estimate_seconds(generator, total, sample, suite.networks)
        print(f"{checkpoint.path}: {total:,} images, about {seconds:.0f} s", file=sys.stderr)
    started = time.perf_counter()
    batches = generated(generator, total, sample, arguments.seed, progress=processes.is_main_process)
    away = f", away from {guide.path}" if guide else ""
    images = sampling_protocol(sample, arguments.seed, config.upsample) + away
    found = suite.judge(batches, total, images)
    found.add({"eval/seconds_per_image": (time.perf_counter() - started) / total}, protocol(total, images))
    found.join(bilinear_judgement(suite, generator, total, sample))
    if guide is None:  # Which costs something else.
        found.add(costs_of_images(generator, sample), images)
    if suite.classifier is not None and processes.is_main_process:
        print(f"classifier: {suite.classifier.accuracy:.2%} accuracy on the real held-out images")
    return found


def of_two_models(
    arguments: argparse.Namespace, first: Checkpoint, one: Generator, other: Checkpoint, processes: PartialState
) -> Judgement:
    """Measure how similar the images of two models are, for equal seeds and labels."""
    config = sampled_alike(first, one.config, other, f"--against = {str(arguments.against)!r}")
    network = other.network().to(processes.device)
    two = Generator(network, config, pick_precision(config.train, processes.device), lows=one.lows)
    announce(first, other)
    if processes.is_main_process:
        tell_students((first, one.config), (other, config))
    total, sample = arguments.num_images, one.config.sample
    alike = consistency_of_models(one, two, total, sample, arguments.seed, progress=processes.is_main_process)
    figures = alike.figures("eval")
    line = protocol(total, sampling_protocol(sample, arguments.seed, one.config.upsample), None, str(other.path))
    return Judgement(figures, dict.fromkeys(figures, line))


if __name__ == "__main__":
    run_and_leave(main, interruptible=True)
