"""Every random draw names its stream: a seed, a purpose and a position, and nothing else.

So there is no generator state to save: what step n draws is a function of (seed, n), and a resumed run draws what the
unbroken one would have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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
    LOW_NOISE = 13
    LOW_SAMPLE = 14
    UPSAMPLE = 15


class Streams(Protocol):
    """Random streams side by side; each method returns the next numbers of every stream, ``(streams, *shape)``."""

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers, float32."""

    def normal_float64(self, *shape: int) -> Tensor:
        """Return standard normal numbers, float64."""

    def uniform(self, *shape: int) -> Tensor:
        """Return numbers in [0, 1), float32."""

    def integers(self, high: int, *shape: int) -> Tensor:
        """Return integers in [0, high), int64."""

    def permutation(self, total: int) -> Tensor:
        """Return the integers below ``total`` in random order, int64."""


def drawn_as(stored: Mapping[str, Any]) -> int:
    """Return the version of the random draws that a stored configuration means. Earlier versions of it have none."""
    return int(stored.get("draws", 1))


def stream_seed(*key: int) -> int:
    """A 63-bit seed for the stream that the integers name; another key gives an unrelated stream."""
    words = [word for part in key for word in (part & 0xFFFFFFFF, (part >> 32) & 0xFFFFFFFF)]
    high, low = np.random.SeedSequence(words).generate_state(2, np.uint32).tolist()
    return (high & 0x7FFFFFFF) << 32 | low


def streams(version: int, keys: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Streams:
    """Return the streams that some keys name, each at its start.

    Args:
        version: from 2 on: counter-based, the same numbers on every device. 1: PyTorch's generators, as in runs of
            earlier versions. They draw differently on each kind of device, and the processor's uses 32 bits of a seed.
        keys: the integers that name each stream.
        device: device of the numbers.
    """
    from diffusion_core.randomness.philox import Philox  # Imports PyTorch.
    from diffusion_core.randomness.torch_streams import TorchStreams

    seeds = [stream_seed(*key) for key in keys]
    return TorchStreams(seeds, device) if version == 1 else Philox(seeds, device)


def generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of PyTorch at the start of the stream that the integers name. The processor's uses 32 bits of it.

    For few draws whose streams cannot be taken for one another: weights, splits, scores.
    """
    import torch  # Slow to import, and not needed for seeds.

    return torch.Generator(device).manual_seed(stream_seed(*key))
