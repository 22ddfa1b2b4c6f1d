"""Remove channels from a model until the share that you name is left, and save the smaller model as a checkpoint.

  python scripts/prune.py --checkpoint runs/ID --target macs=0.56 --out pruned
  python scripts/prune.py --artifact model-ID:best --importance taylor --target params=0.5 --out pruned --upload
  python scripts/prune.py --checkpoint runs/ID --importance diff_pruning --target latency=0.7 --out pruned --json
  python scripts/prune.py --preset cifar10 --model.class_conditional=false --target macs=0.56 --out pruned
  python scripts/prune.py --checkpoint runs/ID --target latency=0.3 --prune.depth=0.5 --out pruned    # blocks as well
  python scripts/prune.py --checkpoint runs/ID --target macs=0.5 --sensitivity --out shares     # which block keeps what

The checkpoint can be sampled, evaluated, pruned again, and trained on:
  python scripts/train_cifar.py --init.checkpoint=pruned --train.steps=50000

Any knob may follow, such as --prune.scope=global, --prune.round_to=8, --prune.iterations=5, --prune.block_keep=...,
--prune.calibration_batches=20, --seed=1, --data.path=DIR, --train.device=cpu (python -m agent --help lists them).
"""

from __future__ import annotations

if __name__ == "__main__":
    from diffusion_core.signals import leave_at_once

    leave_at_once()  # Until main handles signals: the imports take seconds.

import argparse
import json
import secrets
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from agent.command import fail, run_and_leave
from agent.config import TrialConfig, build_config
from agent.tracking.artifacts import open_source
from agent.tracking.environment import has_key, load_environment
from agent.tracking.run import start_wandb
from agent.tracking.tracker import WandbTracker
from diffusion_core.checkpoint import CheckpointError, list_checkpoints, write_checkpoint
from diffusion_core.choice import add_which_flag, announce
from diffusion_core.config import ConfigError, flatten, list_knobs, split_argv
from diffusion_core.config.knobs import MOST_IMAGES
from diffusion_core.config.plugins import add_plugins_flag
from diffusion_core.data.announcement import announce_data
from diffusion_core.data.datasets import DataError, load_data
from diffusion_core.data.fingerprint import RECORDED
from diffusion_core.evaluation.consistency import consistency_of_models
from diffusion_core.hardware import pick_device, pick_precision
from diffusion_core.messages import Parser, nonempty, out_folder, positive
from diffusion_core.model.cost import LATENCY_BATCH, measured_costs
from diffusion_core.model.unet import build_network
from diffusion_core.registries import DATASETS
from diffusion_core.run_folder import make_folder
from diffusion_core.runs.recorded import model_files
from diffusion_core.sampling.generation import Generator
from diffusion_core.sampling.lows import HeldOut, held_out
from diffusion_core.tables import text_table
from diffusion_core.tracking import MODEL, Upload
from diffusion_core.training.checkpoints import describe
from diffusion_core.training.trainer import TrainState
from pruning.calibration import Calibration
from pruning.channels.sensitivity import describe_sensitivity, study_sensitivity
from pruning.config import PruneConfig, unheard
from pruning.consistency import keep_dense_images
from pruning.pruner import prune_state
from pruning.registries import IMPORTANCES
from pruning.start import Source, refuse_student, start_from

TARGETS = get_args(PruneConfig.model_fields["target"].annotation)
NOT_TAKEN_OVER = ("prune.", "init.", "distill.", "log.", "train.device")
"""Knobs of the run that a checkpoint comes from which say nothing of its model."""
NUM_IMAGES = 16
"""Images of the dense and of the pruned model that are compared, unless another number is asked for."""


