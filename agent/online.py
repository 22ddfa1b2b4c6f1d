"""A sweep on W&B: created or joined from here, and run here by W&B's own agents."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agent.devices import shares
from agent.results import TrialRecord, best_first, table
from agent.settings import DEFAULT_PROJECT
from agent.sweep_file import SweepError, SweepFile, check_sweep
from agent.trial_process import forward_signals, start_process

LOGS = Path("runs/agents")
"""Where agents and their trials write, if there are several agents at once."""

POLL_SECONDS = 0.2
PATIENT = {"WANDB_AGENT_DISABLE_FLAPPING": "true", "WANDB_AGENT_MAX_INITIAL_FAILURES": "1000000"}
"""To an agent, trials that early termination stops have failed, and after a few of them it would give up the sweep."""


def create_sweep(sweep: SweepFile) -> str:
    """Create a sweep on W&B; returns its path, ``ENTITY/PROJECT/ID``.

    Raises:
        SweepError: if W&B refuses, or cannot be reached.
    """
    import wandb

    project = sweep.config.get("project") or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT
    entity = sweep.config.get("entity") or os.environ.get("WANDB_ENTITY")
    with _refusals(f"cannot create sweep {sweep.name!r}"):
        # Flat: agents pass nested parameters as one word, and W&B's tables have a column for a flat one.
        config = sweep.config | {"name": sweep.name, "parameters": sweep.parameters}
        sweep_id = wandb.sweep(config, entity=entity, project=project)
        return f"{entity or wandb.Api().default_entity}/{project}/{sweep_id}"


def find_sweep(name: str, expected: SweepFile | None = None) -> tuple[str, SweepFile]:
    """A sweep that is on W&B, checked as one in a file is.

    Args:
        name: ``ENTITY/PROJECT/ID``, ``PROJECT/ID`` or ``ID``.
        expected: what its parameters must be; None takes them as they are.

    Returns:
        Its path, and what it is.

    Raises:
        SweepError: if there is none, if it cannot be run, or is another one.
    """
    import wandb

    parts = name.split("/")
    if not all(parts) or len(parts) > 3:
        raise SweepError(f"--attach = {name!r}: expected ENTITY/PROJECT/ID, PROJECT/ID or ID")
    with _refusals(f"--attach = {name!r}"):
        if len(parts) == 1:
            parts.insert(0, os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT)
        if len(parts) == 2:
            parts.insert(0, os.environ.get("WANDB_ENTITY") or str(wandb.Api().default_entity))
        path = "/".join(parts)
        config = dict(wandb.Api().sweep(path).config)
    found = check_sweep(config, path, parts[-1])
    if expected is not None:
        _compare(path, found, expected)
    return path, found


def _compare(path: str, found: SweepFile, expected: SweepFile) -> None:
    """Raise SweepError at the first parameter that differs. W&B adds the distributions that a file leaves to it."""
    for key in [*expected.parameters, *found.parameters]:
        there, here = found.parameters.get(key), expected.parameters.get(key)
        if there is None or here is None or any(there.get(word) != value for word, value in here.items()):
            raise SweepError(f"{key} = {here}: in {path} it is {there}; leave the file out to run what is there")


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """W&B's errors as one line for the user."""
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    try:
        yield
    except (wandb.errors.Error, WandbApiFailedError, ValueError, OSError) as error:
        raise SweepError(f"{what}: {' '.join(str(error).split())[:300]}") from None


def run_agents(path: str, sweep: SweepFile, agents: int, count: int | None) -> int:
    """Run W&B's agents on a sweep until it is over, and print the table of its trials.

    Args:
        path: the sweep's, ``ENTITY/PROJECT/ID``.
        agents: how many at once; they share GPUs and cores.
        count: trials to run, all agents together; None: until there are no more.

    Returns:
        The exit status: 0, 1 if a trial or an agent failed, 130 if this process was told to stop.
    """
    import wandb

    with _refusals(path):
        url = wandb.Api().sweep(path).url
    print(f"sweep {sweep.name}: {url}")
    print(f"to go on later, and on other machines: python -m agent.sweep --attach {path}", flush=True)
    # `${interpreter}` is `python` to W&B's agent: make that the one that runs this.
    search_path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = dict(os.environ) | {"PATH": search_path} | (PATIENT if "early_terminate" in sweep.config else {})
    environment.pop(wandb.env.SERVICE, None)  # An agent ends the service behind its client with every trial.
    command = [sys.executable, "-m", "wandb", "agent", "--forward-signals"]
    processes: list[subprocess.Popen[bytes]] = []
    with forward_signals(lambda: processes) as came:
        for number, share in enumerate(shares(agents)):
            if came:
                break
            own = [] if count is None else ["--count", str(count // agents + (number < count % agents))]
            if own == ["--count", "0"]:
                continue
            log = None
            if agents > 1:
                LOGS.mkdir(parents=True, exist_ok=True)
                log = LOGS / f"{path.rpartition('/')[2]}-{number + 1}.log"
                print(" ".join([f"agent {number + 1}:", *(f"{k}={v}" for k, v in share.items()), str(log)]), flush=True)
            processes.append(start_process([*command, *own, path], environment | share, log=log))
        while any(process.poll() is None for process in processes):
            time.sleep(POLL_SECONDS)
    records = _records(path, sweep)
    print(f"\n{sweep.name}: {len(records)} trials" + (f", best {sweep.metric} first" if sweep.metric else ""))
    print(table(records, sweep.varied, sweep.metric))
    print(url)
    if came:
        return 130
    failed = any(process.returncode for process in processes)
    return 1 if failed or any(record.state in ("failed", "crashed") for record in records) else 0


def _records(path: str, sweep: SweepFile) -> list[TrialRecord]:
    """The trials of a sweep as the server has them, best first."""
    import wandb

    with _refusals(path):
        records = [
            TrialRecord(
                id=run.id,
                state=run.state,
                parameters={key: run.config.get(key) for key in sweep.parameters},
                figures=flat_summary(dict(run.summary)),
                seconds=run.summary.get("_runtime"),
            )
            for run in wandb.Api().sweep(path).runs
        ]
    return best_first(records, sweep.metric)


def flat_summary(summary: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a run's summary; W&B nests those with a goal, as in ``{"val/loss": {"min": 0.1}}``."""
    flat: dict[str, float] = {}
    for key, value in summary.items():
        nested = getattr(value, "items", None)
        if nested is not None:
            value = next((number for kind, number in nested() if kind in ("min", "max")), None)
        if isinstance(value, int | float):
            flat[key] = value
    return flat
