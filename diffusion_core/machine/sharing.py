"""Share one machine among several trials: deal out GPUs and cores, and tell each how many share its memory."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from diffusion_core.machine.child import in_child

SHARERS = "DIFFUSION_SWEEPS_SHARERS"
"""Environment variable: the number of trials that share one GPU, or without GPUs the machine's memory."""


def sharers() -> int:
    """Return the number of trials that share this one's memory, itself included; 1 if the variable is not set."""
    said = os.environ.get(SHARERS, "")
    return max(1, int(said)) if said.isdecimal() else 1


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, by their names in CUDA_VISIBLE_DEVICES."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [] if named.strip() == "-1" else [name.strip() for name in named.split(",") if name.strip()]
    count = _count_gpus() if "torch" in sys.modules else in_child(_count_gpus)
    return [str(number) for number in range(count)]


def _count_gpus() -> int:
    """Return the number of GPUs. This does not initialise them."""
    import torch  # Slow to import, and large: a process that only starts others does without.

    return torch.cuda.device_count()


def usable_cores(groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Return the number of processor cores that this process may use.

    The least of its affinity, the quota of its control group and of those around it, and its Slurm job's cores on this
    node.

    Args:
        groups: where the control groups are.
        membership: the file that names the groups of this process.
    """
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    for variable in ("SLURM_CPUS_ON_NODE", "SLURM_CPUS_PER_TASK"):
        if (said := os.environ.get(variable, "")).isdecimal():
            limits.append(int(said))
    return max(1, min([*limits, *_quotas(groups, membership)]))


def _quotas(groups: Path, membership: Path) -> Iterator[int]:
    """Yield the cores that each control group around this process may use, if it has a quota (versions 1 and 2)."""
    for controllers, path in {("", "/"), ("cpu", "/"), *_own_groups(membership)}:
        files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        names = [name for name in path.split("/") if name]
        for depth in range(len(names) + 1):  # A container's own group is the root of those that it sees.
            folder = groups.joinpath(controllers, *names[:depth])
            with contextlib.suppress(OSError, ValueError):  # "max" and -1 mean that there is no quota.
                quota, period = " ".join((folder / file).read_text(encoding="ascii") for file in files).split()
                if int(quota) > 0:
                    yield math.ceil(int(quota) / int(period))


def _own_groups(membership: Path) -> Iterator[tuple[str, str]]:
    """Yield the controllers (version 1; "" for version 2) and the path of each group that may limit processor time."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in membership.read_text(encoding="utf-8").splitlines():
            _, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            # A path with ".." is outside of the groups that this process sees.
            if ".." not in path.split("/") and (not controllers or "cpu" in controllers.split(",")):
                yield controllers, path


def threads_each(count: int) -> int:
    """Return the threads of each of ``count`` processes: OMP_NUM_THREADS, or an equal part of the cores."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(wanted) if wanted.isdecimal() and int(wanted) else max(1, usable_cores() // count)


def shares(count: int) -> list[dict[str, str]]:
    """Return the environment variables with which ``count`` processes share this machine.

    Each process gets an equal part of the cores and of the GPUs, or a GPU that it shares with others if there are fewer
    GPUs than processes. A single process gets everything.
    """
    if count == 1:
        return [{}]
    gpus = visible_gpus()
    threads = {"OMP_NUM_THREADS": str(threads_each(count))}
    if not gpus:
        return [threads | {SHARERS: str(count)} for _ in range(count)]
    if len(gpus) < count:
        owners = [i % len(gpus) for i in range(count)]
        sharing = Counter(owners)
        return [
            threads
            | {"CUDA_VISIBLE_DEVICES": gpus[owner]}
            | ({SHARERS: str(sharing[owner])} if sharing[owner] > 1 else {})
            for owner in owners
        ]
    parts = [gpus[i * len(gpus) // count : (i + 1) * len(gpus) // count] for i in range(count)]
    return [threads | {"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in parts]
