"""The launcher ``slurm``: run trials and agents as jobs of Slurm, which go on when this process ends."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from diffusion_core.machine.job import command_of_job, is_active
from diffusion_core.machine.jobs import AgentTasks, Job, LauncherRecord, Task
from diffusion_core.machine.leases import Leased, leased
from diffusion_core.machine.local import LOG_FILE
from diffusion_core.machine.slurm import commands
from diffusion_core.machine.slurm.queue import COLUMNS, AgentJobs, Queue, SlurmJob
from diffusion_core.machine.slurm.size import job_size
from diffusion_core.registries import LAUNCHERS
from diffusion_core.signals import signal_handler
from diffusion_core.terminal.live import LiveTable

LEASE_FILE = ".lease"
"""File in a sweep's folder: the lease of the process that runs the sweep."""

ASK_S = 10.0
"""Seconds in which a second Ctrl-C cancels the jobs."""

WAIT_S = 0.2


class SlurmLauncher:
    """Submits jobs. They go on when this process ends, and a later one finds them again.

    Args:
        shares: one entry for each job at once.
        words: the user's words for sbatch.

    Raises:
        SlurmError: if the words cannot be used.
    """

    def __init__(self, shares: Sequence[Mapping[str, str]], words: str | None = None) -> None:
        self.slots = len(shares)
        self.words = commands.slurm_words(words)
        self.queue = Queue()
        self.queue.heard = lambda: self._table.show(COLUMNS, self.queue.rows(self._names))
        self._table = LiveTable()
        self._names: set[str] = set()
        self._refused = ""
        self._cancelled = False
        self._lost = threading.Event()

    @contextmanager
    def listening(self) -> Iterator[list[int]]:
        """Note signals inside this context; the jobs do not receive them. In a terminal, a table shows the jobs."""
        received: list[int] = []
        with signal_handler((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), received.append), self._table:
            yield received

    @contextmanager
    def locked(self, folder: Path) -> Iterator[threading.Event]:
        """Hold the lease of a sweep's folder, which other nodes see. If it is lost, this process ends as on SIGTERM."""

        def lost() -> None:
            self._lost.set()
            print(f"{str(folder)!r}: another process took the sweep over; this one ends", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)

        try:
            with leased(folder / LEASE_FILE, is_active, lambda text: print(text, file=sys.stderr, flush=True), lost):
                yield self._lost
        except Leased as other:
            raise commands.SlurmError(f"{str(folder)!r} is being run by {other}; wait until that has ended") from None

    def start(self, task: Task, submitted: Callable[[str | None], object]) -> Job:
        """Submit a job, unless one of that name is under way."""
        self._names.add(task.name)
        known = self.queue.under_way(task.name, task.folder)
        if known is not None:
            submitted(known.id)
            return SlurmJob(self.queue, task.name, task.folder, known.id, submitted)
        submitted("")
        job, output = "", _escaped(task.folder / LOG_FILE)
        task.folder.mkdir(parents=True, exist_ok=True)
        try:
            environment = {**os.environ, **task.environment}
            job = commands.submit(self._script(task), self.words, task.name, output, environment)
            submitted(job)
            self._refused = ""
        except commands.NoAnswer as error:
            if str(error) != self._refused:
                print(f"sbatch: {error}; trying again", file=sys.stderr, flush=True)
            self._refused = str(error)
        return SlurmJob(self.queue, task.name, task.folder, job, submitted)

    def adopt(self, name: str, folder: Path, job: str, submitted: Callable[[str | None], object]) -> Job:
        """Return a job that an earlier process submitted."""
        self._names.add(name)
        return SlurmJob(self.queue, name, folder, job, submitted)

    def leave(self, jobs: Sequence[Job], received: Sequence[int]) -> bool:
        """Ask once after Ctrl-C: the jobs go on, or a second one cancels them. Other signals do not ask."""
        submitted = [job for job in jobs if isinstance(job, SlurmJob) and job.id]

        def note() -> None:
            for job in submitted:
                job.note_cancelled()

        return self._leave([job.id for job in submitted], received, note)

    def _leave(self, ids: Sequence[str], received: Sequence[int], before: Callable[[], object] = lambda: None) -> bool:
        """Return whether jobs go on. If they are cancelled, do something before."""
        if self._cancelled:
            return False
        if received[0] == signal.SIGINT and ids:
            print(f"Ctrl-C again within {ASK_S:.0f} s cancels {len(ids)} jobs; else they go on", file=sys.stderr)
            deadline = time.monotonic() + ASK_S
            while len(received) < 2 and time.monotonic() < deadline:
                time.sleep(WAIT_S)
        if len(received) < 2 or self._lost.is_set():
            print(f"{len(ids)} jobs go on; the same command finds them again", file=sys.stderr)
            return True
        before()
        try:
            commands.cancel(ids)
        except commands.NoAnswer as error:
            print(f"scancel: {error}; the jobs go on", file=sys.stderr)
            return True
        print(f"cancelled {len(ids)} jobs; waiting for their checkpoints", file=sys.stderr, flush=True)
        self._cancelled = True
        return False

    def log(self, folder: Path) -> Path | None:
        """Return the file of a job's output."""
        return folder / LOG_FILE

    def preview(self, task: Task | AgentTasks) -> str:
        """Return the script of a job and its sbatch command, after Slurm has accepted the words."""
        said = commands.check_words(self.words)
        return f"{self._script(task)}# {shlex.join(['sbatch', *self.words])}\n# {said}"

    def run_agents(self, agents: AgentTasks) -> tuple[list[int], bool]:
        """Run agents as an array of jobs, or wait for those that are under way."""
        with self.listening() as received:
            self._names.add(agents.name)
            agents_jobs = AgentJobs(self.queue, agents.name)
            if not agents_jobs.are_under_way():
                self._submit_agents(agents)
            agents_jobs.since = time.monotonic()
            while agents.wait and not agents_jobs.follow():
                if received and self._leave(agents_jobs.under_way(), received):
                    break
                time.sleep(WAIT_S)
        return agents_jobs.codes(), bool(received)

    def _submit_agents(self, agents: AgentTasks) -> None:
        folder = agents.logs / agents.name
        agents.logs.mkdir(parents=True, exist_ok=True)
        output = f"{_escaped(folder)}-%a.log"
        try:
            count = len(agents.commands)
            job = commands.submit(self._script(agents), self.words, agents.name, output, agents.environment, count)
        except commands.NoAnswer as error:
            raise commands.SlurmError(f"sbatch: {error}; correct --slurm, or try again") from None
        print(f"job {job}: {count} agents, {folder}-1.log ...", flush=True)

    def _script(self, task: Task | AgentTasks) -> str:
        if isinstance(task, AgentTasks):
            return commands.job_script(command_of_job(task.logs / task.name, task.commands[0], task.hand_back))
        return commands.job_script(command_of_job(task.folder, task.command))


def _escaped(path: Path) -> str:
    """Return a path as sbatch reads it."""
    return str(path.absolute()).replace("%", "%%")


LAUNCHERS["slurm"] = LauncherRecord(
    "jobs of Slurm; needs a file system that all nodes share",
    SlurmLauncher,
    size=lambda count, words: job_size(commands.slurm_words(words)),
)
