"""Names of the blocks of a network, for shares to keep and for sparsity by block."""

from __future__ import annotations

from collections.abc import Sequence


def block_of(name: str) -> str:
    """Return the block of a parameter: ``conv_in``, ``time_mlp``, ``down.0``, ``middle``, ``up.1``, ..."""
    words = name.split(".")
    return ".".join(words[:2]) if words[0] in ("down", "up") else words[0]


def is_conditioning(name: str) -> bool:
    """Return whether a parameter belongs to the path of time and label: its network, or its layer in a block."""
    return not {"time_mlp", "label_embedding", "embed", "embed_scale"}.isdisjoint(name.split("."))


def shared_blocks(levels: int) -> list[str]:
    """Return the blocks of ``prune.block_keep`` of a network with ``levels`` resolutions; ``up.0`` is the lowest."""
    return [*(f"down.{i}" for i in range(levels)), "middle", *(f"up.{i}" for i in range(levels))]


def block_shares(shares: Sequence[float], levels: int) -> dict[str, float]:
    """Return the shares of ``prune.block_keep`` by block: ``down.*``, ``middle``, ``up.*``; empty without shares."""
    return dict(zip(shared_blocks(levels), shares, strict=True)) if shares else {}
