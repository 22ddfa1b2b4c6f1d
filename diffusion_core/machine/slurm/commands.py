"""Ask Slurm: submit a job, look at all of one's jobs, signal and cancel some. Each command has a time limit.

Without accounting, Slurm forgets a job some minutes after its end (MinJobAge, 300 s). What a job did at its end is
therefore in a file of its folder as well: see :mod:`diffusion_core.machine.job`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from diffusion_core.config import ConfigError
from diffusion_core.messages import one_line, shortened

WORDS = "DIFFUSION_SWEEPS_SLURM"
"""Environment variable: words for sbatch, before those of ``--slurm``."""

WITHIN_S = 60.0
"""Seconds that a command of Slurm may take. While the controller is down, squeue fails after 18 s."""

WARNING_S = 120
"""Seconds before its time limit at which a job is warned, unless the user's words for sbatch say otherwise."""

OVER = frozenset({"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
                  "PREEMPTED", "REVOKED", "TIMEOUT"})  # fmt: skip
"""States of jobs that have ended. All others are taken for under way."""

OURS = ("--array", "-a", "--job-name", "-J", "--output", "-o", "--error", "-e", "--wrap", "--parsable", "--test-only")
"""Options of sbatch that the launcher sets."""

TEMPLATE = """\
#!/bin/bash
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@{warning}
# It warns of the time limit, and is ignored until the program below, which keeps the shell's process, handles it.
trap '' USR1
exec {command}
"""


class NoAnswer(RuntimeError):
    """Slurm did not answer, or refused. The message is one line."""


class SlurmError(ConfigError):
    """Slurm cannot be used as the user asked."""


@dataclass(frozen=True)
class JobState:
    """A job as squeue shows it.

    Attributes:
        id: its number; of an array's member ``NUMBER_INDEX``.
        name: its name.
        state: Slurm's word, such as ``PENDING``.
        reason: why it waits, or ``None``.
        node: where it runs; empty while it waits.
    """

    id: str
    name: str
    state: str
    reason: str
    node: str

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.state in OVER


def slurm_words(given: str | None) -> list[str]:
    """Return the words for sbatch: those of DIFFUSION_SWEEPS_SLURM, then those of ``--slurm``, so that these win.

    Raises:
        SlurmError: if they cannot be split, or name an option that the launcher sets.
    """
    words: list[str] = []
    for source, text in ((WORDS, os.environ.get(WORDS)), ("--slurm", given)):
        try:
            parts = shlex.split(text or "")
        except ValueError as error:
            raise SlurmError(f"{source} = {shortened(text)}: {one_line(error)}; close the quotation") from None
        for part in parts:
            if part.partition("=")[0] in OURS:
                raise SlurmError(f"{source} = {shortened(text)}: {part.partition('=')[0]} is set here; leave it out")
        if parts and not parts[0].startswith("-"):
            raise SlurmError(f"{source} = {shortened(text)}: expected options of sbatch, such as --partition=gpu")
        words += parts
    return words


def job_script(command: Sequence[str]) -> str:
    """Return the script of a job that runs a command in place of its shell."""
    return TEMPLATE.format(warning=WARNING_S, command=shlex.join(command))


def check_words(words: Sequence[str]) -> str:
    """Ask Slurm whether it would accept a job. Return what it says, one line.

    Raises:
        SlurmError: if sbatch refuses the words, does not exist, or gets no answer.
    """
    try:
        return _run(["sbatch", "--test-only", *words], text=job_script(["true"]), both=True)
    except NoAnswer as error:
        raise SlurmError(f"--slurm = {shlex.join(words)!r}: sbatch refuses it ({error})") from None


