"""Widths and removed blocks of a pruned network, as plain JSON: enough to rebuild it without a pickled module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffusion_core.config import ModelConfig
from diffusion_core.model.depth import REMOVED, remove_blocks, removed_blocks
from diffusion_core.model.unet import UNet

Structure = dict[str, dict[str, int]]
"""Maps names of modules to the sizes that differ from those of the dense network, and names of removed blocks to
:data:`diffusion_core.model.depth.REMOVED`. Empty for a dense network."""

SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("in_channels", "out_channels"),
    nn.Linear: ("in_features", "out_features"),
    nn.GroupNorm: ("num_channels", "num_groups"),
    nn.Embedding: ("embedding_dim",),
}


def sizes(module: nn.Module) -> dict[str, int]:
    """Return the sizes of a module that pruning may change; empty if it has none."""
    return {name: getattr(module, name) for name in SIZES.get(type(module), ())}


def dense_like(network: UNet, model: ModelConfig) -> UNet:
    """Return the dense network of the same configuration as a network, which may be pruned, without weights (meta).

    Args:
        network: the network.
        model: its section of the configuration.
    """
    with torch.device("meta"):
        return UNet(model, network.image_size, network.in_channels, network.num_classes, network.given_channels)


def structure(network: UNet, model: ModelConfig) -> Structure:
    """Return the sizes and removed blocks in which a network differs from the dense one of the same configuration."""
    dense_sizes = {name: sizes(module) for name, module in dense_like(network, model).named_modules()}
    now = {name: sizes(module) for name, module in network.named_modules()}
    now |= {name: dict(REMOVED) for name in removed_blocks(network)}
    return {name: size for name, size in now.items() if size != dense_sizes[name]}


def resize(network: UNet, widths: Structure) -> None:
    """Give a dense network the structure of a pruned one, in place. The weights of resized layers are zero.

    Raises:
        ValueError: if the network has no such block, module or size, or a size is not in 1..the dense size.
    """
    gone = [name for name, new_sizes in widths.items() if new_sizes == REMOVED]
    remove_blocks(network, gone)
    modules = dict(network.named_modules())
    for name, new_sizes in widths.items():
        if name in gone:
            continue
        module = modules.get(name)
        if module is None or set(new_sizes) != set(sizes(module)):
            raise ValueError(f"structure of {name!r}: the network has no such layer, or it has other sizes")
        if any(not isinstance(size, int) or not 1 <= size <= getattr(module, key) for key, size in new_sizes.items()):
            raise ValueError(f"structure of {name!r} = {new_sizes}: expected 1 to the dense sizes {sizes(module)}")
        for key, size in new_sizes.items():
            setattr(module, key, size)
        for parameter_name, shape in _parameter_shapes(module).items():
            setattr(module, parameter_name, nn.Parameter(torch.zeros(shape)))


def _parameter_shapes(module: Any) -> dict[str, tuple[int, ...]]:
    if isinstance(module, nn.GroupNorm):
        return {"weight": (module.num_channels,), "bias": (module.num_channels,)}
    if isinstance(module, nn.Embedding):
        return {"weight": (module.num_embeddings, module.embedding_dim)}
    if isinstance(module, nn.Linear):
        return {"weight": (module.out_features, module.in_features), "bias": (module.out_features,)}
    return {"weight": (module.out_channels, module.in_channels, *module.kernel_size), "bias": (module.out_channels,)}


def maskable(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights that may be pruned, detached: those of convolutions and linear layers.

    Biases, gains of norms, and the label embedding are never pruned.
    """
    return {
        f"{name}.weight": module.weight.detach()
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
