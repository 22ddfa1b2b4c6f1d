"""Read W&B settings from the environment and ``.env``: the mode, the run's id, the run's folder."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dotenv import find_dotenv, load_dotenv

from diffusion_core.config import ConfigError, read_yaml
from diffusion_core.redact import clean_environment
from diffusion_core.run_folder import check_paths, read_run_file

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

OFFLINE_SWEEP = "DIFFUSION_SWEEPS_OFFLINE"
"""Environment variable that an offline sweep sets for its trials, to the sweep's name."""

MODES = {"online": "online", "run": "online", "shared": "online", "offline": "offline", "dryrun": "offline",
         "disabled": "disabled"}  # fmt: skip


def load_environment() -> None:
    """Read ``.env`` from the working directory or the nearest parent. Variables that are set already win.

    Remove empty W&B variables (``WANDB_ENTITY=``), some of which make W&B fail, and secrets that W&B would record.
    """
    load_dotenv(find_dotenv(usecwd=True))
    clean_environment()
    for name in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value]:
        del os.environ[name]


def in_sweep() -> bool:
    """Return whether a sweep chose this process's trial: a W&B agent or an offline sweep."""
    return "WANDB_SWEEP_ID" in os.environ or OFFLINE_SWEEP in os.environ


def agent_parameters() -> dict[str, Any]:
    """Return the parameters that a W&B agent chose for this process's trial, which W&B records; empty without an agent.

    Raises:
        ConfigError: if the agent's file cannot be read.
    """
    file = os.environ.get("WANDB_SWEEP_PARAM_PATH")
    if not file or not Path(file).is_file():
        return {}
    content = read_yaml(Path(file))
    return {key: spec["value"] for key, spec in content.items() if isinstance(spec, dict) and "value" in spec}


def wandb_mode() -> str:
    """Return ``online``, ``offline`` or ``disabled``: WANDB_MODE, what ``wandb offline`` has set, or online with a key.

    Never prompt.

    Raises:
        ConfigError: if WANDB_MODE is unknown.
    """
    wanted = os.environ.get("WANDB_MODE", "")
    if wanted and wanted not in MODES:
        raise ConfigError(f"WANDB_MODE = {wanted!r}: expected one of online, offline, disabled")
    import wandb

    mode = MODES[wanted or wandb.setup().settings.mode]
    if wanted or mode != "online":
        return mode
    # An agent has a key, and its sweep cannot see offline runs.
    return "online" if "WANDB_SWEEP_ID" in os.environ or has_key() else "offline"


def has_key() -> bool:
    """Return whether W&B's client finds credentials for its server."""
    return bool(os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or api_key())


def api_key() -> str | None:
    """Return the API key that W&B's client finds for its server: in the environment, its settings, or ``.netrc``."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    import wandb
    from wandb.sdk.lib import wbauth  # Knows by which names of a server, and where, `wandb login` has stored keys.

    settings = wandb.setup().settings
    try:
        return settings.api_key or wbauth.read_netrc_auth(host=settings.base_url)
    except wandb.errors.AuthenticationError:
        return "malformed"  # The client refuses it in a line.


def find_run(configured: str | None) -> tuple[str, Path]:
    """Return the id and the folder of this process's run.

    The id is the agent's (WANDB_RUN_ID), else that of the run in the folder, else a new one. The folder is
    ``configured``, or ``runs/<id>``.

    Raises:
        ConfigError: if the folder's ``run.json`` is damaged, its path holds a secret, or the id cannot name artifacts.
    """
    check_paths(configured)
    run_id = os.environ.get("WANDB_RUN_ID")
    if run_id and not re.fullmatch(r"[A-Za-z0-9_.-]+", run_id):
        raise ConfigError(f"WANDB_RUN_ID = {run_id!r}: expected letters, digits, -, _ and ., as in W&B's artifacts")
    if configured is None:
        run_id = run_id or secrets.token_hex(4)
        return run_id, Path("runs") / run_id
    folder = Path(configured)
    return run_id or read_run_file(folder).get("id") or secrets.token_hex(4), folder


def is_offline(run: Run) -> bool:
    """Return whether a run is recorded offline. W&B has no public name for this."""
    return bool(run.settings._offline)
