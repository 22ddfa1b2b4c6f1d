"""How many trials of this machine share one memory: said by whoever started them, before torch is imported."""

from __future__ import annotations

import os

SHARERS = "DIFFUSION_SWEEPS_SHARERS"
"""Environment variable: how many trials share this one's GPU, or without GPUs the machine's memory."""


def sharers() -> int:
    """The number of trials, this one among them; 1 where nothing is said."""
    said = os.environ.get(SHARERS, "")
    return max(1, int(said)) if said.isdecimal() else 1
