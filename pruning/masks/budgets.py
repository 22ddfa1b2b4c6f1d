"""How many weights each layer keeps: profiles over the layers, and counts that are exact to one weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from pruning.blocks import block_of

Shares = Callable[[Mapping[str, Tensor]], dict[str, float]]
"""Maps weights by name to the amount each layer keeps relative to the others, >= 0. Full layers pass on the rest."""


def uniform(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Return shares with which every layer keeps the same share of its weights."""
    return {name: float(weight.numel()) for name, weight in weights.items()}


def erdos_renyi_kernel(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Return shares with which small layers stay denser (Evci et al. 2020, RigL, section 3, ERK).

    The density of a layer is proportional to ``(n_in + n_out + height + width) / (n_in * n_out * height * width)``, up
    to 1. For linear layers, height and width are omitted.
    """
    return {name: float(sum(weight.shape)) for name, weight in weights.items()}


def by_block(keep: Mapping[str, float], otherwise: float) -> Shares:
    """Return shares with which each layer keeps the share of its block (:func:`block_of`), or ``otherwise``."""

    def shares(weights: Mapping[str, Tensor]) -> dict[str, float]:
        return {name: keep.get(block_of(name), otherwise) * weight.numel() for name, weight in weights.items()}

    return shares


def allot(total: int, shares: Mapping[str, float], most: Mapping[str, int]) -> dict[str, int]:
    """Split a number of weights over layers in proportion, exactly.

    Layers that would get more weights than they have are filled, and the rest is split over the other layers, until it
    fits. Weights left by rounding go to the layers that lost most by rounding; of equals, to the first.

    Args:
        total: number of weights to keep, at most the sum of ``most``.
        shares: proportion of each layer, >= 0.
        most: number of weights of each layer.

    Returns:
        Counts that add up to ``total``, none above ``most``.
    """
    assert 0 <= total <= sum(most.values())
    exact: dict[str, float] = {}
    open_layers = [name for name in shares if most[name]]
    left = float(total)
    while open_layers:
        weight = sum(shares[name] for name in open_layers)
        # If the shares of the remaining layers are all 0, split by size.
        wanted = {name: shares[name] / weight if weight else most[name] for name in open_layers}
        scale = left / sum(wanted.values())
        full = [name for name in open_layers if wanted[name] * scale >= most[name]]
        if not full:
            exact |= {name: wanted[name] * scale for name in open_layers}
            break
        exact |= {name: float(most[name]) for name in full}
        left -= sum(most[name] for name in full)
        open_layers = [name for name in open_layers if name not in full]
    kept = {name: min(most[name], int(exact.get(name, 0.0))) for name in shares}
    # Full layers take no more, so that one pass over the layers may not be enough.
    by_loss = sorted(shares, key=lambda name: kept[name] - exact.get(name, 0.0))
    missing = total - sum(kept.values())
    while missing > 0:
        for name in by_loss:
            if missing and kept[name] < most[name]:
                kept[name] += 1
                missing -= 1
    return kept
