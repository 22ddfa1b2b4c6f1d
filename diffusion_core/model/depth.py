"""Whole blocks of a network, and networks without some of them.

A residual block that is removed leaves its shortcut: nothing where its channels in and out are equal, its 1 x 1
convolution where they differ. That is so for all blocks on the way up, whose input is the stream and a skip connection
side by side. An attention block leaves nothing. All other layers, and the names of all weights, stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from diffusion_core.model.unet import AttentionBlock, ResidualBlock, UNet

REMOVED = {"removed": 1}
"""What stands for a removed block in the structure of a network, in place of sizes."""


class RemovedResidual(nn.Module):
    """What a removed residual block leaves: its shortcut.

    Args:
        skip: the shortcut of the block, the identity or a 1 x 1 convolution.
    """

    def __init__(self, skip: nn.Module) -> None:
        super().__init__()
        self.skip = skip

    def forward(self, x_BCHW: Tensor, _embedding_BE: Tensor) -> Tensor:
        """Map x, ``(B, C_in, H, W)``, to ``(B, C_out, H, W)``, whatever the embedding."""
        return self.skip(x_BCHW)


class RemovedAttention(nn.Module):
    """What a removed attention block leaves: the identity."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the input."""
        return x_BCHW


def removable_blocks(network: UNet) -> list[str]:
    """Return the names of the residual and attention blocks that a network has, in its order."""
    return [name for name, module in network.named_modules() if isinstance(module, ResidualBlock | AttentionBlock)]


def removed_blocks(network: UNet) -> list[str]:
    """Return the names of the blocks that were removed from a network, in its order."""
    return [name for name, module in network.named_modules() if isinstance(module, RemovedResidual | RemovedAttention)]


def residual_blocks(network: UNet) -> list[str]:
    """Return the names of the residual blocks that a network has. Time and label enter it through these alone."""
    return [name for name, module in network.named_modules() if isinstance(module, ResidualBlock)]


def removal_problem(network: UNet, names: Sequence[str]) -> str | None:
    """Return why blocks cannot be removed from a network, in one line after their names; None if they can."""
    known = removable_blocks(network)
    for name in names:
        if name not in known:
            shown = ", ".join(known)
            return f"{name!r} is no block that can be removed; expected residual or attention blocks: {shown}"
    if len(set(names)) != len(names):
        return "names a block twice"
    if set(residual_blocks(network)) <= set(names):
        return "would remove all residual blocks, through which time and label enter the network; leave at least one"
    return None


def remove_blocks(network: UNet, names: Iterable[str]) -> None:
    """Remove blocks from a network, in place.

    Raises:
        ValueError: if it has no such block, or no residual block would be left. Then nothing has changed.
    """
    wanted = list(names)
    if wanted and (problem := removal_problem(network, wanted)):
        raise ValueError(f"blocks to remove: {problem}")
    for name in wanted:
        _swap(network, name)


@contextmanager
def without_block(network: UNet, name: str) -> Iterator[None]:
    """Remove one block inside this context, and put it back afterwards."""
    block = _swap(network, name)
    try:
        yield
    finally:
        _put(network, name, block)


def _swap(network: UNet, name: str) -> nn.Module:
    """Replace a block by what it leaves, and return it."""
    block = network.get_submodule(name)
    rest = RemovedResidual(block.skip) if isinstance(block, ResidualBlock) else RemovedAttention()
    _put(network, name, rest.train(block.training))
    return block


def _put(network: UNet, name: str, module: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    setattr(network.get_submodule(parent), key, module)
