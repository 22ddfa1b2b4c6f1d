"""The kernel distance (KID, Binkowski et al. 2018): squared maximum mean discrepancy with a cubic kernel.

Axes: N samples, M samples of a subset, D features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SUBSETS = 100
SUBSET_SIZE = 1000
SEED = 2020
"""As in torch-fidelity, whose subsets are drawn here too, so that figures are equal."""


def kernel_distance(
    features_ND: Tensor, reference_ND: Tensor, *, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = SEED
) -> float:
    """Mean over random subsets of the unbiased estimate of ``MMD^2`` with ``k(x, y) = (x y / D + 1)^3``.

    Args:
        features_ND: of generated images.
        reference_ND: of real images; the numbers of images may differ.
        subsets: subsets drawn, without replacement each.
        size: images a subset; where there are fewer, all of them.
        seed: of the subsets.
    """
    size = min(size, len(features_ND), len(reference_ND))
    source = np.random.RandomState(seed)
    # Subtracting what all share costs digits: float64.
    one_ND, two_ND = features_ND.double(), reference_ND.double()
    total = 0.0
    for _ in range(subsets):
        first_M = torch.from_numpy(source.choice(len(one_ND), size, replace=False))
        second_M = torch.from_numpy(source.choice(len(two_ND), size, replace=False))
        total += _squared_discrepancy(one_ND[first_M], two_ND[second_M])
    return total / subsets


def _squared_discrepancy(one_MD: Tensor, two_MD: Tensor) -> float:
    size, dim = one_MD.shape

    def kernel(x_MD: Tensor, y_MD: Tensor) -> Tensor:
        return (x_MD @ y_MD.T / dim + 1.0) ** 3

    own = sum(k_MM.sum() - k_MM.trace() for k_MM in (kernel(one_MD, one_MD), kernel(two_MD, two_MD)))
    return float(own / (size * (size - 1)) - 2.0 * kernel(one_MD, two_MD).mean())
