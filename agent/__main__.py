"""``python -m agent``: one trial, from the command line or from ``wandb agent``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from agent.config import TrialConfig, config_from_words
from diffusion_core.config_io import ConfigError, flatten, help_text, split_argv, to_yaml

USAGE = """\
usage: python -m agent [--config FILE.yaml] [--key=value ...] [--print-config | --dry-run]

Trains one class-conditional diffusion model, prunes it if asked to, and logs losses, sample grids, a GIF, figures and
checkpoints to Weights & Biases (offline where there is no API key). This is what a sweep runs for each trial.

  python -m agent --preset=digits                        built-in real digits, half a minute on two cores
  python -m agent --preset=cifar10 --train.steps=100000  CIFAR-10, downloaded once
  python -m agent --data.name=folder --data.path=DIR     your own images, one sub-folder a class
  python -m agent --log.dir=runs/abc ...                 continue the run in that folder

  --config FILE.yaml   values from a file (keys dotted or nested); the command line overrides them
  --print-config       print all values as YAML, which --config reads, and stop
  --dry-run            check everything, print the size and cost of the model, and stop
  --help               this text

Every knob, its default, what it does, and [what it accepts]:"""


def fail(message: str) -> int:
    """One line for the user on stderr; the exit status of unusable input."""
    print(f"error: {message}", file=sys.stderr)
    return 2


def main(argv: Sequence[str] | None = None, usage: str = USAGE, defaults: Sequence[str] = ()) -> int:
    """Run one trial; returns the exit status.

    Args:
        argv: command-line words; None takes this process's.
        usage: what --help prints above the knobs.
        defaults: words that come before ``argv`` and are overridden by it.
    """
    words = [*defaults, *(sys.argv[1:] if argv is None else argv)]
    if "--help" in words or "-h" in words:
        print(usage)
        print(help_text(TrialConfig))
        return 0
    try:
        values = split_argv([word for word in words if word not in ("--print-config", "--dry-run")])
        config = config_from_words(values)
    except ConfigError as error:
        return fail(str(error))
    if "--print-config" in words:
        print(to_yaml(config), end="")
        return 0
    if "--dry-run" in words:
        return dry_run(config)
    return run(config)


def dry_run(config: TrialConfig) -> int:
    """Print what would be trained, without reading data or starting a run."""
    from diffusion_core.unet import build_network
    from pruning.cost import count_cost

    channels, size, _ = config.data.image_shape
    # The number of classes of a folder is known once it is read; it moves the count by an embedding row each.
    network = build_network(config, CLASSES.get(config.data.name, 10))
    cost = count_cost(network)
    checkpoint_bytes = 4 * 4 * cost.params
    print(to_yaml(config), end="")
    print(f"# model: {cost.params:,} parameters, {cost.macs:,} MACs an image of {channels} x {size} x {size}")
    print(f"# checkpoint: about {checkpoint_bytes / 1e6:,.0f} MB, {config.checkpoint.keep} kept and the best one")
    return 0


CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "mnist": 10, "fashion_mnist": 10}


def run(config: TrialConfig) -> int:
    """Run a trial with W&B, from data to the last artifact."""
    from accelerate.utils import broadcast_object_list

    from agent.preemption import Preempted, StopRequest
    from agent.run_folder import SAMPLES, find_run, make_folder
    from agent.settings import load_environment, start_wandb, wandb_mode
    from agent.trial import make_accelerator, run_trial
    from diffusion_core.checkpoint import CheckpointError
    from diffusion_core.data import DataError, load_data
    from diffusion_core.tracking import NullTracker, Tracker, WandbTracker
    from diffusion_core.trainer import TrainingDiverged

    load_environment()
    tracker: Tracker = NullTracker()
    stop = StopRequest()
    folder = None
    try:
        mode = wandb_mode()
        accelerator = make_accelerator(config)
        # All processes work in the first one's folder, and find the same checkpoint there.
        run_id, folder = broadcast_object_list([*find_run(config.log.dir)])
        config = config.model_copy(update={"log": config.log.model_copy(update={"dir": str(folder)})})
        with accelerator.main_process_first():  # The first process downloads, the others read.
            dataset = load_data(config.data, progress=config.log.progress and accelerator.is_main_process)
        if accelerator.is_main_process:
            make_folder(folder)
        if accelerator.is_main_process and mode != "disabled":
            wandb_run = start_wandb(run_id, folder, flatten(config), mode)
            tracker = WandbTracker(wandb_run)
            stop.on_request = wandb_run.mark_preempting
        with stop.listening():
            result = run_trial(
                config, tracker, dataset=dataset, folder=folder, run_id=run_id, stop=stop, accelerator=accelerator
            )
    except (ConfigError, DataError) as error:
        tracker.close(2)
        return fail(str(error))
    except (CheckpointError, TrainingDiverged) as error:
        tracker.close(1)
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Preempted as preempted:
        tracker.close(preempted.exit_code)
        print(f"{preempted}; continue with the same command and --log.dir={folder}", file=sys.stderr)
        return preempted.exit_code
    except KeyboardInterrupt:  # The second signal: whoever sent it does not want to wait for a checkpoint.
        tracker.close(130)
        print(f"interrupted; continue from the last checkpoint with --log.dir={folder}", file=sys.stderr)
        return 130
    except BaseException:
        tracker.close(1)
        raise
    if accelerator.is_main_process:
        shown = {key: value for key, value in result.figures.items() if key.startswith(("val/", "eval/", "prune/"))}
        print(f"finished {run_id} at step {result.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in shown.items()))
        print(f"best checkpoint: {result.best_checkpoint}; pictures: {folder / SAMPLES}")
    tracker.close(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
