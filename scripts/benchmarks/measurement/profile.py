"""Profile GPU time by kind of kernel."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

KINDS = {
    "fused reductions (norms)": r"^triton_(red|per)",
    "fused elementwise": r"^triton",
    "attention": r"sdpa|flash|fmha|attention|dot_do_o|convert_dq",
    "convolutions": r"conv|xmma|implicit_gemm|wgrad|dgrad|fprop|init_device_workspace",
    "matrix products": r"nvjet|gemm|cublas|splitk|cutlass",
    "optimizer and averages": r"multi_tensor|foreach|adam|lerp",
    "norms": r"norm|welford",
    "copies and fills": r"copy|memcpy|memset|fill",
}
"""Kinds of kernels and a pattern of their names; the first match counts."""


def kind_of(kernel: str) -> str:
    """Return the kind of a kernel, by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE)), "other")


def is_range(event: str) -> bool:
    """Return whether an event is a named range, such as the optimizer's, whose time is counted by its kernels."""
    return "#" in event


def by_kind(work: Callable[[], object], times: int) -> dict[str, float]:
    """Return milliseconds of GPU time by kind of kernel, per unit of work, largest first.

    Args:
        work: the function to profile; called once.
        times: units of work per call.
    """
    from torch.profiler import ProfilerActivity, profile  # Slow to import, and only this needs it.

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        work()
        torch.cuda.synchronize()
    totals: dict[str, float] = {}
    for event in profiled.key_averages():
        if event.self_device_time_total and not is_range(event.key):
            kind = kind_of(event.key)
            totals[kind] = totals.get(kind, 0.0) + event.self_device_time_total / 1000.0 / times
    return {kind: round(total, 3) for kind, total in sorted(totals.items(), key=lambda item: -item[1])}
