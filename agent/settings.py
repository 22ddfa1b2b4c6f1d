"""W&B settings from the environment and ``.env``: whether to go online, and the run to start."""

from __future__ import annotations

import netrc
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dotenv import find_dotenv, load_dotenv

from agent.redact import redact, redacted, redacted_arguments
from diffusion_core.config_io import ConfigError
from diffusion_core.tracking import PATIENCE_S

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

DEFAULT_PROJECT = "diffusion-sweeps"
OFFLINE_SWEEP = "DIFFUSION_SWEEPS_OFFLINE"
"""The variable that an offline sweep sets for its trials, to its name."""
INIT_WITHIN_S = 60.0
"""How long the start of a run may take before it is recorded offline instead."""

MODES = {"online": "online", "run": "online", "shared": "online", "offline": "offline", "dryrun": "offline",
         "disabled": "disabled"}  # fmt: skip


def load_environment() -> None:
    """Read ``.env`` from the working directory or the nearest one above it; what is set already wins.

    Variables of W&B that are set to nothing (``WANDB_ENTITY=``) count as not set; W&B itself would fail on some.
    """
    load_dotenv(find_dotenv(usecwd=True))
    for name in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value]:
        del os.environ[name]


def in_sweep() -> bool:
    """Whether this process runs a trial that a sweep chose, of an agent or of an offline sweep."""
    return "WANDB_SWEEP_ID" in os.environ or OFFLINE_SWEEP in os.environ


def wandb_mode() -> str:
    """``online``, ``offline`` or ``disabled``: what WANDB_MODE says, or online if there is a key to go with.

    Never asks anybody anything.

    Raises:
        ConfigError: if WANDB_MODE is none that W&B knows.
    """
    wanted = os.environ.get("WANDB_MODE", "")
    if wanted:
        if wanted not in MODES:
            raise ConfigError(f"WANDB_MODE = {wanted!r}: expected one of online, offline, disabled")
        return MODES[wanted]
    # An agent has a key, wherever it found it, and its sweep would never see an offline run.
    return "online" if "WANDB_SWEEP_ID" in os.environ or has_key() else "offline"


def has_key() -> bool:
    """Whether this machine has an API key for the W&B server: WANDB_API_KEY, or what ``wandb login`` stored."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb  # Knows the server that `wandb login --host` stored.

    host = urlsplit(wandb.setup().settings.base_url).hostname
    path = os.environ.get("NETRC") or str(Path.home() / ".netrc")
    try:
        return host is not None and netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def leave_sweep() -> str | None:
    """Hide an agent's sweep from W&B's client, which would take every run of this process for the agent's.

    For a trial with several runs; its own is told the sweep by :func:`start_wandb`.

    Returns:
        The sweep's id, or None outside one.
    """
    for name in ("WANDB_SWEEP_PARAM_PATH", "WANDB_RUN_ID"):
        os.environ.pop(name, None)
    return os.environ.pop("WANDB_SWEEP_ID", None)


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
    # What is printed is recorded by agent/redact.py, without keys.
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
        raise ConfigError(f"W&B: {redact(' '.join(str(error).split())[:300])}") from None
    except (wandb.errors.Error, TimeoutError) as error:
        if mode != "online":
            raise
        reason = redact(" ".join(str(error).split())[:200])
        if not or_offline:
            raise ConfigError(f"W&B: the server does not answer ({reason})") from None
        print(f"W&B: the server does not answer, so this run is recorded offline ({reason})", file=sys.stderr)
        if not beside:
            wandb.teardown()  # What was begun would go on trying.
        return start("offline")
