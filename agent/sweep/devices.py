"""How several processes share one machine: GPUs and cores are dealt out evenly."""

from __future__ import annotations

import os
from collections import Counter

from diffusion_core.sharing import SHARERS


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [] if named.strip() == "-1" else [name.strip() for name in named.split(",") if name.strip()]
    import torch  # Slow to import. Counting leaves the GPUs alone.

    return [str(number) for number in range(torch.cuda.device_count())]


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_each(count: int) -> int:
    """Processor threads of each of ``count`` processes: their part of the cores, or what OMP_NUM_THREADS says."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(wanted) if wanted.isdecimal() and int(wanted) else max(1, usable_cores() // count)


def shares(count: int) -> list[dict[str, str]]:
    """Environment variables with which ``count`` processes share this machine.

    Each gets its part of the GPUs, or one of them where there are fewer GPUs than processes, and its part of the cores;
    a single process gets all. Those that share memory with others are told with how many.
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
