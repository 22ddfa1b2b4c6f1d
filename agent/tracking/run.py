"""The W&B run of a trial: start or resume it, and what its tracker goes on from."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.config import TrialConfig
from agent.tracking.console import redacted_arguments
from agent.tracking.environment import DEFAULT_PROJECT, is_offline
from agent.tracking.retention import Retention
from agent.tracking.tracker import PATIENCE_S, WandbTracker
from diffusion_core.config import ConfigError
from diffusion_core.messages import one_line
from diffusion_core.redact import redact, redacted
from diffusion_core.run_folder import read_history
from diffusion_core.tracking import STEP

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

INIT_WITHIN_S = 60.0
"""How long the start of a run may take before it is recorded offline instead."""


def start_wandb(
    run_id: str,
    folder: Path,
    config: Mapping[str, Any],
    mode: str,
    *,
    group: str | None = None,
    sweep_id: str | None = None,
    beside: bool = False,
    or_offline: bool = True,
    on_stop: Callable[[], None] | None = None,
) -> Run:
    """Start or resume the W&B run of a trial. Under an agent, entity, project and id are the agent's.

    A server that cannot be reached does not keep a trial from running: it is recorded offline then.

    Args:
        run_id: the run's id.
        folder: its folder.
        config: what W&B records as its configuration; keys in it are blanked out.
        mode: ``online`` or ``offline``.
        group: the group of the run; None leaves it to WANDB_RUN_GROUP.
        sweep_id: the sweep of the run, after :func:`leave_sweep`.
        beside: whether another run of this process goes on.
        or_offline: whether to go offline where the server does not answer.
        on_stop: called when a user stops the run on W&B; None: this process is interrupted.

    Raises:
        ConfigError: if the server refuses the run, or does not answer and is needed.
    """
    import wandb  # Slow to import, and --help and --dry-run do without it.

    if mode == "offline" and "WANDB_MODE" not in os.environ and not beside:
        print("W&B: no API key, so this run is recorded offline (wandb login or WANDB_API_KEY to go online)",
              file=sys.stderr)  # fmt: skip
    under_agent = "WANDB_SWEEP_ID" in os.environ
    os.environ.setdefault("WANDB_DIR", str(folder))
    # Staged artifact files of offline runs stay until `wandb sync`: beside the run, not in the home directory.
    os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb" / "data"))
    Path(os.environ["WANDB_DIR"]).mkdir(parents=True, exist_ok=True)
    Path(os.environ["WANDB_DATA_DIR"]).mkdir(parents=True, exist_ok=True)
    # What is printed is recorded by agent/tracking/console.py, without keys.
    settings = wandb.Settings(console="off", finish_timeout_raises=True)
    if sweep_id is not None:
        settings.sweep_id = sweep_id
    if on_stop is not None and hasattr(settings, "stop_fn"):  # Not in older clients.
        settings.stop_fn = lambda: on_stop()  # W&B copies its settings deeply; a plain function stays itself.
    if "WANDB_INIT_TIMEOUT" not in os.environ:
        settings.init_timeout = INIT_WITHIN_S
    if "WANDB_FINISH_TIMEOUT" not in os.environ:
        settings.finish_timeout = PATIENCE_S

    def start(mode: str) -> Run:
        with redacted_arguments():
            return wandb.init(
                config=redacted(dict(config)),
                mode=mode,  # type: ignore[arg-type]
                resume="allow",
                id=None if under_agent and mode == "online" else run_id,
                project=None if under_agent or "WANDB_PROJECT" in os.environ else DEFAULT_PROJECT,
                group=group,
                reinit="create_new" if beside else None,
                settings=settings,
            )

    try:
        return start(mode)
    except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
        raise ConfigError(f"W&B: {redact(one_line(error))}") from None
    except (wandb.errors.Error, TimeoutError) as error:
        if mode != "online":
            raise
        reason = redact(one_line(error))
        if not or_offline:
            raise ConfigError(f"W&B: the server does not answer ({reason})") from None
        print(f"W&B: the server does not answer, so this run is recorded offline ({reason})", file=sys.stderr)
        if not beside:
            wandb.teardown()  # What was begun would go on trying.
        return start("offline")


def leave_sweep() -> str | None:
    """Hide an agent's sweep from W&B's client, which would take every run of this process for the agent's.

    For a trial with several runs; its own is told the sweep by :func:`start_wandb`.

    Returns:
        The sweep's id, or None outside one.
    """
    for name in ("WANDB_SWEEP_PARAM_PATH", "WANDB_RUN_ID"):
        os.environ.pop(name, None)
    return os.environ.pop("WANDB_SWEEP_ID", None)


def may_fetch(run: Run, config: TrialConfig) -> bool:
    """Whether a run goes on from what W&B has of it."""
    return run.resumed and not is_offline(run) and config.checkpoint.resume


def wandb_tracker(run: Run, folder: Path, config: TrialConfig) -> WandbTracker:
    """The tracker of a W&B run, which goes on after the rows that the run has already."""
    logged = [row[STEP] for row in read_history(folder)]
    return WandbTracker(
        run,
        # What this machine recorded offline before, `wandb sync` uploads.
        first_step=max(logged, default=-1) + 1 if is_offline(run) else run.starting_step,
        keep=config.checkpoint.keep,
        after_upload=Retention(config.checkpoint.keep, config.checkpoint.ttl_days),
    )


def forget_environment() -> None:
    """Let W&B's client read the environment again; it reads it once."""
    import wandb

    wandb.teardown()
