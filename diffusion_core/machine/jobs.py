"""Where trials and agents run: what a launcher does for a sweep. Register one with :data:`LAUNCHERS`.

``LAUNCHERS["mine"] = LauncherRecord("what it does", MyLauncher)`` makes it a value of ``--launcher``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Protocol

NO_SPACE = 74
"""Exit status of a task that ended because a disk is full (EX_IOERR of sysexits.h). It can go on once there is room."""
OTHER_INPUT = 79
"""Exit status of a sweep's trial that would take another input than the trials before it. None of sysexits.h."""


@dataclass(frozen=True)
class Task:
    """A command to run.

    Attributes:
        name: a unique name: the trial's id.
        command: its words.
        environment: variables that are set for it, besides those of this process.
        folder: its folder, which no other command works in at the same time.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """How a task ended.

    Attributes:
        code: exit status; 0 if it is unknown.
        interrupted: whether the machine ended it: it is run again, and this is no failure.
        reason: what ended it, if the exit status does not say it; empty if it does.
        lost: whether it ended without an exit status.
    """

    code: int
    interrupted: bool = False
    reason: str = ""
    lost: bool = False


class Job(Protocol):
    """A task under way."""

    @property
    def id(self) -> str | None:
        """Return what finds the job again in a later process; None if it does not outlive this one."""

    @property
    def seconds(self) -> float:
        """Return how long it has run, without the time in a queue."""

    @property
    def total_seconds(self) -> float | None:
        """Return how long all jobs of its folder have run; None if that is not known."""

    def poll(self) -> Outcome | None:
        """Return how it ended; None while it is under way, or while that cannot be known."""

    def stop(self) -> None:
        """Ask it to end for good (SIGTERM)."""

    def kill(self) -> None:
        """End it, with all that it started."""


@dataclass(frozen=True)
class AgentTasks:
    """Agents of a sweep on W&B.

    Attributes:
        name: name of the sweep's jobs.
        commands: a command for each agent.
        environment: all their variables.
        logs: folder of their output.
        wait: whether to wait for them.
        hand_back: a command that returns the trial of a killed agent to the sweep; the trial's folder is appended.
    """

    name: str
    commands: Sequence[Sequence[str]]
    environment: Mapping[str, str]
    logs: Path
    wait: bool = True
    hand_back: Sequence[str] = ()


class Launcher(Protocol):
    """Runs the tasks of a sweep.

    Attributes:
        slots: number of tasks at once.
    """

    slots: int

    def listening(self) -> AbstractContextManager[list[int]]:
        """Handle SIGINT, SIGTERM and SIGHUP inside a context. Yield the numbers of those that arrived."""

    def locked(self, folder: Path) -> AbstractContextManager[Event | None]:
        """Hold what keeps other processes, also of other nodes, from running the sweep in a folder.

        It yields what is set once another process has taken the sweep over; None: none can.

        Raises:
            ConfigError: if one does.
        """

    def start(self, task: Task, submitted: Callable[[str | None], object]) -> Job:
        """Start a task.

        Args:
            task: the task.
            submitted: called with the job's id before the start, and again as soon as more of it is known.

        Raises:
            OSError: if there is no such program.
            ConfigError: if the launcher cannot be used.
        """

    def adopt(self, name: str, folder: Path, job: str, submitted: Callable[[str | None], object]) -> Job:
        """Return a job that an earlier process of the sweep started.

        Raises:
            ConfigError: if this launcher has no such jobs.
        """

    def leave(self, jobs: Sequence[Job], received: Sequence[int]) -> bool:
        """Return whether this process may end after a signal while its jobs go on."""

    def log(self, folder: Path) -> Path | None:
        """Return the file of a task's output; None: the terminal."""

    def run_agents(self, agents: AgentTasks) -> tuple[list[int], bool]:
        """Run agents to their end. Return their exit statuses, and whether this process was told to stop."""

    def preview(self, task: Task | AgentTasks) -> str:
        """Return what would be run, for ``--dry-run``; empty if there is nothing to show.

        Raises:
            ConfigError: if it would be refused.
        """


@dataclass(frozen=True)
class JobSize:
    """What a task takes of a machine while it runs.

    Attributes:
        count: how much; less than 1 if tasks share a GPU.
        unit: ``GPU``, or ``core`` if it has none.
    """

    count: float
    unit: str

    def hours(self, seconds: float | None, tasks: int | None, device: str | None) -> str:
        """Return what tasks cost, in words: ``about 12 GPU hours in all``.

        Args:
            seconds: run time of one; None: unknown.
            tasks: their number; None: unlimited, and the words are of one.
            device: ``cpu`` or ``cuda``: what the time was measured on; None: it is that of tasks that have ended.
        """
        if seconds is None:
            return f"{self.unit} hours unknown"
        if self.unit == "GPU" and device == "cpu":
            return "GPU hours unknown, as there is no GPU here to measure a step on"
        hours = self.count * seconds * (1 if tasks is None else tasks) / 3600
        amount = f"about {hours:,.0f}" if hours >= 10 else f"about {hours:.2g}" if hours >= 0.01 else "less than 0.01"
        return f"{amount} {self.unit} hours {'a trial' if tasks is None else 'in all'}"


@dataclass(frozen=True)
class LauncherRecord:
    """A value of ``--launcher``.

    Attributes:
        help: one line.
        make: called with the environment variables of each slot and the words of ``--slurm``.
        shares_machine: whether its tasks share this machine, so that GPUs and cores are dealt out.
        size: returns what a task takes, from the number of tasks at once and the words of ``--slurm``; None: unknown.
    """

    help: str
    make: Callable[[Sequence[Mapping[str, str]], str | None], Launcher]
    shares_machine: bool = False
    size: Callable[[int, str | None], JobSize] | None = None
