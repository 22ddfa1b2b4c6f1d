"""``python -m agent``: run one trial, from the command line or for ``wandb agent``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from agent.command import fail, run_and_leave
from agent.config import TrialConfig, config_from_words
from agent.tracking.environment import agent_parameters, in_sweep
from diffusion_core.config import ConfigError, flatten, help_text, split_argv, to_yaml
from diffusion_core.config.steps import without_effect
from diffusion_core.machine.threads import settle_threads
from pruning.config import unheard

USAGE = """\
usage: python -m agent [--config FILE.yaml] [--key=value ...] [--print-config | --dry-run]

Train one class-conditional diffusion model, prune it if a method is set, and log losses, sample grids, a GIF, figures
and checkpoints to Weights & Biases (offline if there is no API key). Sweeps run this command for each trial.

  python -m agent --preset=digits                        built-in real digits, half a minute on two cores
  python -m agent --preset=cifar10 --train.steps=100000  CIFAR-10, downloaded once
  python -m agent --data.name=folder --data.path=DIR     your own images, one sub-folder per class
  python -m agent --log.dir=runs/abc ...                 continue the run in that folder

  --config FILE.yaml   read values from a file (keys dotted or nested; several files: in order); the command line
                       overrides them
  --print-config       print all values as YAML, which --config reads, and stop
  --dry-run            check everything, print the size and cost of the model, and stop
  --help               print this text

All knobs, with default, purpose and [accepted values]:"""


def main(argv: Sequence[str] | None = None, usage: str = USAGE, defaults: Sequence[str] = ()) -> int:
    """Run one trial. Return the exit status.

    Args:
        argv: command-line words; None: those of this process.
        usage: text that --help prints above the knobs.
        defaults: words before ``argv``, which overrides them.
    """
    words = [*defaults, *(sys.argv[1:] if argv is None else argv)]
    threads = settle_threads()  # First of all: the registries of the configuration import PyTorch.
    if "--help" in words or "-h" in words:
        print(usage)
        print(help_text(TrialConfig))
        return 0
    try:
        values = split_argv([word for word in words if word not in ("--print-config", "--dry-run")])
        config = as_chosen(config_from_words(values), values)
        if not in_sweep() and (problems := [*unheard(config.prune), *without_effect(config.steps)]):
            raise ConfigError(*problems)
    except ConfigError as error:
        return fail(str(error))
    if "--print-config" in words:
        print(to_yaml(config), end="")
        return 0
    if "--dry-run" in words:
        return dry_run(config)
    from agent.session import run_session  # Slow to import, and not needed for the commands above.

    return run_session(config, threads)


def as_chosen(config: TrialConfig, values: Mapping[str, Any]) -> TrialConfig:
    """Return the configuration with the values that a W&B agent chose, which W&B records; print where they differ.

    A sweep's command may lose parameters: without a macro for them, or because a macro drops a value.

    Args:
        config: built from the command line.
        values: words of the command line.
    """
    chosen = agent_parameters()
    if not chosen:
        return config
    recorded = config_from_words({**values, **chosen})
    ran, wanted = flatten(config), flatten(recorded)
    for key, value in wanted.items():
        if value != ran[key]:
            print(f"{key} = {ran[key]!r} by the command: the sweep chose {value!r}, which is used", file=sys.stderr)
    return recorded


def dry_run(config: TrialConfig) -> int:
    """Print what a trial would train, without reading data or starting a run."""
    from diffusion_core.model.cost import count_cost
    from diffusion_core.model.unet import build_network
    from diffusion_core.registries import DATASETS

    channels, size, _ = config.data.image_shape
    # The number of classes in a folder is unknown before reading it. Each adds one row to an embedding.
    network = build_network(config, DATASETS[config.data.name].num_classes or 10)
    cost = count_cost(network)
    checkpoint_bytes = 4 * 4 * cost.params
    print(to_yaml(config, without_secrets=True), end="")
    print(f"# model: {cost.params:,} parameters, {cost.macs:,} MACs an image of {channels} x {size} x {size}")
    print(f"# checkpoint: about {checkpoint_bytes / 1e6:,.0f} MB, {config.checkpoint.keep} kept and the best one")
    return 0


if __name__ == "__main__":
    run_and_leave(main)
