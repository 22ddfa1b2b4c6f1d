"""Run the command of a job on all its nodes, as processes of one trial that find each other (torchrun's rendezvous)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import PurePath

from diffusion_core.machine.assigned import FOLDER
from diffusion_core.machine.processes import end_with_parent
from diffusion_core.machine.slurm import commands
from diffusion_core.signals import INTERRUPTS, remembered, signal_handler

POLL_S = 0.1
RANK = "RANK"
"""Environment variable: the number of a process among those of its trial, which torchrun sets."""
PORTS = range(20000, 30000)
"""Ports of the rendezvous; the job's number chooses one."""


def node_count(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of nodes of this process's job; 1 outside Slurm."""
    return int(environment.get("SLURM_JOB_NUM_NODES", 1))


def across_nodes(command: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the command that runs another one on all nodes of this job: one process for each GPU, or one a node.

    With one node it is the command itself. All processes end when one fails (``srun --kill-on-bad-exit``). Call it on
    the job's first node, whose name the others must resolve.

    Args:
        command: ``python -m MODULE ...`` or ``python SCRIPT ...``, perhaps after ``/usr/bin/env``; or another program.
        environment: what Slurm set.
    """
    nodes = node_count(environment)
    if nodes == 1:
        return list(command)
    words = list(command)[1 if PurePath(command[0]).name == "env" else 0 :]
    is_python = PurePath(words[0]).name.startswith("python")
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    number = int(environment["SLURM_JOB_ID"])
    return [
        *("srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"),
        *(sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", "--max-restarts=0"),
        f"--nproc-per-node={gpus if gpus.isdecimal() and int(gpus) else 1}",
        *("--rdzv-backend=c10d", f"--rdzv-id={number}"),
        f"--rdzv-endpoint={socket.gethostname()}:{PORTS[number % len(PORTS)]}",
        *(words[1:] if is_python else ["--no-python", *words]),
    ]


def is_to_spread(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process is the trial of an agent whose job has several nodes, and was not started on all."""
    return FOLDER in environment and RANK not in environment and node_count(environment) > 1


def run_across(command: Sequence[str]) -> int:
    """Run a command on all nodes of this job (:func:`across_nodes`), tell it to end on a signal; return its status.

    Signals are those that came since :func:`~diffusion_core.signals.remember_if_handed_out`, and later ones.
    """
    own, told = os.getpid(), 0
    received = remembered()
    with signal_handler(INTERRUPTS, received.append):
        process = subprocess.Popen(across_nodes(command), preexec_fn=lambda: end_with_parent(own))
        while process.poll() is None:
            if told < len(received):
                told = len(received)
                terminate_across(process)
            time.sleep(POLL_S)
    return 128 - process.returncode if process.returncode < 0 else process.returncode


def terminate_across(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM to the processes of a command on all nodes. srun itself would kill those of other nodes at once."""
    try:
        commands.terminate_steps(os.environ["SLURM_JOB_ID"])
    except commands.NoAnswer:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
