"""The blocks of a network, by name: what a share may be given to, and what figures are broken down by."""

from __future__ import annotations

from collections.abc import Sequence


def block_of(name: str) -> str:
    """The block that a parameter belongs to: ``conv_in``, ``time_mlp``, ``down.0``, ``middle``, ``up.1``, ..."""
    words = name.split(".")
    return ".".join(words[:2]) if words[0] in ("down", "up") else words[0]


def block_names(levels: int) -> list[str]:
    """The blocks that hold weights, in a network of so many resolutions; ``up.0`` is the lowest resolution."""
    return [
        "time_mlp",
        "conv_in",
        *(f"down.{i}" for i in range(levels)),
        "middle",
        *(f"up.{i}" for i in range(levels)),
        "conv_out",
    ]


def block_shares(shares: Sequence[float], levels: int) -> dict[str, float]:
    """Shares by block, from ``prune.block_keep``: of the resolutions on the way down, the middle, and on the way up."""
    names = [name for name in block_names(levels) if name.startswith(("down.", "middle", "up."))]
    return dict(zip(names, shares, strict=True)) if shares else {}
