"""How several processes share one machine: GPUs and cores are dealt out evenly."""

from __future__ import annotations

import os


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


def shares(count: int) -> list[dict[str, str]]:
    """Environment variables with which ``count`` processes share this machine.

    Each gets its part of the GPUs, or one of them where there are fewer GPUs than processes, and its part of the cores;
    a single process gets all. OMP_NUM_THREADS that is set already stays.
    """
    if count == 1:
        return [{}]
    gpus = visible_gpus()
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, usable_cores() // count))}
    if not gpus:
        return [dict(threads) for _ in range(count)]
    if len(gpus) < count:
        parts = [[gpus[i % len(gpus)]] for i in range(count)]
    else:
        parts = [gpus[i * len(gpus) // count : (i + 1) * len(gpus) // count] for i in range(count)]
    return [threads | {"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in parts]
