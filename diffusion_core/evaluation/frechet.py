"""The Fréchet distance of two normal distributions, and the moments that it is taken of.

Axes: N samples, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray | Tensor


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features, in float64.

    Attributes:
        count: samples that they are of, or None where that is not known.
        mean_D: their mean.
        covariance_DD: their covariance.
    """

    count: int | None
    mean_D: Tensor
    covariance_DD: Tensor

    def distance(self, other: Statistics) -> float:
        """Fréchet distance of the normal distributions with these moments."""
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
        return cls(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))

    @classmethod
    def of(cls, features_ND: Tensor) -> Moments:
        moments = cls.empty(features_ND.shape[1])
        moments.add(features_ND)
        return moments

    def add(self, features_ND: Tensor) -> None:
        """Take in more samples, ``(N, D)``."""
        features_ND = features_ND.detach().to(self.sum_D.device, torch.float64)
        self.count += len(features_ND)
        self.sum_D += features_ND.sum(0)
        self.outer_DD.addmm_(features_ND.T, features_ND)

    def statistics(self) -> Statistics:
        """Mean and unbiased covariance, as ``numpy.cov`` gives it; that of a single sample is zero."""
        mean_D = self.sum_D / self.count
        centred_DD = self.outer_DD - self.count * torch.outer(mean_D, mean_D)
        return Statistics(self.count, mean_D, (centred_DD + centred_DD.T) / (2.0 * max(1, self.count - 1)))


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two normal distributions (Dowson & Landau 1982; Heusel et al. 2017).

    ``|mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))``, in float64. With ``S1 = F F^T`` the last trace is the sum
    of the square roots of the eigenvalues of ``F^T S2 F``, which is symmetric: there is no square root of a matrix to
    take, and nothing that can turn complex. Singular covariances are as good as any.

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
    """``F^T S2 F`` for an ``F`` with ``S1 = F F^T``: Cholesky's, or of a singular S1 that of its R eigenvectors, which
    leaves an ``(R, R)`` matrix. Its lower triangle counts.
    """
    factor_DD, failed = torch.linalg.cholesky_ex(sigma1_DD)
    if not failed:
        from scipy.linalg.lapack import dsygst  # torch has none: a third of what two products of matrices take.

        inner_DD, _ = dsygst(sigma2_DD.cpu().numpy(), factor_DD.cpu().numpy(), itype=2, lower=1)
        return torch.from_numpy(inner_DD).to(sigma1_DD.device)
    eigenvalues_D, vectors_DD = torch.linalg.eigh(sigma1_DD)
    kept_D = eigenvalues_D > len(eigenvalues_D) * torch.finfo(torch.float64).eps * eigenvalues_D[-1].clamp(min=0.0)
    factor_DR = vectors_DD[:, kept_D] * eigenvalues_D[kept_D].sqrt()
    return factor_DR.T @ sigma2_DD @ factor_DR
