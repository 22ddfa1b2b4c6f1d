"""What a network can predict, and how a clean image follows from it.

With ``x = alpha * x0 + sigma * eps``; alpha and sigma are shaped to broadcast against images.
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
    """What is known of a parametrisation.

    Attributes:
        target: ``(x0, eps, alpha, sigma)`` to what the network's output is trained to equal.
        clean: ``(output, x, alpha, sigma)`` to the clean images that the output stands for.
        error_scale: ``(alpha, sigma)`` to the squared error of the output per squared error of the clean images. It
            turns a weighting of one into a weighting of the other.
        help: what it is, and its source.
        inputs: ``(x, alpha, sigma)`` to what the network is given; None: the noisy images as they are. Only scaled
            inputs go with a schedule whose noise explodes.
        at_pure_noise: whether a clean image follows where alpha is zero.
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
    """``c_skip`` and ``c_out`` at a noise level ``sigma / alpha`` (Karras et al. 2022, table 1)."""
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
    help="a preconditioned network (Karras et al. 2022, eq. 7)",
    inputs=_edm_inputs,
)
