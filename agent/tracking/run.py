"""The W&B run of a trial: start or resume it, and make its tracker."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

from agent.tracking.api import project_name, server_status
from agent.tracking.environment import has_key, is_offline
from agent.tracking.retention import Retention
from agent.tracking.tracker import PATIENCE_S, WandbTracker
from diffusion_core.config import CheckpointConfig, ConfigError
from diffusion_core.machine.threads import uncollected
from diffusion_core.messages import one_line
from diffusion_core.redact import redacted, redacted_arguments
from diffusion_core.run_folder import check_paths, folder_of, note_place, place_of, read_history
from diffusion_core.terminal.progress import say
from diffusion_core.tracking import STEP

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

INIT_WITHIN_S = 60.0
"""Seconds that the start of a run may take before it is recorded offline instead."""


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

    If the server does not answer, the run is recorded offline.

    Args:
        run_id: the run's id.
        folder: the run's folder.
        config: the configuration to record, by dotted key. API keys in it are redacted.
        mode: ``online`` or ``offline``.
        group: the run's group; None: WANDB_RUN_GROUP.
        sweep_id: the run's sweep, after :func:`leave_sweep`.
        beside: whether another run of this process is active.
        or_offline: whether to record offline if the server does not answer.
        on_stop: called when a user stops the run on W&B; None: interrupt this process.

    Raises:
        ConfigError: if the server refuses the run, or does not answer and ``or_offline`` is false, or a path holds a
            secret, which W&B would record.
    """
    import wandb  # Slow to import, and not needed for --help and --dry-run.

    check_paths(folder)
    threading.excepthook = tell_thread_error
    logging.raiseExceptions = False  # On a full disk, each line of the client's log would print a traceback.
    if mode == "offline" and "WANDB_MODE" not in os.environ and not beside and not has_key():
        say("W&B: no API key, so this run is recorded offline (wandb login or WANDB_API_KEY to go online)")
    under_agent = "WANDB_SWEEP_ID" in os.environ
    # Keep all W&B files in the run's folder: staged artifact files of offline runs stay there until `wandb sync`.
    root = folder_of("WANDB_DIR", folder)
    os.environ["WANDB_DATA_DIR"] = str(folder_of("WANDB_DATA_DIR", folder / "wandb" / "data"))
    entity, project = (None, None) if under_agent else place_of(folder, run_id)
    # diffusion_core/redact.py records the console, without keys.
    settings = wandb.Settings(console="off", finish_timeout_raises=True)
    if sweep_id is not None:
        settings.sweep_id = sweep_id
    if on_stop is not None and hasattr(settings, "stop_fn"):  # Older clients lack it.
        settings.stop_fn = lambda: on_stop()  # W&B deep-copies its settings. A lambda is copied as it is.
    if "WANDB_INIT_TIMEOUT" not in os.environ:
        settings.init_timeout = INIT_WITHIN_S
    if "WANDB_FINISH_TIMEOUT" not in os.environ:
        settings.finish_timeout = PATIENCE_S

    def start(mode: str) -> Run:
        if not beside:  # Forget retries, and the environment, which was read once, perhaps to find the server.
            wandb.teardown()
        with redacted_arguments(), uncollected("wandb.sdk.launch"):  # It imports more of itself.
            run = wandb.init(
                config=redacted(dict(config)),
                mode=mode,  # type: ignore[arg-type]
                resume="allow",
                id=None if under_agent and mode == "online" else run_id,
                entity=entity,
                project=None if under_agent else project or project_name(),
                group=group,
                dir=str(root),
                reinit="create_new" if beside else None,
                settings=settings,
            )
        note_place(folder, run.id, None if is_offline(run) else f"{run.entity}/{run.project}", group)
        return run

    try:
        return start(mode)
    except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
        raise ConfigError(f"W&B: {one_line(error)}") from None
    except (wandb.errors.Error, TimeoutError) as error:
        if mode != "online":
            raise
        reason = one_line(error)
        status = server_status()
        if status in (401, 403):
            raise ConfigError(
                f"WANDB_API_KEY: W&B refuses the API key (status {status}); check it, `wandb login --relogin`, or set "
                f"WANDB_MODE=offline"
            ) from None
        if status == 200:  # It answers: a passing fault, or it refuses the run.
            try:
                return start(mode)
            except (wandb.errors.Error, TimeoutError) as again:
                if server_status() == 200:
                    raise ConfigError(
                        f"W&B refuses this run ({one_line(again)}); check WANDB_ENTITY and WANDB_PROJECT, or "
                        "set WANDB_MODE=offline"
                    ) from None
        if not or_offline:
            raise ConfigError(f"W&B: the server does not answer ({reason})") from None
        say(f"W&B: the server does not answer, so this run is recorded offline ({reason})")
        return start("offline")


def tell_thread_error(error: threading.ExceptHookArgs) -> None:
    """Print an error that ends a thread: one of W&B's client in one line, others as usual.

    The client's threads end with a traceback each if its process dies, even while the run is sent again.
    """
    modules = {str(frame.f_globals.get("__name__")).split(".")[0] for frame, _ in walk_tb(error.exc_traceback)}
    if "wandb" in modules:
        say(f"W&B: a thread of its client ended: {one_line(error.exc_value)}")
    else:
        threading.__excepthook__(error)


def leave_sweep() -> str | None:
    """Hide an agent's sweep from W&B's client, which would take every run of this process for the agent's trial.

    For a trial with several runs. Pass the returned id to :func:`start_wandb` for the trial's own run.

    Returns:
        The sweep's id, or None outside a sweep.
    """
    for name in ("WANDB_SWEEP_PARAM_PATH", "WANDB_RUN_ID"):
        os.environ.pop(name, None)
    return os.environ.pop("WANDB_SWEEP_ID", None)


def may_fetch(run: Run, config: CheckpointConfig) -> bool:
    """Return whether a run continues from its checkpoints on W&B."""
    return run.resumed and not is_offline(run) and config.resume


def wandb_tracker(run: Run, folder: Path, config: CheckpointConfig, mode: str) -> WandbTracker:
    """Return the tracker of a W&B run. It skips the rows that the run has already."""
    logged = [row[STEP] for row in read_history(folder)]
    return WandbTracker(
        run,
        # `wandb sync` uploads what this machine recorded offline before.
        first_step=max(logged, default=-1) + 1 if is_offline(run) else run.starting_step,
        keep=config.keep,
        after_upload=Retention(config.keep, config.ttl_days),
        online=mode == "online",
    )
