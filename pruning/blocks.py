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


def block_shares(entries: Sequence[str], levels: int) -> dict[str, float]:
    """Shares by block, from entries such as ``down.0:0.5``.

    Raises:
        ValueError: if an entry is none, in one line that says what is allowed.
    """
    names, shares = block_names(levels), dict[str, float]()
    for entry in entries:
        name, _, text = entry.partition(":")
        try:
            share = float(text)
        except ValueError:
            share = 0.0
        if name not in names or not 0.0 < share <= 1.0:
            raise ValueError(
                f"{entry!r}: expected a block and the share that stays, > 0 and <= 1, such as {names[2]}:0.5; the "
                f"blocks are {', '.join(names)}"
            )
        shares[name] = share
    return shares
