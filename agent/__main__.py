"""``python -m agent``: run one trial, from the command line or for ``wandb agent``."""

from __future__ import annotations

if __name__ == "__main__":
    from diffusion_core.signals import remember_if_handed_out

    remember_if_handed_out()  # The imports take seconds.

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from agent.command import fail, run_and_leave
from agent.config import TrialConfig, config_from_words
from agent.tracking.environment import agent_parameters, in_sweep
from diffusion_core.config import ConfigError, flatten, split_argv, to_yaml
from diffusion_core.config.steps import without_effect
from diffusion_core.config.usage import answer, check_data_named
from diffusion_core.machine.assigned import note_trial
from diffusion_core.machine.slurm.nodes import is_to_spread, run_across
from diffusion_core.machine.threads import settle_threads, uncollected
from pruning.config import unheard

USAGE = """\
usage: python -m agent [--config FILE.yaml] [--KNOB=VALUE ...]

Train one class-conditional diffusion model, prune it if a method is set, and log losses, sample grids, a GIF, figures
and checkpoints to Weights & Biases (offline if there is no API key). Sweeps run this command for each trial.

  python -m agent --preset=digits                        built-in real digits, half a minute on two cores
  python -m agent --preset=cifar10 --train.steps=100000  CIFAR-10, downloaded once
  python -m agent --data.name=folder --data.path=DIR     your own images, one sub-folder per class
  python -m agent --log.dir=runs/abc ...                 continue the run in that folder"""


def main(argv: Sequence[str] | None = None, usage: str = USAGE, defaults: Sequence[str] = ()) -> int:
    """Run one trial. Return the exit status.

    Args:
        argv: command-line words; None: those of this process.
        usage: first lines of the help text.
        defaults: words before ``argv``, which overrides them.
    """
    given = sys.argv[1:] if argv is None else argv
    if is_to_spread():
        return run_across([sys.executable, "-m", "agent", *defaults, *given])
    with uncollected("torch"):
        rest = _begin(given, usage, defaults)
    return rest if isinstance(rest, int) else rest()


def _begin(given: Sequence[str], usage: str, defaults: Sequence[str]) -> int | Callable[[], int]:
    """Import all modules and read the command line. Return the exit status, or the trial to run."""
    words = [*defaults, *given]
    threads = settle_threads()  # First of all: the registries of the configuration import PyTorch.
    try:
        if (told := answer(words, usage, TrialConfig)) is not None:
            print(told)
            return 0
        values = split_argv([word for word in words if word not in ("--print-config", "--dry-run")])
        begun_by_wandb = in_sweep() or {"WANDB_RUN_ID", "WANDB_LAUNCH"} & os.environ.keys()
        if not begun_by_wandb and (defaults or not given):
            check_data_named(values)
        config = as_chosen(config_from_words(values), values)
        if not in_sweep() and (problems := [*unheard(config.prune), *without_effect(config.steps)]):
            raise ConfigError(*problems)
    except ConfigError as error:
        note_trial(None)
        return fail(str(error))
    if "--dry-run" in words:
        from agent.session import dry_run  # Slow to import, and not needed for the commands above.

        return partial(dry_run, config, everything="--print-config" in words)
    if "--print-config" in words:
        print(to_yaml(config, without_secrets=True), end="")
        return 0
    from agent.session import run_session

    return partial(run_session, config, threads)


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
    for key, value in chosen.items():
        number = wanted.get(key)
        if isinstance(value, str) and isinstance(number, int | float) and not isinstance(number, bool):
            # W&B must keep it: it knows by the recorded values which combinations of a grid were tried.
            print(f"{key} = {value!r}: text in the sweep's file, and so on W&B; here it is {number!r}", file=sys.stderr)
    return recorded


if __name__ == "__main__":
    run_and_leave(main)
