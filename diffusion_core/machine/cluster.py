"""What Slurm says about the job that a trial runs in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from diffusion_core.machine.job import QUEUE_SECONDS
from diffusion_core.machine.slurm import own_job

TEXTS = {"partition": "SLURM_JOB_PARTITION", "node": "SLURMD_NODENAME", "nodes": "SLURM_JOB_NODELIST"}
NUMBERS = {
    "array_index": "SLURM_ARRAY_TASK_ID",
    "restarts": "SLURM_RESTART_COUNT",
    "gpus": "SLURM_GPUS_ON_NODE",
    "queue_seconds": QUEUE_SECONDS,
}


def cluster_facts(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Describe the job that this process belongs to (``slurm/*``); empty outside Slurm.

    The job's id, its array's index, partition and nodes, the number of its restarts, the GPUs on this node, and the
    seconds that the trial waited in the queue, all its jobs together. The kind of GPU is ``system/device``.
    """
    job = own_job(environment)
    if job is None:
        return {}
    facts: dict[str, Any] = {name: environment[key] for name, key in TEXTS.items() if environment.get(key)}
    facts |= {name: int(environment[key]) for name, key in NUMBERS.items() if environment.get(key, "").isdecimal()}
    return {f"slurm/{name}": value for name, value in ({"job": job, "restarts": 0} | facts).items()}
