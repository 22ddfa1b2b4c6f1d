"""Run the command of a job on all its nodes, as processes of one trial that find each other (torchrun's rendezvous)."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import PurePath

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
