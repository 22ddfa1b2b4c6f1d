"""Distances between sets of features: Fréchet (FID) and kernel (KID) distance, Inception score, precision and recall,
density and coverage.

Axes: N, M samples, D features, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray | Tensor

SUBSETS = 100
SUBSET_SIZE = 1000
KERNEL_SEED = 2020
"""Defaults of torch-fidelity; the subsets are the same, so that figures are equal."""

PRECISION_NEIGHBOURS = 3
"""k of precision and recall (Kynkaanniemi et al. 2019)."""

DENSITY_NEIGHBOURS = 5
"""k of density and coverage (Naeem et al. 2020)."""

ROWS_AT_ONCE = 1000

SPLITS = 10
SCORE_SEED = 2020
"""Defaults of torch-fidelity, so that figures are equal."""


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features, in float64.

    Attributes:
        count: number of samples, or None if it is unknown.
        mean_D: mean.
        covariance_DD: covariance.
    """

    count: int | None
    mean_D: Tensor
    covariance_DD: Tensor

    def distance(self, other: Statistics) -> float:
        """Return the squared Fréchet distance of the normal distributions with these moments."""
        return frechet_distance(self.mean_D, self.covariance_DD, other.mean_D, other.covariance_DD)


@dataclass
class Moments:
    """Sums of features and of their outer products, streamed in float64.

    Attributes:
        count: samples so far, N.
        sum_D: their sum.
        outer_DD: sum of their outer products.
    """

    count: int
    sum_D: Tensor
    outer_DD: Tensor

    @classmethod
    def empty(cls, dim: int) -> Moments:
        """Return the moments of no samples, whose features have dimension ``dim``."""
        return cls(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))

    @classmethod
    def of(cls, features_ND: Tensor) -> Moments:
        """Return the moments of features, ``(N, D)``."""
        moments = cls.empty(features_ND.shape[1])
        moments.add(features_ND)
        return moments

    def add(self, features_ND: Tensor) -> None:
        """Add more samples, ``(N, D)``."""
        features_ND = features_ND.detach().to(self.sum_D.device, torch.float64)
        self.count += len(features_ND)
        self.sum_D += features_ND.sum(0)
        self.outer_DD.addmm_(features_ND.T, features_ND)

    def statistics(self) -> Statistics:
        """Return mean and unbiased covariance, as ``numpy.cov``; the covariance of a single sample is zero."""
        mean_D = self.sum_D / self.count
        centred_DD = self.outer_DD - self.count * torch.outer(mean_D, mean_D)
        return Statistics(self.count, mean_D, (centred_DD + centred_DD.T) / (2.0 * max(1, self.count - 1)))


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Return the squared Fréchet distance of two normal distributions (Dowson & Landau 1982; Heusel et al. 2017).

    ``|mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))``, in float64. With ``S1 = F F^T`` the last trace is the sum
    of the square roots of the eigenvalues of ``F^T S2 F``, which is symmetric. This needs no square root of a
    matrix and yields no complex numbers, and covariances may be singular.

    Args:
        mu1, mu2: means, ``(D,)``; arrays or tensors.
        sigma1, sigma2: covariances, ``(D, D)``, symmetric and positive semidefinite.

    Raises:
        ValueError: if shapes do not match, or a value is not finite.
    """
    mu1_D, mu2_D = (torch.as_tensor(mu).to(torch.float64).reshape(-1) for mu in (mu1, mu2))
    sigma1_DD, sigma2_DD = (torch.as_tensor(sigma).to(torch.float64) for sigma in (sigma1, sigma2))
    dim = len(mu1_D)
    sigma1_DD, sigma2_DD = (sigma.reshape(1, 1) if sigma.ndim == 0 else sigma for sigma in (sigma1_DD, sigma2_DD))
    if len(mu2_D) != dim or sigma1_DD.shape != (dim, dim) or sigma2_DD.shape != (dim, dim):
        raise ValueError(
            f"Fréchet distance of means of {dim} and {len(mu2_D)} features, covariances of {tuple(sigma1_DD.shape)} "
            f"and {tuple(sigma2_DD.shape)}: expected equal sizes"
        )
    if not all(torch.isfinite(part).all() for part in (mu1_D, mu2_D, sigma1_DD, sigma2_DD)):
        raise ValueError("Fréchet distance: a mean or a covariance is not finite")
    eigenvalues_R = torch.linalg.eigvalsh(_inner(sigma1_DD, sigma2_DD))
    cross = eigenvalues_R.clamp(min=0.0).sqrt().sum()
    distance = (mu1_D - mu2_D).square().sum() + sigma1_DD.trace() + sigma2_DD.trace() - 2.0 * cross
    return float(distance.clamp(min=0.0))


def _inner(sigma1_DD: Tensor, sigma2_DD: Tensor) -> Tensor:
    """Return ``F^T S2 F`` for a factor ``F`` with ``S1 = F F^T``. Only the lower triangle of the result is valid.

    The factor is Cholesky's, ``(D, D)``. If S1 is singular, it consists of R scaled eigenvectors, ``(D, R)``.
    """
    factor_DD, failed = torch.linalg.cholesky_ex(sigma1_DD)
    if not failed:
        from scipy.linalg.lapack import dsygst  # A third of the time of two matrix products. torch lacks it.

        inner_DD, _ = dsygst(sigma2_DD.cpu().numpy(), factor_DD.cpu().numpy(), itype=2, lower=1)
        return torch.from_numpy(inner_DD).to(sigma1_DD.device)
    eigenvalues_D, vectors_DD = torch.linalg.eigh(sigma1_DD)
    kept_D = eigenvalues_D > len(eigenvalues_D) * torch.finfo(torch.float64).eps * eigenvalues_D[-1].clamp(min=0.0)
    factor_DR = vectors_DD[:, kept_D] * eigenvalues_D[kept_D].sqrt()
    return factor_DR.T @ sigma2_DD @ factor_DR


def kernel_distance(
    features_ND: Tensor,
    reference_ND: Tensor,
    *,
    subsets: int = SUBSETS,
    size: int = SUBSET_SIZE,
    seed: int = KERNEL_SEED,
) -> float:
    """Return the mean over random subsets of the unbiased estimate of ``MMD^2`` with ``k(x, y) = (x y / D + 1)^3``.

    Args:
        features_ND: features of generated images.
        reference_ND: features of real images; the numbers of images may differ.
        subsets: number of subsets, each drawn without replacement.
        size: images per subset; all images if there are fewer.
        seed: seed of the subsets.
    """
    size = min(size, len(features_ND), len(reference_ND))
    source = np.random.RandomState(seed)
    # float64: the difference of large sums loses digits.
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


def precision_recall(
    features_ND: Tensor, reference_MD: Tensor, *, neighbours: int = PRECISION_NEIGHBOURS
) -> tuple[float, float]:
    """Return improved precision and recall (Kynkaanniemi et al. 2019, eq. 1 and 2), in [0, 1].

    Precision: share of generated images inside the ball of a real one. Recall: share of real images inside the ball of
    a generated one. The radius of a ball is the distance to the k-th nearest neighbour.
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
    """Return density and coverage (Naeem et al. 2020, eq. 4 and 5).

    Density: mean number of balls of real images around a generated one, divided by k; >= 0 and may exceed 1. Coverage:
    share of real images whose ball contains a generated one, in [0, 1].
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
    """Return the distance of each image to its k-th nearest neighbour, or to the farthest of fewer images, ``(M,)``."""
    nearest = min(neighbours + 1, len(features_MD))  # The nearest one is the image itself.
    # kthvalue has no deterministic algorithm on a GPU.
    distances = (torch.cdist(rows_MD, features_MD) for rows_MD in features_MD.split(ROWS_AT_ONCE))
    return torch.cat([each.topk(nearest, dim=1, largest=False, sorted=False).values.amax(1) for each in distances])


def inception_score(logits_NK: Tensor, *, splits: int = SPLITS, seed: int = SCORE_SEED) -> float:
    """Return the mean over parts of ``exp(E[KL(p(y|x) | p(y))])``, between 1 and the number of classes.

    Args:
        logits_NK: class logits of the images.
        splits: number of parts that the images are split into, in random order.
        seed: seed of that order.
    """
    total = len(logits_NK)
    splits = min(splits, total)
    order_N = torch.from_numpy(np.random.RandomState(seed).permutation(total))
    log_p_NK = logits_NK.double()[order_N].log_softmax(1)
    scores = []
    for part in range(splits):
        log_p = log_p_NK[part * total // splits : (part + 1) * total // splits]
        marginal = log_p.logsumexp(0) - math.log(len(log_p))
        scores.append(float((log_p.exp() * (log_p - marginal)).sum(1).mean().exp()))
    return float(np.mean(scores))
