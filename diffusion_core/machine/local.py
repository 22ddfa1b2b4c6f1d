"""Run trials and agents as processes of this machine, which share its GPUs and cores."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from diffusion_core.config import ConfigError
from diffusion_core.machine.jobs import AgentTasks, Job, JobSize, LauncherRecord, Outcome, Task
from diffusion_core.machine.processes import end_orphan, forget_process, forward_signals, kill_group, start_process
from diffusion_core.machine.sharing import threads_each, visible_gpus
from diffusion_core.registries import LAUNCHERS

LOG_FILE = "console.log"
"""File in a task's folder with its output, if several run at once."""

POLL_SECONDS = 0.2


@dataclass
class LocalJob:
    """A task as a process of this machine."""

    process: subprocess.Popen[bytes]
    slot: int
    started_at: float
    id: str | None = None
    total_seconds: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds since the process started."""
        return time.monotonic() - self.started_at

    def poll(self) -> Outcome | None:
        """Return how the process ended, or None."""
        code = self.process.poll()
        if code:
            kill_group(self.process)  # Processes that it started must release the GPUs.
        return None if code is None else Outcome(code)

    def stop(self) -> None:
        """Send SIGTERM."""
        self.process.terminate()

    def kill(self) -> None:
        """Send SIGKILL to the process and all that it started."""
        kill_group(self.process)


class LocalLauncher:
    """Starts processes on this machine. They receive SIGTERM when this process ends, however it ends.

    Args:
        shares: environment variables of each slot.
    """

    def __init__(self, shares: Sequence[Mapping[str, str]], _words: str | None = None) -> None:
        self.shares = shares
        self.slots = len(shares)
        self._jobs: list[LocalJob] = []
        self._received: list[int] = []

    @contextmanager
    def listening(self) -> Iterator[list[int]]:
        """Forward signals to the processes inside this context."""
        with forward_signals(lambda: [job.process for job in self._under_way()]) as self._received:
            yield self._received

    @contextmanager
    def locked(self, folder: Path) -> Iterator[None]:
        """Hold nothing more: the system's lock reaches all processes of this machine."""
        yield

    def start(self, task: Task, submitted: Callable[[str | None], object]) -> Job:
        """Start a process in a free slot."""
        slot = min(set(range(self.slots)) - {job.slot for job in self._under_way()})
        end_orphan(task.folder)  # A failed attempt may have left a process.
        forget_process(task.folder)  # Else its time would be counted again after a kill before the next one begins.
        submitted(None)
        environment = {**os.environ, **self.shares[slot], **task.environment}
        process = start_process(task.command, environment, task.folder, self.log(task.folder))
        job = LocalJob(process, slot, time.monotonic())
        self._jobs.append(job)
        if self._received:  # The signal came during the start, before the process could be told.
            process.send_signal(self._received[-1])
        return job

    def adopt(self, name: str, folder: Path, job: str, submitted: Callable[[str | None], object]) -> Job:
        """Refuse: the job may still run elsewhere."""
        raise ConfigError(f"--launcher = 'local': trial {name} is job {job}; add --launcher slurm, or end it first")

    def leave(self, jobs: Sequence[Job], received: Sequence[int]) -> bool:
        """Stay: the processes were told, and write their checkpoints."""
        return False

    def log(self, folder: Path) -> Path | None:
        """Return the file of a task's output, or None for the terminal if no other task uses that."""
        return folder / LOG_FILE if self.slots > 1 else None

    def run_agents(self, agents: AgentTasks) -> tuple[list[int], bool]:
        """Run agents as processes, each with its share of the machine."""
        processes: list[subprocess.Popen[bytes]] = []
        with forward_signals(lambda: processes) as received:
            for number, (command, share) in enumerate(zip(agents.commands, self.shares, strict=False)):
                if received:
                    continue
                log = None
                if self.slots > 1:
                    agents.logs.mkdir(parents=True, exist_ok=True)
                    log = agents.logs / f"{agents.name}-{number + 1}.log"
                    shown = " ".join([f"agent {number + 1}:", *(f"{k}={v}" for k, v in share.items()), str(log)])
                    print(shown, flush=True)
                processes.append(start_process(command, {**agents.environment, **share}, log=log))
            while any(process.poll() is None for process in processes):
                time.sleep(POLL_SECONDS)
        return [process.returncode for process in processes], bool(received)

    def preview(self, task: Task | AgentTasks) -> str:
        """Return nothing."""
        return ""

    def _under_way(self) -> list[LocalJob]:
        self._jobs = [job for job in self._jobs if job.process.returncode is None]
        return self._jobs


def share_size(count: int, _words: str | None = None) -> JobSize:
    """Return what each of ``count`` tasks takes of this machine: a part of its GPUs, or of its cores."""
    gpus = len(visible_gpus())
    return JobSize(gpus / count, "GPU") if gpus else JobSize(threads_each(count), "core")


LAUNCHERS["local"] = LauncherRecord("processes of this machine", LocalLauncher, shares_machine=True, size=share_size)