@dataclass(frozen=True)
class PruningTask:
    """The checked arguments of a call."""

    config: TrialConfig
    source: Source | None
    out: Path
    upload: bool
    num_images: int


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="PATH", help="a checkpoint, or a run's folder")
    add_which_flag(parser, "a run's folder, or version of an artifact without alias")
    source.add_argument("--artifact", metavar="NAME:ALIAS", help="a `model` artifact on W&B, such as model-abc123:best")
    source.add_argument("--preset", type=nonempty, metavar="NAME", help="an untrained model: cifar10, mnist, ...")
    parser.add_argument(
        "--importance",
        metavar="NAME",
        default="l2",
        help=f"which channels are weak: {', '.join(IMPORTANCES)} (l2); those between l2 and reinit measure gradients "
        "on training images; reinit takes what l2 leaves and draws its weights anew",
    )
    parser.add_argument(
        "--target",
        metavar="WHAT=SHARE",
        required=True,
        help=f"what is to stay: {', '.join(TARGETS)} (time of a forward pass of {LATENCY_BATCH} images), and how much "
        "of it, above 0 and below 1; hit within 2%% where the widths allow",
    )
    parser.add_argument("--out", type=out_folder, required=True, metavar="DIR", help="folder of the new checkpoint")
    parser.add_argument(
        "--sensitivity",
        action="store_true",
        help="prune nothing: measure the loss when each block alone is narrowed, propose prune.block_keep for --target "
        "and write sensitivity.json and sensitivity.png",
    )
    parser.add_argument(
        "--batch", type=positive, default=LATENCY_BATCH, metavar="N", help=f"batch to time ({LATENCY_BATCH})"
    )
    parser.add_argument(
        "--num-images",
        type=int,
        metavar="N",
        help=f"images of each model, from the same seeds and labels, to say how alike they are ({NUM_IMAGES}; 0: none)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object: before, after, consistency")
    parser.add_argument("--upload", action="store_true", help="log the model to W&B, as a child of --artifact")
    add_plugins_flag(parser)
    return parser.parse_known_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 if what was asked for cannot be had; then nothing is written."""
    arguments, words = parse_arguments(argv)
    load_environment()
    try:
        task = prepare(arguments, words)
        if arguments.sensitivity:
            return sensitivity(task, arguments.json)
        result = run(task, arguments.batch)
    except ConfigError as error:
        return fail(as_typed(error, arguments.target, words))
    except (CheckpointError, DataError) as error:
        return fail(str(error))
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    print(json.dumps(result, indent=1) if arguments.json else shown(result))
    return 0


def as_typed(error: ConfigError, target: str, words: Sequence[str]) -> str:
    """What is wrong, by the flags that were typed; the knobs behind them say what is allowed."""
    flags = {"prune.keep": f"--target {target.partition('=')[0]}", "prune.importance": "--importance"}
    typed = {word.partition("=")[0].removeprefix("--") for word in words}
    problems = []
    for problem in error.problems:
        key, equals, rest = problem.partition(" = ")
        problems.append(f"{key if key in typed else flags.get(key, key)}{equals}{rest}")
    return "; ".join(problems)


def prepare(arguments: argparse.Namespace, words: Sequence[str]) -> PruningTask:
    """Check everything before anything is computed.

    Raises:
        ConfigError: if something that was asked for cannot be done.
        CheckpointError: if the model cannot be had.
    """
    num_images = arguments.num_images
    if num_images is not None and not 0 <= num_images <= MOST_IMAGES:
        raise ConfigError(f"--num-images = {num_images}: expected an integer >= 0 and <= {MOST_IMAGES:,}")
    if num_images and arguments.preset:
        raise ConfigError(
            f"--num-images = {num_images}: images of an untrained model say nothing; leave it out, or prune a "
            f"--checkpoint"
        )
    if num_images is None:
        num_images = 0 if arguments.preset else NUM_IMAGES
    what, equals, share = arguments.target.partition("=")
    if what == "latency" and arguments.batch != LATENCY_BATCH:
        raise ConfigError(
            f"--batch = {arguments.batch}: --target latency is that of {LATENCY_BATCH} images; leave it out"
        )
    if what not in TARGETS or not equals:
        raise ConfigError(
            f"--target = {arguments.target!r}: expected one of {', '.join(TARGETS)}, and the share of it that is to "
            f"stay, such as macs=0.56"
        )
    if arguments.sensitivity and (arguments.upload or arguments.num_images is not None):
        raise ConfigError("--sensitivity: prunes nothing; leave out --upload and --num-images")
    if list_checkpoints(arguments.out):
        raise ConfigError(f"--out = {str(arguments.out)!r}: holds a checkpoint already; choose another folder")
    if arguments.upload and not has_key():
        raise ConfigError("--upload: no W&B API key; set WANDB_API_KEY (see .env.example), or run `wandb login`")
    asked = {"prune.method": "structured", "prune.importance": arguments.importance}
    asked |= {"prune.target": what, "prune.keep": share}
    source = open_source(arguments.checkpoint, arguments.artifact, "--", arguments.which)
    stored: dict[str, Any] = {"preset": arguments.preset} if arguments.preset else {}
    if source is not None:
        refuse_student(source)
        known = {key for key, _ in list_knobs(TrialConfig)}
        stored = {
            key: value
            for key, value in source.checkpoint.metadata["config"].items()
            if key in known and not key.startswith(NOT_TAKEN_OVER)
        }
    config = build_config(stored, asked, split_argv(list(words)))
    if (method := config.prune.method) != "structured":
        raise ConfigError(f"prune.method = {method!r}: expected structured; masks: python -m agent --prune.method=NAME")
    if arguments.sensitivity:
        if config.prune.block_keep or config.prune.depth != 0.0 or config.prune.widths != "free":
            raise ConfigError(
                "--sensitivity: proposes prune.block_keep for channels of free widths; drop prune.block_keep, "
                "prune.depth and prune.widths"
            )
    elif problems := list(unheard(config.prune)):
        raise ConfigError(*problems)
    return PruningTask(config, source, arguments.out, arguments.upload, num_images)


@dataclass(frozen=True)
class Loaded:
    """What is pruned: the state of the model, its class names, training and small images if they are needed."""

    state: TrainState
    class_names: Sequence[str]
    calibration: Calibration | None
    lows: HeldOut | None


def load(job: PruningTask, needs_images: bool) -> Loaded:
    """Load or build the model, and the images if they are needed."""
    config, device = job.config, pick_device(job.config.train)
    recorded = job.source.checkpoint.class_names if job.source else ()
    dataset = None
    if needs_images:
        dataset = load_data(config.data, progress=config.log.progress, recorded=recorded)
        announce_data(config.data, dataset)
    if job.source is None:
        num_classes = dataset.num_classes if dataset else DATASETS[config.data.name].num_classes or 0
        class_names = dataset.class_names if dataset else [str(label) for label in range(num_classes)]
        state = TrainState.start(build_network(config, num_classes).to(device), config.train, config.ema)
    else:
        checkpoint = job.source.checkpoint
        class_names = checkpoint.class_names
        state = start_from(job.source, config, len(class_names), "ema", device)
        state.step = checkpoint.step
        announce(checkpoint)
    if dataset is None:
        return Loaded(state, class_names, None, None)
    calibration = Calibration.of(dataset.train, config, device, config.log.progress)
    return Loaded(state, class_names, calibration, held_out(dataset, config.upsample))


def sensitivity(job: PruningTask, as_json: bool) -> int:
    """Measure, propose and write the sensitivity of each block; returns the exit status."""
    loaded, prune = load(job, needs_images=True), job.config.prune
    assert loaded.calibration is not None
    make_folder(job.out)
    result = study_sensitivity(loaded.state.network.eval(), prune, job.config.seed, loaded.calibration, job.out)
    print(json.dumps(result, indent=1) if as_json else describe_sensitivity(result))
    return 0


def run(job: PruningTask, batch: int) -> dict[str, Any]:
    """Prune, measure, and write the checkpoint; returns what came of it, as plain JSON."""
    config, device = job.config, pick_device(job.config.train)
    loaded = load(job, config.prune.needs_images or bool(config.upsample.wanted and job.num_images))
    state, class_names = loaded.state, loaded.class_names
    dense = state.network
    report = prune_state(state, config, config.prune, loaded.calibration)
    alike = None
    if job.num_images:
        lows, precision = loaded.lows, pick_precision(config.train, device)
        keep_dense_images(state, dense.eval(), config, lows)
        one, two = (Generator(network.eval(), config, precision, lows=lows) for network in (dense, state.network))
        alike = consistency_of_models(
            one, two, job.num_images, config.sample, config.seed, progress=config.log.progress
        )
    before, after = measured_costs({dense: report.before, state.network: report.after}, batch)
    result = {
        "method": report.method,
        "importance": config.prune.importance,
        "target": config.prune.target,
        "keep": config.prune.keep,
        "kept": after[config.prune.target] / before[config.prune.target],
        "before": before,
        "after": after,
        "consistency": asdict(alike) if alike else None,
        "blocks": report.details["blocks"],
    }
    same_seeds = alike.figures("prune") if alike else {}
    figures = {f"pruned/{name}": value for name, value in after.items()} | same_seeds
    images = {RECORDED: job.source.checkpoint.metadata.get(RECORDED) if job.source else None}
    metadata = describe(state, config, class_names) | images | {"figures": figures}
    written = write_checkpoint(job.out, state.step, metadata, state.parts())
    result["checkpoint"] = str(written.path)
    result["parent"] = job.source.parent() if job.source else None
    if job.upload:
        run_id = secrets.token_hex(4)
        folder = Path("runs") / run_id
        make_folder(folder)
        tracker = WandbTracker(start_wandb(run_id, folder, flatten(config), "online", or_offline=False))
        if job.source and job.source.artifact:
            tracker.use(job.source.artifact)
        tracker.summary({f"model/{name}": value for name, value in after.items()} | same_seeds)
        described = {key: result[key] for key in ("importance", "target", "keep", "kept", "parent")}
        described |= {"step": written.step, "figures": figures}
        tracker.artifact(Upload(f"model-{run_id}", MODEL, model_files(written), ["latest", "pruned"], described))
        if left := tracker.close(0):
            raise ConfigError(f"--upload: {', '.join(left)}: not arrived; the checkpoint is in {str(job.out)!r}")
        result["artifact"] = f"model-{run_id}:pruned"
    return result


def shown(result: dict[str, Any]) -> str:
    """Return the result as a table and notes."""
    before, after = result["before"], result["after"]
    rows = []
    for name in (key for key in before if key != "latency_batch"):
        cells = [f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" for value in (before[name], after[name])]
        label = {"latency": f"ms for {before['latency_batch']} images", "latency_single": "ms for one image"}.get(name)
        rows.append([label or name.replace("_", " "), *cells, f"{after[name] / before[name]:.1%}"])
    lines = [text_table(["", "before", "after", "remains"], rows, right=True)]
    if result["blocks"]:
        lines.append(f"removed blocks: {', '.join(result['blocks'])}")
    if alike := result["consistency"]:
        lines.append(
            f"images before and after: SSIM {alike['ssim']:.4f}, mean squared difference {alike['mse']:.4f} "
            f"({alike['num_images']} images, seed {alike['seed']})"
        )
    lines.append(f"checkpoint: {result['checkpoint']}")
    if "artifact" in result:
        lines.append(f"artifact: {result['artifact']}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_and_leave(main, interruptible=True)
