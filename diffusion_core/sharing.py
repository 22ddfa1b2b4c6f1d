"""The number of trials that share one memory; the process that starts them sets it before they import torch."""

from __future__ import annotations

import os

SHARERS = "DIFFUSION_SWEEPS_SHARERS"
"""Environment variable: the number of trials on this trial's GPU, or on the machine if it has no GPU."""


def sharers() -> int:
    """Return the number of trials that share the memory, including this one; 1 if the variable is not set."""
    count = os.environ.get(SHARERS, "")
    return max(1, int(count)) if count.isdecimal() else 1
