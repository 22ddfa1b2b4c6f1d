"""Parametrisations: what a network predicts, and how to compute the clean image from it.

Notation: ``x = alpha * x0 + sigma * eps``. alpha and sigma broadcast against images.
Axes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_core.registries import PREDICTIONS

SIGMA_DATA = 0.5
"""Standard deviation of the data that EDM's preconditioning assumes (Karras et al. 2022, table 1)."""


@dataclass(frozen=True)
class PredictionRecord:
    """A parametrisation.

    Attributes:
        target: maps ``(x0, eps, alpha, sigma)`` to the training target of the network's output.
        clean: maps ``(output, x, alpha, sigma)`` to the clean images.
        error_scale: maps ``(alpha, sigma)`` to the squared error of the output per squared error of the clean images,
            which converts weights of one error to weights of the other.
        help: what the network predicts, and the source.
        inputs: maps ``(x, alpha, sigma)`` to the network's input; None: the noisy images unchanged. Variance exploding
            schedules need scaled inputs.
        at_pure_noise: whether the clean image can be computed where alpha is zero.
    """

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    clean: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    error_scale: Callable[[Tensor, Tensor], Tensor]
    help: str
    inputs: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    at_pure_noise: bool = False


PREDICTIONS["eps"] = PredictionRecord(
    target=lambda x0, eps, alpha, sigma: eps,
    clean=lambda output, x, alpha, sigma: (x - sigma * output) / alpha,
    error_scale=lambda alpha, sigma: (alpha / sigma).square(),
    help="the noise (Ho et al. 2020)",
)
PREDICTIONS["x0"] = PredictionRecord(
    target=lambda x0, eps, alpha, sigma: x0,
    clean=lambda output, x, alpha, sigma: output,
    error_scale=lambda alpha, sigma: torch.ones_like(alpha),
    help="the clean image",
    at_pure_noise=True,
)
PREDICTIONS["v"] = PredictionRecord(
    target=lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
    clean=lambda output, x, alpha, sigma: (alpha * x - sigma * output) / (alpha.square() + sigma.square()),
    error_scale=lambda alpha, sigma: ((alpha.square() + sigma.square()) / sigma).square(),
    help="v = alpha * eps - sigma * x0 (Salimans & Ho 2022)",
    at_pure_noise=True,
)


def preconditioning(level: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``c_skip`` and ``c_out`` at a noise level ``sigma / alpha`` (Karras et al. 2022, table 1)."""
    total = level.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, level * SIGMA_DATA * total.rsqrt()


def _edm_inputs(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return x / alpha * ((sigma / alpha).square() + SIGMA_DATA**2).rsqrt()


def _edm_target(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    skip, scale = preconditioning(sigma / alpha)
    return (x0 - skip * (x0 + sigma / alpha * eps)) / scale


def _edm_clean(output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    skip, scale = preconditioning(sigma / alpha)
    return skip * x / alpha + scale * output


PREDICTIONS["edm"] = PredictionRecord(
    target=_edm_target,
    clean=_edm_clean,
    error_scale=lambda alpha, sigma: preconditioning(sigma / alpha)[1].square().reciprocal(),
    help="the output of EDM's preconditioned network (Karras et al. 2022, eq. 7)",
    inputs=_edm_inputs,
)
