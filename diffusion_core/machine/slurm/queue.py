"""Follow jobs of Slurm with one squeue for all, and find out how each ended.

Slurm decides what is under way. What a job noted in its folder (:mod:`diffusion_core.machine.job`) says how its command
ended. While Slurm does not answer, nothing is known, and nothing is started again. A job is over when two looks in a
row say so: what it wrote on another node may appear later here.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Container
from contextlib import suppress
from pathlib import Path

from diffusion_core.files import write_text
from diffusion_core.machine.job import TOLD, WARNED, Note, full_disk_file, read_note
from diffusion_core.machine.jobs import NO_SPACE, Outcome
from diffusion_core.machine.slurm import commands
from diffusion_core.messages import duration

POLL = "DIFFUSION_SWEEPS_SLURM_POLL_S"
"""Environment variable: seconds between two looks at the queue."""

POLL_S = 10.0
CANCELLED_FILE = ".cancelled"
"""File in a trial's folder: the id of the job that the sweep cancelled when it was told to stop."""

COLUMNS = ("name", "job", "state", "node", "for")

HELD = ("Held", "held", "Hold")
"""Words in a reason for which a job waits until somebody releases it, as JobHeldUser and JobHoldMaxRequeue do."""

ENDED_BY_CLUSTER = frozenset({"BOOT_FAIL", "DEADLINE", "NODE_FAIL", "PREEMPTED", "REVOKED", "TIMEOUT"})
"""States in which the cluster ended a job, which is then no failure of the trial."""


class Queue:
    """All jobs of this user, asked for at most every few seconds.

    Attributes:
        looks: number of answers so far.
        heard: called after each answer.
        asked_at: when the last answer was asked for, on the monotonic clock.
    """

    def __init__(self) -> None:
        said = os.environ.get(POLL, "")
        self.every = max(0.1, float(said)) if said.replace(".", "", 1).isdecimal() else POLL_S
        self.looks = 0
        self.asked_at = -1.0
        self._next = 0.0
        self._jobs: dict[str, commands.JobState] = {}
        self._since: dict[str, tuple[str, float]] = {}
        self._silent = False
        self.heard: Callable[[], object] = lambda: None

    def look(self) -> None:
        """Ask again if it is time. Without an answer, the last one stays."""
        now = time.monotonic()
        if now < self._next:
            return
        try:
            self._jobs = commands.jobs()
        except commands.NoAnswer as error:
            if not self._silent:
                print(f"Slurm does not answer ({error}); asking again", file=sys.stderr)
            self._silent = True
        else:
            self._silent, self.asked_at, self.looks = False, now, self.looks + 1
            known = self._since
            self._since = {
                job.id: known[job.id] if known.get(job.id, ("",))[0] == job.state else (job.state, now)
                for job in self._jobs.values()
            }
            self.heard()
        self._next = time.monotonic() + self.every

    def find(self, job: str) -> commands.JobState | None:
        """Return a job by its id; None if Slurm does not know it."""
        return self._jobs.get(job)

    def under_way(self, name: str, folder: Path) -> commands.JobState | None:
        """Return the job of a name that is under way; None if there is none.

        One that noted in its folder that its command ended by itself is not: its end was counted, and Slurm only shows
        it for some seconds more.
        """
        note = read_note(folder)
        ended = note.job if note is not None and note.code is not None and not note.signal else None
        return next((job for job in self.named(name) if not job.is_over and job.id != ended), None)

    def named(self, name: str) -> list[commands.JobState]:
        """Return all jobs of a name."""
        return [job for job in self._jobs.values() if job.name == name]

    def rows(self, names: Container[str]) -> list[list[str]]:
        """Return what is under way of some names, as rows of a table with the head :data:`COLUMNS`."""
        now = time.monotonic()
        return [
            [job.name, job.id, job.state.lower(), job.node or f"({job.reason})", duration(now - self._since[job.id][1])]
            for job in self._jobs.values()
            if job.name in names and not job.is_over
        ]


