"""The Inception score (Salimans et al. 2016): how sure a classifier is, and of how many classes.

Axes: N images, K classes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

SPLITS = 10
SEED = 2020
"""As in torch-fidelity, so that figures are equal."""


def inception_score(logits_NK: Tensor, *, splits: int = SPLITS, seed: int = SEED) -> float:
    """Mean over parts of ``exp(E[KL(p(y|x) | p(y))])``, between 1 and the number of classes.

    Args:
        logits_NK: of the images.
        splits: parts that the images, in random order, are dealt out to.
        seed: of that order.
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
