"""W&B settings from the environment and ``.env``: which mode, which run id, which folder."""

from __future__ import annotations

import netrc
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dotenv import find_dotenv, load_dotenv

from diffusion_core.config import ConfigError
from diffusion_core.run_folder import BELONGS_BY, read_run_file

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run


DEFAULT_PROJECT = "diffusion-sweeps"
OFFLINE_SWEEP = "DIFFUSION_SWEEPS_OFFLINE"
"""The variable that an offline sweep sets for its trials, to its name."""

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


def find_run(configured: str | None) -> tuple[str, Path]:
    """The id of this run, and its folder.

    Under an agent the id is the agent's; a folder that holds a run keeps that run's id; else the id is new. A folder
    that is not configured is ``runs/<id>``.

    Raises:
        ConfigError: if the folder's ``run.json`` is damaged.
    """
    run_id = os.environ.get("WANDB_RUN_ID")
    if configured is None:
        run_id = run_id or secrets.token_hex(4)
        return run_id, Path("runs") / run_id
    folder = Path(configured)
    return run_id or read_run_file(folder).get("id") or secrets.token_hex(4), folder


def belongs_here() -> dict[str, str]:
    """Where on W&B this process's run belongs, by its environment."""
    return {name: os.environ[name] for name in BELONGS_BY if name in os.environ}


def is_offline(run: Run) -> bool:
    """Whether a run is recorded offline. W&B has no public name for it."""
    return bool(run.settings._offline)
