"""The timesteps that a sampler visits, and the amplitudes there. See :mod:`diffusion_core.diffusion.schedule`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Spacing = Literal["uniform", "trailing", "quadratic", "karras"]

KARRAS_RHO = 7.0


@dataclass(frozen=True)
class SamplingSteps:
    """The part of a schedule that a sampler needs: S timesteps, most noisy first, and S+1 amplitudes.

    The last pair of amplitudes is (1, 0), the clean image. Amplitudes are float64 on the CPU. Timesteps are integers,
    or floats between the trained timesteps.
    """

    timesteps: tuple[float, ...]
    alphas: Tensor
    sigmas: Tensor
    _given: dict[tuple[int, int, torch.device], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __len__(self) -> int:
        return len(self.timesteps)

    @cached_property
    def levels(self) -> list[float]:
        """The S+1 noise levels ``sigma / alpha``; the first may be infinite, the last is 0."""
        return (self.sigmas / self.alphas).tolist()

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type of all timesteps: int64, or float32 if any lies between two trained ones.

        All steps have one type, so that a compiled network is compiled once.
        """
        return torch.long if all(float(value).is_integer() for value in self.timesteps) else torch.float32

    @property
    def t_S(self) -> Tensor:
        """The timesteps of all steps, ``(S,)`` of :attr:`dtype`, on the CPU."""
        return torch.tensor(self.timesteps, dtype=self.dtype, device="cpu")

    def t(self, index: int, like_BCHW: Tensor) -> Tensor:
        """Return the timestep of a step for a whole batch, ``(B,)`` of :attr:`dtype`. Do not change it in place."""
        key = index, len(like_BCHW), like_BCHW.device
        if key not in self._given:
            self._given[key] = torch.full(key[1:2], self.timesteps[index], dtype=self.dtype, device=key[2])
        return self._given[key]

    def index_of(self, t_B: Tensor) -> int | None:
        """Return the step whose timesteps this tensor holds, without reading it, which would wait for a GPU.

        It is known of the tensors that :meth:`t` returned, and None for all others.
        """
        return next((key[0] for key, given in self._given.items() if given is t_B), None)


def spaced_timesteps(timesteps: int, count: int, spacing: Spacing) -> list[int]:
    """Return ``count`` of the timesteps 0..T-1, descending from T-1.

    ``uniform``: evenly spaced from T-1 to 0, both included (Nichol & Dhariwal 2021, section 4).
    ``trailing``: evenly spaced from T-1, ending a whole step above the clean image (Lin et al. 2023, table 2). But for
    rounding, every second one is one of half as many steps.
    ``quadratic``: evenly spaced square roots from 0 to 0.8 T, finer near the image (Song et al. 2021, appendix D.2),
    and T-1, where sampling starts from pure noise.

    Raises:
        ValueError: if ``count`` is not in 1..T.
    """
    if not 1 <= count <= timesteps:
        raise ValueError(f"sample.steps = {count}: expected 1 to diffusion.timesteps = {timesteps}")
    if count == 1:
        return [timesteps - 1]
    if spacing == "uniform":
        return torch.linspace(0, timesteps - 1, count, dtype=torch.float64).round().long().flip(0).tolist()
    if spacing == "trailing":
        return (torch.linspace(timesteps, timesteps / count, count, dtype=torch.float64).round().long() - 1).tolist()
    roots = torch.linspace(0, math.sqrt(0.8 * timesteps), count - 1, dtype=torch.float64)
    chosen = [*roots.square().long().tolist(), timesteps - 1]
    # Squares of small roots coincide: move each to the next free timestep, then move those above the end down.
    for i in range(1, count):
        chosen[i] = max(chosen[i], chosen[i - 1] + 1)
    for i in range(count - 1, -1, -1):
        chosen[i] = min(chosen[i], timesteps - count + i)
    return chosen[::-1]


def karras_levels(count: int, lowest: float, highest: float) -> Tensor:
    """Return ascending noise levels, ``(count,)`` float64, even in their 7th root (Karras et al. 2022, eq. 5)."""
    if count == 1:
        return torch.tensor([highest], dtype=torch.float64)
    ends = lowest ** (1 / KARRAS_RHO), highest ** (1 / KARRAS_RHO)
    return torch.linspace(*ends, count, dtype=torch.float64).pow(KARRAS_RHO)
