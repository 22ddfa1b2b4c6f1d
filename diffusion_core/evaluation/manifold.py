"""How much of the generated images lies among the real ones, and how much of the real ones is covered.

Both sets are seen as balls around each image that reach to its k-th nearest neighbour in its own set.

Axes: N generated images, M real ones, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

PRECISION_NEIGHBOURS = 3
"""k of precision and recall (Kynkaanniemi et al. 2019)."""

DENSITY_NEIGHBOURS = 5
"""k of density and coverage (Naeem et al. 2020)."""

ROWS_AT_ONCE = 1000


def precision_recall(
    features_ND: Tensor, reference_MD: Tensor, *, neighbours: int = PRECISION_NEIGHBOURS
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1 and 2), in [0, 1].

    Precision: share of the generated images inside the ball of some real one. Recall: the same, the other way round.
    """
    radius_M = _radii(reference_MD, neighbours)
    radius_N = _radii(features_ND, neighbours)
    inside_N, covered_M = [], []
    for rows_ND in features_ND.split(ROWS_AT_ONCE):
        inside_N.append((torch.cdist(rows_ND, reference_MD) <= radius_M).any(1))
    for rows_MD in reference_MD.split(ROWS_AT_ONCE):
        covered_M.append((torch.cdist(rows_MD, features_ND) <= radius_N).any(1))
    return float(torch.cat(inside_N).float().mean()), float(torch.cat(covered_M).float().mean())


def density_coverage(
    features_ND: Tensor, reference_MD: Tensor, *, neighbours: int = DENSITY_NEIGHBOURS
) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, eq. 4 and 5).

    Density: in how many balls of real images a generated one lies, relative to k (it may exceed 1). Coverage: share of
    the real images whose ball holds a generated one.
    """
    neighbours = min(neighbours, len(reference_MD) - 1)
    radius_M = _radii(reference_MD, neighbours)
    balls = 0
    covered_M = torch.zeros(len(reference_MD), dtype=torch.bool, device=reference_MD.device)
    for rows_ND in features_ND.split(ROWS_AT_ONCE):
        inside_NM = torch.cdist(rows_ND, reference_MD) <= radius_M
        balls += int(inside_NM.sum())
        covered_M |= inside_NM.any(0)
    return balls / (neighbours * len(features_ND)), float(covered_M.float().mean())


def _radii(features_MD: Tensor, neighbours: int) -> Tensor:
    """Distance of each image to its k-th nearest neighbour (of so few images, to the farthest), ``(M,)``."""
    nearest = min(neighbours + 1, len(features_MD))  # An image is its own nearest one.
    # The largest of the nearest ones; kthvalue has no deterministic algorithm on a GPU.
    distances = (torch.cdist(rows_MD, features_MD) for rows_MD in features_MD.split(ROWS_AT_ONCE))
    return torch.cat([each.topk(nearest, dim=1, largest=False, sorted=False).values.amax(1) for each in distances])
