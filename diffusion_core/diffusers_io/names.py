"""Map the names of weights to and from Diffusers' `UNet2DModel`."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from diffusion_core.config import ConfigError

WHOLE = {
    "time_mlp.0": "time_embedding.linear_1",
    "time_mlp.2": "time_embedding.linear_2",
    "label_embedding": "class_embedding",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
RESIDUAL = {
    "norm1": "norm1",
    "conv1": "conv1",
    "embed": "time_emb_proj",
    "embed_scale": "time_emb_proj",  # Of twice the width: first the scale, then the shift.
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names before Diffusers 0.15, as in published checkpoints such as google/ddpm-cifar10-32."""


def diffusers_name(name: str) -> str:
    """Return the name of one of our weights in the state dictionary of `UNet2DModel`.

    Raises:
        ConfigError: if `UNet2DModel` has no such layer.
    """
    module, _, kind = name.rpartition(".")
    match module.split("."):
        case ["down" | "up" as side, level, "blocks", index, layer] if layer in RESIDUAL:
            return f"{side}_blocks.{level}.resnets.{index}.{RESIDUAL[layer]}.{kind}"
        case ["down" | "up" as side, level, "attentions", index, layer] if layer in ATTENTION:
            return f"{side}_blocks.{level}.attentions.{index}.{ATTENTION[layer]}.{kind}"
        case ["down" | "up" as side, level, "resample", "conv"]:
            return f"{side}_blocks.{level}.{side}samplers.0.conv.{kind}"
        case ["middle", "1", layer] if layer in ATTENTION:
            return f"mid_block.attentions.0.{ATTENTION[layer]}.{kind}"
        case ["middle", "0" | "2" as index, layer] if layer in RESIDUAL:
            return f"mid_block.resnets.{int(index) // 2}.{RESIDUAL[layer]}.{kind}"
    if module in WHOLE:
        return f"{WHOLE[module]}.{kind}"
    raise ConfigError(f"{name!r}: UNet2DModel has no such layer")


def to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our weights. The two projections of a block with scale and shift are stacked into one.

    Raises:
        ConfigError: if `UNet2DModel` has no such layer.
    """
    theirs: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        scale = tensors.get(name.replace(".embed.", ".embed_scale.")) if ".embed." in name else None
        if ".embed_scale." not in name:
            theirs[diffusers_name(name)] = tensor if scale is None else torch.cat([scale, tensor])
    return theirs


def from_diffusers(names: Collection[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a `UNet2DModel` under our ``names``: what :func:`to_diffusers` undoes."""
    ours = {}
    for name in names:
        tensor = tensors[diffusers_name(name)]
        if ".embed_scale." in name:
            tensor = tensor.chunk(2)[0].contiguous()
        elif name.replace(".embed.", ".embed_scale.") in names and ".embed." in name:
            tensor = tensor.chunk(2)[1].contiguous()
        ours[name] = tensor
    return ours


def modern_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape the attention weights of old Diffusers versions, some of which are 1x1 convolutions.

    Raises:
        ConfigError: if a weight occurs under both names, or is not a floating-point tensor.
    """
    modern: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        block, _, layer = path.rpartition(".")
        if ".attentions." in f".{block}.":
            layer = OLD_ATTENTION.get(layer, layer)
            if kind == "weight" and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
                tensor = tensor[:, :, 0, 0]
        new_name = ".".join(part for part in (block, layer, kind) if part)
        if new_name in modern:
            raise ConfigError(f"{new_name!r}: occurs twice, under its old name and its new one")
        if not tensor.is_floating_point():
            raise ConfigError(f"{name!r}: is of type {tensor.dtype}; expected floating-point weights")
        modern[new_name] = tensor
    return modern
