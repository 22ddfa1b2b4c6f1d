"""Streams of PyTorch's generators, which runs of earlier versions drew from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class TorchStreams:
    """One generator of PyTorch per stream.

    Args:
        seeds: a 63-bit seed per stream. The processor's generator uses 32 bits of it.
        device: device of the generators and of the numbers.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers, ``(streams, *shape)`` float32."""
        numbers = torch.empty((len(self.generators), *shape), device=self.device)
        for row, source in zip(numbers, self.generators, strict=True):
            row.normal_(generator=source)
        return numbers

    def normal_float64(self, *shape: int) -> Tensor:
        """Return standard normal numbers, ``(streams, *shape)`` float64."""
        return torch.stack(
            [torch.randn(shape, generator=g, device=self.device, dtype=torch.float64) for g in self.generators]
        )

    def uniform(self, *shape: int) -> Tensor:
        """Return numbers in [0, 1), ``(streams, *shape)`` float32."""
        return torch.stack([torch.rand(shape, generator=g, device=self.device) for g in self.generators])

    def integers(self, high: int, *shape: int) -> Tensor:
        """Return integers in [0, high), ``(streams, *shape)`` int64."""
        return torch.stack([torch.randint(high, shape, generator=g, device=self.device) for g in self.generators])

    def permutation(self, total: int) -> Tensor:
        """Return the integers below ``total`` in random order, ``(streams, total)`` int64."""
        return torch.stack([torch.randperm(total, generator=g, device=self.device) for g in self.generators])
