"""Sinusoidal features of timesteps (Vaswani et al. 2017), in the layouts of Ho et al. 2020 and of Diffusers.

Axes: B batch, E features.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_PERIOD = 10_000.0


def kept_frequencies(width: int, kept: int) -> range:
    """Return the indices of the frequencies that remain when ``kept`` of ``width`` features do.

    They are evenly spaced and start at the first, so that Diffusers' `Timesteps` of a smaller width computes the same.
    """
    fewer = kept // 2
    stride = max((width // 2 - 1) // max(fewer - 1, 1), 1)
    return range(0, fewer * stride, stride)


def sinusoidal_embedding(
    t_B: Tensor, width: int, *, kept: int | None = None, shift: float = 1.0, cosine_first: bool = False
) -> Tensor:
    """Return sines and cosines of timesteps, ``(B, kept)``. The frequencies are ``10000^(-i / (n - shift))``.

    Args:
        t_B: timesteps; floats may lie between two timesteps.
        width: number of features of the dense network. With n = width // 2, i is 0..n-1; an odd width ends in a zero.
        kept: number of features of a network with pruned channels, for :func:`kept_frequencies`; None: all.
        shift: 1 ends at 1/10000 (Ho et al. 2020); 0 is the formula of Vaswani et al. 2017. Less than n.
        cosine_first: whether the cosines come first.
    """
    half = width // 2
    exponents = torch.arange(half, device=t_B.device, dtype=torch.float32) / ((half - shift) or 1.0)
    if kept is not None and kept < width:
        chosen = kept_frequencies(width, kept)
        exponents = exponents[: chosen.stop : chosen.step]
    else:
        kept = width
    angles_BE = t_B.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)[None, :]
    parts = (angles_BE.cos(), angles_BE.sin()) if cosine_first else (angles_BE.sin(), angles_BE.cos())
    return F.pad(torch.cat(parts, dim=1), (0, kept % 2))