def submit(
    script: str, words: Sequence[str], name: str, output: str, environment: Mapping[str, str], array: int | None = None
) -> str:
    """Submit a job. Return its number.

    Args:
        script: of :func:`job_script`.
        words: the user's words for sbatch.
        name: the job's name.
        output: file that its output is appended to; a pattern of sbatch.
        environment: all its variables, besides Slurm's own.
        array: number of members of an array; None: a single job.

    Raises:
        NoAnswer: if Slurm refuses it, or does not answer. It may have accepted the job nevertheless.
        SlurmError: if there is no sbatch.
    """
    ours = [f"--job-name={name}", f"--output={output}", "--parsable"] + ([f"--array=1-{array}"] if array else [])
    answer = _run(["sbatch", *words, *ours], text=script, environment=environment)
    return answer.split(";")[0]  # NUMBER;CLUSTER where there are several.


def jobs() -> dict[str, JobState]:
    """Return all jobs of this user that Slurm still knows, by id.

    Raises:
        NoAnswer: if Slurm does not answer.
        SlurmError: if there is no squeue.
    """
    answer = _run(["squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i|%j|%T|%r|%N"])
    rows = [line.split("|") for line in answer.splitlines()]
    return {row[0]: JobState(*row[:5]) for row in rows if len(row) >= 5}


def cancel(ids: Iterable[str]) -> None:
    """Cancel jobs: Slurm sends SIGTERM to all their processes, and SIGKILL some seconds later (KillWait).

    Raises:
        NoAnswer: if Slurm does not answer.
    """
    _run(["scancel", *ids])


def terminate(job: str) -> None:
    """Send SIGTERM to a job's script, which tells its program to end for good.

    Raises:
        NoAnswer: if Slurm does not answer.
    """
    _run(["scancel", "--batch", "--signal=TERM", job])


def terminate_steps(job: str) -> None:
    """Send SIGTERM to the processes of a job's steps (srun) on all its nodes, and not to its script.

    Raises:
        NoAnswer: if Slurm does not answer.
    """
    _run(["scancel", "--signal=TERM", job])


def requeue(job: str) -> None:
    """Put a running job back into the queue.

    Raises:
        NoAnswer: if Slurm does not answer, or does not allow it.
    """
    _run(["scontrol", "requeue", job])


def own_job(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the id of the job that this process belongs to; None outside Slurm.

    In an array it names the member: the number alone may stand for the whole array.
    """
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")


def waited_seconds(job: str) -> float | None:
    """Return how long a running job waited in the queue since it was submitted or requeued; None if it is unknown.

    Both times are the controller's: the clocks of nodes may differ.
    """
    from datetime import datetime

    try:
        submitted, started = _run(["squeue", "--noheader", f"--jobs={job}", "--format=%V|%S"]).split("|")
        return (datetime.fromisoformat(started) - datetime.fromisoformat(submitted)).total_seconds()
    except (NoAnswer, SlurmError, ValueError):
        return None


def _run(
    words: Sequence[str], text: str = "", *, both: bool = False, environment: Mapping[str, str] = os.environ
) -> str:
    """Run a command of Slurm. Return its output; with ``both`` that of stderr as well, in one line."""
    # A coordinator may be a job itself. What Slurm told that job of its cores and memory is not for others.
    variables = {name: value for name, value in environment.items() if not _of_a_job(name)}
    try:
        done = subprocess.run(
            words, input=text, capture_output=True, text=True, timeout=WITHIN_S, env=variables, start_new_session=True
        )
    except FileNotFoundError:
        raise SlurmError(f"--launcher = 'slurm': no {words[0]} here; run it on a login node of the cluster") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoAnswer(one_line(error)) from None
    if done.returncode != 0:
        raise NoAnswer(_reason(done.stderr) or f"{words[0]} ended with status {done.returncode}")
    return one_line(done.stdout + done.stderr) if both else done.stdout.strip()


def _of_a_job(name: str) -> bool:
    return name.startswith("SLURM_") and name not in ("SLURM_CONF", "SLURM_CLUSTERS")


def _reason(errors: str) -> str:
    """Return what Slurm's commands say on stderr, without their names, in one line."""
    lines = [line for line in errors.splitlines() if line and not line.startswith("Try ")]
    return one_line("; ".join(dict.fromkeys(line.split("error: ")[-1] for line in lines))) if lines else ""
