"""A sweep on W&B: created or joined from here, and run here by W&B's own agents."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from agent.sweep.devices import shares
from agent.sweep.file import SweepError, SweepFile, check_sweep
from agent.sweep.process import forward_signals, start_process
from agent.sweep.results import TrialRecord, best_first, table
from agent.tracking import sweeps

LOGS = Path("runs/agents")
"""Where agents and their trials write, if there are several agents at once."""

POLL_SECONDS = 0.2
PATIENT = {"WANDB_AGENT_DISABLE_FLAPPING": "true", "WANDB_AGENT_MAX_INITIAL_FAILURES": "1000000"}
"""To an agent, trials that early termination stops have failed, and after a few of them it would give up the sweep."""


def create_sweep(sweep: SweepFile) -> str:
    """Create a sweep on W&B; returns its path, ``ENTITY/PROJECT/ID``.

    Raises:
        ConfigError: if W&B refuses, or cannot be reached.
    """
    # Flat: agents pass nested parameters as one word, and W&B's tables have a column for a flat one.
    return sweeps.create(sweep.config | {"name": sweep.name, "parameters": sweep.parameters})


def find_sweep(name: str, expected: SweepFile | None = None) -> tuple[str, SweepFile]:
    """A sweep that is on W&B, checked as one in a file is.

    Args:
        name: ``ENTITY/PROJECT/ID``, ``PROJECT/ID`` or ``ID``.
        expected: what its parameters must be; None takes them as they are.

    Returns:
        Its path, and what it is.

    Raises:
        ConfigError: if there is none, if it cannot be run, or is another one.
    """
    path, config = sweeps.find(name)
    found = check_sweep(config, path, path.rpartition("/")[2])
    if expected is not None:
        _compare(path, found, expected)
    return path, found


def _compare(path: str, found: SweepFile, expected: SweepFile) -> None:
    """Raise SweepError at the first parameter that differs. W&B adds the distributions that a file leaves to it."""
    for key in [*expected.parameters, *found.parameters]:
        there, here = found.parameters.get(key), expected.parameters.get(key)
        if there is None or here is None or any(there.get(word) != value for word, value in here.items()):
            raise SweepError(f"{key} = {here}: in {path} it is {there}; leave the file out to run what is there")


def run_agents(path: str, sweep: SweepFile, agents: int, count: int | None) -> int:
    """Run W&B's agents on a sweep until it is over, and print the table of its trials.

    Args:
        path: the sweep's, ``ENTITY/PROJECT/ID``.
        agents: how many at once; they share GPUs and cores.
        count: trials to run, all agents together; None: until there are no more.

    Returns:
        The exit status: 0, 1 if a trial or an agent failed, 130 if this process was told to stop.
    """
    url = sweeps.address(path)
    print(f"sweep {sweep.name}: {url}")
    print(f"to go on later, and on other machines: python -m agent.sweep --attach {path}", flush=True)
    # `${interpreter}` is `python` to W&B's agent: make that the one that runs this.
    search_path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = dict(os.environ) | {"PATH": search_path} | (PATIENT if "early_terminate" in sweep.config else {})
    environment = sweeps.agent_environment(environment)
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
    records = [
        TrialRecord(
            id=run.id,
            state=run.state,
            parameters={key: run.config.get(key) for key in sweep.parameters},
            figures=run.figures,
            seconds=run.seconds,
        )
        for run in sweeps.runs(path)
    ]
    return best_first(records, sweep.metric)
