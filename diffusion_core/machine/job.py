"""``python -m diffusion_core.machine.job FOLDER -- COMMAND``: what a job of Slurm runs in place of its shell.

It takes the lease of the folder, so that no two jobs work in it, runs the command, and notes in a file how it ended.
SIGUSR1 is Slurm's warning before the time limit: the command is told to end (SIGTERM), and the job goes back into the
queue. SIGTERM means preemption, where Slurm requeues the job itself, or the end for good. It is passed on.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diffusion_core.files import DISK_FULL, write_json
from diffusion_core.machine.assigned import FOLDER, agent_folder, assigned, forget
from diffusion_core.machine.jobs import NO_SPACE
from diffusion_core.machine.leases import Leased, leased
from diffusion_core.machine.processes import end_with_parent, kill_tree
from diffusion_core.machine.slurm import commands
from diffusion_core.machine.slurm.nodes import across_nodes, node_count, terminate_across
from diffusion_core.messages import Parser, reason_of
from diffusion_core.run_folder import CHECKPOINTS, HISTORY_FILE
from diffusion_core.signals import signal_handler

LEASE_FILE = ".job"
"""File in a job's folder: the lease of the job that works there."""

NOTE_FILE = "job.json"
"""File in a job's folder: what the last job noted."""

QUEUE_SECONDS = "DIFFUSION_SWEEPS_QUEUE_S"
"""Environment variable of a job's command: seconds in the queue so far, over all its jobs."""

HAND_BACK_WITHIN_S = 300.0
PAUSES_S = (10.0, 30.0, 90.0, 270.0)
"""Seconds between two attempts to hand a trial back."""

HANDED_BACK = (0, 1)
"""Exit statuses of the command that hands a trial back: 0 if all is done, 1 if only files are missing on W&B."""

MODULE = "diffusion_core.machine.job"
TEXTS = {"partition": "SLURM_JOB_PARTITION", "node": "SLURMD_NODENAME", "nodes": "SLURM_JOB_NODELIST"}
NUMBERS = {
    "array_index": "SLURM_ARRAY_TASK_ID",
    "restarts": "SLURM_RESTART_COUNT",
    "gpus": "SLURM_GPUS_ON_NODE",
    "queue_seconds": QUEUE_SECONDS,
}
"""What Slurm says about a job, in its environment."""

POLL_S = 0.1
UNUSABLE = 2
WARNED = "warned"
TOLD = "told"


@dataclass
class Note:
    """What a job notes in its folder.

    Attributes:
        job: its id.
        restarts: number of times that it was requeued before.
        node: where it ran.
        queue_seconds: time in the queue, over all jobs of the folder.
        seconds: run time, likewise.
        code: exit status of its command; None: it has not ended.
        signal: ``warned`` or ``told`` if it was told to end; empty if not.
        advanced: whether history or checkpoints have grown.
    """

    job: str
    restarts: int = 0
    node: str = ""
    queue_seconds: float = 0.0
    seconds: float = 0.0
    code: int | None = None
    signal: str = ""
    advanced: bool = False


