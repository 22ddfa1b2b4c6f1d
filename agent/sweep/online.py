"""Sweeps on W&B: create or join one, and run W&B's agents, on this machine or as jobs of a cluster.

What asks the server runs in child processes. The process that waits for the agents imports neither W&B nor PyTorch.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from agent.report import NAME, write_ended
from agent.sweep.file import SweepFile, check_sweep
from diffusion_core.config.ranking import BROKEN, trial_order
from diffusion_core.machine.child import in_child
from diffusion_core.machine.jobs import AgentTasks, Launcher
from diffusion_core.search.results import TrialRecord, summary
from diffusion_core.search.sweep import SweepError

LOGS = Path("runs/agents")
"""Folder of the agents' output if several run at once."""

HAND_BACK = (sys.executable, "-m", "agent.sync", "--preempted", f"--ended={128 + signal.SIGTERM}")
"""What returns the trial of a killed agent to the sweep; the trial's folder is appended."""

PATIENT = {"WANDB_AGENT_DISABLE_FLAPPING": "true", "WANDB_AGENT_MAX_INITIAL_FAILURES": "1000000"}
"""Environment of agents with early termination. They count stopped trials as failed, and give up after a few."""


@dataclass(frozen=True)
class OnlineSweep:
    """A sweep on W&B.

    Attributes:
        path: ``ENTITY/PROJECT/ID``.
        url: its web address.
        environment: that of its agents.
    """

    path: str
    url: str
    environment: dict[str, str]


def create_sweep(sweep: SweepFile) -> str:
    """Create a sweep on W&B. Return its path, ``ENTITY/PROJECT/ID``.

    Raises:
        ConfigError: if W&B refuses, or cannot be reached.
    """
    from agent.tracking import sweeps

    # Flat: agents pass a nested parameter as one word, and W&B's tables have one column per flat parameter.
    return sweeps.create(sweep.config | {"name": sweep.name, "parameters": sweep.parameters})


def find_sweep(name: str, expected: SweepFile | None = None) -> tuple[str, SweepFile]:
    """Find a sweep on W&B, and check it as one in a file.

    Args:
        name: ``ENTITY/PROJECT/ID``, ``PROJECT/ID`` or ``ID``.
        expected: the sweep that it must equal; None: any.

    Returns:
        Its path, and its content.

    Raises:
        ConfigError: if it does not exist, cannot be run, or differs from ``expected``.
    """
    from agent.tracking import sweeps

    path, config = sweeps.find(name)
    found = check_sweep(config, path, path.rpartition("/")[2])
    if expected is not None:
        _compare(path, found, expected)
    return path, found


def _compare(path: str, found: SweepFile, expected: SweepFile) -> None:
    """Raise SweepError at the first parameter that differs. W&B adds the distribution if a file leaves it out."""
    for key in [*expected.parameters, *found.parameters]:
        there, here = found.parameters.get(key), expected.parameters.get(key)
        if there is None or here is None or any(there.get(word) != value for word, value in here.items()):
            raise SweepError(f"{key} = {here}: in {path} it is {there}; leave the file out to run what is there")


def online_sweep(path: str, sweep: SweepFile) -> OnlineSweep:
    """Return what its agents need of a sweep on W&B.

    Raises:
        ConfigError: if the sweep does not exist, or W&B cannot be reached.
    """
    from agent.tracking import sweeps

    # For W&B's agent, `${interpreter}` is `python`: put this interpreter first in the search path.
    search_path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    patient = PATIENT if "early_terminate" in sweep.config else {}
    environment = sweeps.agent_environment(dict(os.environ) | {"PATH": search_path} | patient)
    return OnlineSweep(path, sweeps.address(path), environment)


def agent_tasks(path: str, agents: int, count: int | None, environment: dict[str, str], *, wait: bool) -> AgentTasks:
    """Return W&B's agents on a sweep.

    Args:
        path: of the sweep, ``ENTITY/PROJECT/ID``.
        agents: number of agents.
        count: number of trials that they run together; None: no limit.
        environment: all their variables.
        wait: whether to wait for them.
    """
    own = [None if count is None else count // agents + (number < count % agents) for number in range(agents)]
    command = [sys.executable, "-m", "wandb", "agent", "--forward-signals"]
    commands = [[*command, *([] if each is None else ["--count", str(each)]), path] for each in own if each != 0]
    return AgentTasks(path.rpartition("/")[2], commands, environment, LOGS, wait, HAND_BACK)


def run_agents(online: OnlineSweep, sweep: SweepFile, launcher: Launcher, count: int | None, *, wait: bool) -> int:
    """Run W&B's agents on a sweep until it ends, and print the table of its trials.

    Args:
        online: the sweep on W&B.
        sweep: its content.
        launcher: where the agents run, and how many.
        count: number of trials that they run together; None: no limit.
        wait: whether to wait for them.

    Returns:
        The exit status: 0, 1 if a trial or an agent failed, 130 if this process was told to stop.
    """
    path = online.path
    print(f"sweep {sweep.name}: {online.url}")
    print(f"to go on later, and on other machines: python -m agent.sweep --attach {path}", flush=True)
    codes, interrupted = launcher.run_agents(agent_tasks(path, launcher.slots, count, online.environment, wait=wait))
    if not wait:
        return 0
    records = in_child(lambda: _records(path, sweep))
    print(f"\n{summary(sweep, records)}")
    print(online.url)
    if interrupted:
        return 130
    write_ended(path, Path("runs/sweeps") / path.rpartition("/")[2] / NAME)
    return 1 if any(codes) or any(record.state in BROKEN for record in records) else 0


def _records(path: str, sweep: SweepFile) -> list[TrialRecord]:
    """Return the trials of a sweep on the server, best first."""
    from agent.tracking import sweeps

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
    return sorted(records, key=lambda record: trial_order(record, sweep.metric, maximize=sweep.maximize))
