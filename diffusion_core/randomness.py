"""Every random draw names its stream: a seed, a purpose and a position, and nothing else.

So there is no generator state to save: what step n draws is a function of (seed, n), and a resumed run draws what the
unbroken one would have.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


class Purpose(IntEnum):
    """What a stream is for; two purposes never share one."""

    WEIGHTS = 1
    SPLIT = 2
    ORDER = 3
    AUGMENT = 4
    NOISE = 5
    DROPOUT = 6
    SAMPLE = 7
    VALIDATION = 8
    CALIBRATION = 9
    PRUNE = 10
    REINIT = 11
    CLASSIFIER = 12


def stream_seed(*key: int) -> int:
    """A 63-bit seed for the stream that the integers name; another key gives an unrelated stream."""
    words = [word for part in key for word in (part & 0xFFFFFFFF, (part >> 32) & 0xFFFFFFFF)]
    high, low = np.random.SeedSequence(words).generate_state(2, np.uint32).tolist()
    return (high & 0x7FFFFFFF) << 32 | low


def generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator at the start of the stream that the integers name, on a device (devices draw differently)."""
    import torch  # Slow to import, and not needed for seeds.

    return torch.Generator(device).manual_seed(stream_seed(*key))