def read_note(folder: Path) -> Note | None:
    """Return the note in a folder; None if there is none, or a damaged one."""
    try:
        return Note(**json.loads((folder / NOTE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def full_disk_file(folder: Path, job: str) -> Path:
    """Return the empty file that a job leaves in its folder if the disk was too full for its note."""
    return folder / f".full-{job}"


def command_of_job(folder: Path, command: Sequence[str], hand_back: Sequence[str] | None = None) -> list[str]:
    """Return the command line of this module.

    Args:
        folder: the job's folder.
        command: what to run.
        hand_back: not None for an agent of an array: what returns the trial of a killed one to the sweep.
    """
    options = [] if hand_back is None else ["--agent", shlex.join(hand_back)]
    return [sys.executable, "-m", MODULE, *options, str(folder), "--", *command]


def cluster_facts(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Describe the job that this process belongs to (``slurm/*``); empty outside Slurm.

    The job's id, its array's index, partition and nodes, the number of its restarts, the GPUs on this node, and the
    seconds that the trial waited in the queue, all its jobs together. The kind of GPU is ``system/device``.
    """
    job = commands.own_job(environment)
    if job is None:
        return {}
    facts: dict[str, Any] = {name: environment[key] for name, key in TEXTS.items() if environment.get(key)}
    facts |= {name: int(environment[key]) for name, key in NUMBERS.items() if environment.get(key, "").isdecimal()}
    return {f"slurm/{name}": value for name, value in ({"job": job, "restarts": 0} | facts).items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command as a job. Return its exit status, 0 if another job works in the folder.

    With ``--agent`` it is an agent of an array. Its index is added to the folder's name, and after a warning it goes on
    whatever its exit status is. If its last job was killed, the trial of that is handed back first. With several nodes,
    the agent runs on the first one, and its trials on all (:func:`~diffusion_core.machine.slurm.nodes.run_across`).
    """
    parser = Parser(f"python -m {MODULE}")
    parser.add_argument("--agent", metavar="HAND_BACK")
    parser.add_argument("folder", type=Path)
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args(argv)
    folder, job = arguments.folder, commands.own_job()
    if arguments.agent is not None:
        folder = folder.with_name(f"{folder.name}-{os.environ.get('SLURM_ARRAY_TASK_ID', 1)}")
    if job is None:
        print(f"error: {MODULE} is started by Slurm; use python -m agent.sweep --launcher slurm", file=sys.stderr)
        return UNUSABLE
    received: list[int] = []
    with signal_handler((signal.SIGUSR1, signal.SIGTERM, signal.SIGINT), received.append):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lost = threading.Event()
            with leased(folder / LEASE_FILE, is_active, partial(print, flush=True), lost.set):
                note = _begin(folder, job)
                added = {}
                if arguments.agent:
                    place = arguments.command[-1].split("/")[:2]
                    if not _hand_back(folder, shlex.split(arguments.agent), place, received):
                        if received[:1] == [signal.SIGUSR1]:
                            _requeue(job, received)
                        return UNUSABLE
                    agent_folder(folder).mkdir(parents=True, exist_ok=True)
                    added = {"WANDB_DIR": str(agent_folder(folder))}
                spread = arguments.agent is None and node_count() > 1
                if not _run(folder, note, arguments.command, received, lost, added, spread=spread):
                    print(f"{folder}: another job took over; job {job} has ended its command", file=sys.stderr)
                    return UNUSABLE
                if arguments.agent and not note.signal and (note.code or 0) >= 0:
                    forget(folder)  # It ended by itself, and so had all its trials.
        except Leased as other:
            print(f"{folder}: {other} works here; job {job} leaves it alone", file=sys.stderr)
            return 0
        except OSError as error:
            print(f"error: {str(folder)!r}: {reason_of(error)}; free some space on the shared disk", file=sys.stderr)
            if error.errno not in DISK_FULL:
                return UNUSABLE
            with suppress(OSError):
                full_disk_file(folder, job).touch()
            return NO_SPACE
        goes_on = note.signal == WARNED and (arguments.agent is not None or (note.code != 0 and note.advanced))
        if goes_on and not _requeue(job, received):
            return UNUSABLE
    code = note.code or 0
    return 128 - code if code < 0 else code


def _requeue(job: str, received: Sequence[int]) -> bool:
    """Put this job back into the queue. Return False if Slurm does so already, and ends this process."""
    try:
        commands.requeue(job)
    except (commands.NoAnswer, commands.SlurmError) as error:
        if signal.SIGTERM in received:  # Slurm ends scontrol as well.
            return False
        print(f"job {job} cannot be requeued ({error}); start the sweep's command again", file=sys.stderr)
    return True


def _hand_back(folder: Path, command: Sequence[str], place: Sequence[str], received: Sequence[int]) -> bool:
    """Hand back the trial that the last job of this agent was killed in, and forget it.

    Returns:
        False if W&B did not take it, after several attempts or until a signal came. The trial is then still noted, and
        no other one may begin, whose note would replace that.
    """
    trial = assigned(folder, place)
    if trial is not None:
        named = trial.folder or str(folder / trial.run)
        print(f"{named}: its job was killed; handing it back", flush=True)
        words, environment = [*command, named], os.environ | trial.environment
        for pause in (*PAUSES_S, None):
            if _status(words, environment) in HANDED_BACK:
                break
            if pause is None:
                print(f"{named}: not handed back; when W&B answers, start the sweep's command again", file=sys.stderr)
                return False
            if not received:
                print(f"{named}: not handed back; trying again in {pause:.0f} s", flush=True)
            if _wait(pause, received):
                return False
    forget(folder)
    return True


def _status(words: Sequence[str], environment: Mapping[str, str]) -> int | None:
    """Run a command. Return its exit status; None if it takes too long."""
    try:
        return subprocess.run(words, env=environment, timeout=HAND_BACK_WITHIN_S, check=False).returncode
    except subprocess.TimeoutExpired:
        return None


def _wait(seconds: float, received: Sequence[int]) -> bool:
    """Wait some seconds, or until a signal comes. Return whether one came."""
    deadline = time.monotonic() + seconds
    while not received and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return bool(received)


def is_active(job: str) -> bool | None:
    """Return whether a job is under way; None if Slurm does not answer, or has forgotten the job."""
    try:
        state = commands.jobs().get(job)
    except (commands.NoAnswer, commands.SlurmError):
        return None
    return None if state is None else not state.is_over


def _begin(folder: Path, job: str) -> Note:
    """Note the start of a job."""
    before = read_note(folder) or Note("")
    note = Note(
        job,
        int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        before.queue_seconds + (commands.waited_seconds(job) or 0.0),
        before.seconds,
    )
    write_json(folder / NOTE_FILE, asdict(note))
    full_disk_file(folder, job).unlink(missing_ok=True)
    return note


def _run(
    folder: Path,
    note: Note,
    command: Sequence[str],
    received: list[int],
    lost: threading.Event,
    added: Mapping[str, str],
    *,
    spread: bool,
) -> bool:
    """Run the command to its end, on all nodes if it is ``spread``, pass signals on, and note how it ended.

    Returns:
        False if another job took the folder over: then the command was killed, and nothing was noted.
    """
    start, progress, before = time.monotonic(), _progress(folder), note.seconds
    own = os.getpid()
    facts = {QUEUE_SECONDS: f"{note.queue_seconds:.0f}", FOLDER: str(folder.absolute())}
    environment = {**os.environ, **added, **facts}
    words = across_nodes(command) if spread else command
    process = subprocess.Popen(words, env=environment, preexec_fn=lambda: end_with_parent(own))
    passed = 0
    while process.poll() is None:
        if lost.is_set():
            kill_tree(process.pid)
            process.wait()
            return False
        if passed < len(received):
            passed = len(received)
            if spread:
                terminate_across(process)
            else:
                with suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)
        time.sleep(POLL_S)
    if received:  # Perhaps the command received it as well, and has ended before this process looked.
        note.signal = WARNED if received[0] == signal.SIGUSR1 else TOLD
    note.code = process.returncode
    note.seconds, note.advanced = before + time.monotonic() - start, _progress(folder) != progress
    write_json(folder / NOTE_FILE, asdict(note))
    return True


def _progress(folder: Path) -> tuple[int, list[str]]:
    """Return what grows as a trial advances: the size of its history, and its checkpoints."""
    history, checkpoints = folder / HISTORY_FILE, folder / CHECKPOINTS
    return (
        history.stat().st_size if history.is_file() else 0,
        sorted(entry.name for entry in checkpoints.iterdir()) if checkpoints.is_dir() else [],
    )


if __name__ == "__main__":
    sys.exit(main())