class SlurmJob:
    """A task as a job of Slurm.

    Args:
        queue: where to look for it.
        name: its name.
        folder: its folder.
        job: its id; empty: sbatch has not said it.
        submitted: called with the id once it is found.
    """

    def __init__(
        self, queue: Queue, name: str, folder: Path, job: str, submitted: Callable[[str], object] = lambda job: None
    ) -> None:
        self.queue, self.name, self.folder, self.id, self.submitted = queue, name, folder, job, submitted
        self._since = time.monotonic()
        self._running_since: float | None = None
        self._over_at: int | None = None
        self._stopping = self._told = False
        self._held = ""

    @property
    def seconds(self) -> float:
        """Seconds since it was first seen running."""
        return 0.0 if self._running_since is None else time.monotonic() - self._running_since

    @property
    def total_seconds(self) -> float | None:
        """Run time of all jobs of the folder, as the last one noted it."""
        note = read_note(self.folder)
        return None if note is None else note.seconds

    def poll(self) -> Outcome | None:
        """Return how it ended; None while it is under way, or while Slurm does not answer."""
        note = self._note()
        if note is not None and note.code is not None and not note.signal:
            return Outcome(note.code)
        self.queue.look()
        if self.queue.asked_at < self._since:  # Nothing was learnt since it was submitted.
            return None
        state = self.queue.find(self.id) if self.id else self.queue.under_way(self.name, self.folder)
        if state is not None and not state.is_over:
            if not self.id:
                self.id = state.id
                self.submitted(state.id)
            self._follow(state)
            return None
        if self._over_at is None:
            self._over_at = self.queue.looks
        return self._outcome(state) if self.queue.looks > self._over_at else None

    def _follow(self, state: commands.JobState) -> None:
        self._over_at = None
        if any(word in state.reason for word in HELD) and state.reason != self._held:
            remedy = f"scontrol release {state.id} lets it start"
            print(f"job {state.id} is held ({state.reason}); {remedy}", file=sys.stderr)
        self._held = state.reason
        if state.state == "RUNNING" and self._running_since is None:
            self._running_since = time.monotonic()
        if self._stopping and not self._told:
            with suppress(commands.NoAnswer):
                commands.terminate(self.id) if state.state == "RUNNING" else commands.cancel([self.id])
                self._told = True

    def _note(self) -> Note | None:
        """Return what this job noted, not an earlier one of the folder."""
        note = read_note(self.folder)
        return note if note is not None and note.job == self.id else None

    def note_cancelled(self) -> None:
        """Note that the sweep cancels this job, which is no failure of the trial. A later process may see its end."""
        with suppress(OSError):  # The disk is full: then it counts as one.
            write_text(self.folder / CANCELLED_FILE, self.id)

    def _was_cancelled(self) -> bool:
        """Return whether the sweep has cancelled this job."""
        try:
            return (self.folder / CANCELLED_FILE).read_text(encoding="utf-8") == self.id
        except (OSError, ValueError):
            return False

    def _outcome(self, state: commands.JobState | None) -> Outcome:
        """Return how it ended. ``state`` is None if Slurm has forgotten it."""
        if not self.id:  # It was not submitted, or has ended since. A job of that name may be an earlier one.
            return Outcome(0, True, "lost", lost=True)
        word = "" if state is None else state.state
        note = self._note()
        if note is None or note.code is None:
            if full_disk_file(self.folder, self.id).exists():
                return Outcome(NO_SPACE, reason="the disk is full", lost=True)
            failed = state is not None and word not in ENDED_BY_CLUSTER and word != "COMPLETED"
            failed = failed and not (word == "CANCELLED" and self._was_cancelled())
            return Outcome(int(failed), not failed, word.lower() or "lost", lost=True)
        if note.code and word == "CANCELLED":
            return Outcome(note.code, self._was_cancelled(), "cancelled")
        if note.code and note.signal == WARNED and not note.advanced:
            return Outcome(note.code, reason="warned of its time limit before it had saved anything")
        return Outcome(note.code, note.code != 0 and note.signal in (WARNED, TOLD), word.lower())

    def stop(self) -> None:
        """Ask it to end for good, as soon as Slurm answers."""
        self._stopping = True

    def kill(self) -> None:
        """Cancel it."""
        if self.id:
            with suppress(commands.NoAnswer):
                commands.cancel([self.id])


class AgentJobs:
    """The jobs of a sweep's agents, by their name.

    Attributes:
        since: from when on an answer of Slurm knows all of them, on the monotonic clock.
    """

    def __init__(self, queue: Queue, name: str) -> None:
        self.queue = queue
        self.name = name
        self.since = 0.0
        self._seen: dict[str, commands.JobState] = {}
        self._looks = 0

    def are_under_way(self) -> bool:
        """Return whether there are some, and say so."""
        self.queue.look()
        found = any(not job.is_over for job in self.queue.named(self.name))
        if found:
            print(f"jobs {self.name} are under way; no more are submitted", flush=True)
        return found

    def under_way(self) -> list[str]:
        """Return the ids of those that have not ended."""
        return [member.id for member in self.queue.named(self.name) if not member.is_over]

    def follow(self) -> bool:
        """Print what has changed, and run again what the cluster ended. Return whether all have ended."""
        self.queue.look()
        if self.queue.asked_at < self.since or self.queue.looks == self._looks:
            return False
        self._looks = self.queue.looks
        members = self.queue.named(self.name)
        changed = [member for member in members if member != self._seen.get(member.id)]
        for member in changed if not sys.stdout.isatty() else []:  # There a table shows it.
            place = f" on {member.node}" if member.node else f" ({member.reason})"
            print(f"job {member.id} {member.state.lower()}{place}", flush=True)
        for member in members:
            if member.state in ENDED_BY_CLUSTER:  # The job itself had no time to go back into the queue.
                with suppress(commands.NoAnswer):
                    commands.requeue(member.id)
        self._seen |= {member.id: member for member in members}
        if changed and not sys.stdout.isatty():
            counts = Counter(member.state.lower() for member in members)
            print("agents: " + ", ".join(f"{count} {state}" for state, count in counts.items()), flush=True)
        return all(member.is_over and member.state not in ENDED_BY_CLUSTER for member in members)

    def codes(self) -> list[int]:
        """Return 1 for each that failed, 0 for each other one."""
        return [int(member.state not in ("COMPLETED", "CANCELLED")) for member in self._seen.values() if member.is_over]
