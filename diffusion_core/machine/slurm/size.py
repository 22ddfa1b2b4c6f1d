"""Read from the words for sbatch what a job takes: GPUs, or cores if it takes none."""

from __future__ import annotations

import re
from collections.abc import Sequence

from diffusion_core.machine.jobs import JobSize
from diffusion_core.messages import Parser

OPTIONS = (
    ("-N", "--nodes"),
    ("-n", "--ntasks"),
    ("--ntasks-per-node",),
    ("-c", "--cpus-per-task"),
    ("-G", "--gpus"),
    ("--gpus-per-node",),
    ("--gpus-per-task",),
    ("--gres",),
)
"""Options of sbatch that say how large a job is, in its short and long form."""


def job_size(words: Sequence[str]) -> JobSize:
    """Return what a job takes, all its nodes together. Limits of the partition and the account are not known here.

    Args:
        words: for sbatch; unknown ones are left to sbatch. Of ``--nodes=2-4`` the least number counts.
    """
    parser = Parser("--slurm", add_help=False)
    for names in OPTIONS:
        parser.add_argument(*names, default="")
    given, _ = parser.parse_known_args(list(words))
    nodes = _first(given.nodes, 1)
    tasks = _first(given.ntasks, _first(given.ntasks_per_node, 1) * nodes)
    gpus = (
        _gpus(given.gpus)
        or nodes * _gpus(given.gpus_per_node)
        or tasks * _gpus(given.gpus_per_task)
        or nodes * sum(_gpus(item) for item in given.gres.split(",") if re.match(r"gpu\b", item))
    )
    return JobSize(gpus, "GPU") if gpus else JobSize(tasks * _first(given.cpus_per_task, 1), "core")


def _first(text: str, default: int) -> int:
    """Return the number that a text begins with."""
    found = re.match(r"\d+", text)
    return int(found[0]) if found else default


def _gpus(text: str) -> int:
    """Return the number of GPUs in such as ``2``, ``a100:2``, ``a100:2,v100:1``, ``gpu``, ``gpu:a100:2(S:0-1)``."""
    items = [item.partition("(")[0].rpartition(":")[2] for item in text.split(",") if item]
    return sum(int(item) if item.isdecimal() else 1 for item in items)
