"""Describe one of this project's networks, dense or pruned, as a `UNet2DModel`, or say why it cannot be one.

A `UNet2DModel` has one width for each resolution, one number of groups for all norms, and attention heads of one width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from diffusion_core.config import ConfigError, ModelConfig
from diffusion_core.diffusers_io.names import diffusers_name
from diffusion_core.diffusers_io.unet import UNET_ALLOWED, UNET_CHOICES
from diffusion_core.model.depth import removed_blocks
from diffusion_core.model.structure import structure
from diffusion_core.model.timesteps import kept_frequencies
from diffusion_core.model.unet import AttentionBlock, UNet

WITHOUT_COUNTERPART = ("self_conditioning", "learned_variance")
"""Knobs that have to be off, because `UNet2DModel` has nothing that DDPMPipeline uses."""

REMEDY = "prune with prune.widths=diffusers"


def knob_problems(model: ModelConfig, size: int, given: int = 0) -> Iterator[str]:
    """Yield the knobs with which no `UNet2DModel` computes the same, dense or pruned.

    Args:
        model: the knobs of the network.
        size: height and width of the images in pixels.
        given: further channels of the network's input, for upsampling.
    """
    if given:
        yield "upsample.factor: DDPMPipeline gives the network no small image to upsample; expected None"
    for key in WITHOUT_COUNTERPART:
        if getattr(model, key):
            yield f"model.{key} = True: UNet2DModel has no counterpart that DDPMPipeline uses; expected False"
    if model.channel_multipliers[0] != 1:
        yield (
            f"model.channel_multipliers = {model.channel_multipliers}: UNet2DModel's first convolution is as wide as "
            f"its first blocks; expected 1 at first"
        )
    if model.num_heads > 1:
        attending = {
            width for depth, width in enumerate(model.widths) if size // 2**depth in model.attention_resolutions
        }
        heads = sorted({width // model.num_heads for width in attending | {model.widths[-1]}})
        if len(heads) > 1:
            yield (
                f"model.num_heads = {model.num_heads}: UNet2DModel has heads of one width; here they would be "
                f"{', '.join(map(str, heads))} wide; expected 1, attention at one width, or model.head_channels"
            )


def unet_config(network: UNet, model: ModelConfig) -> dict[str, Any]:
    """Return the configuration of the `UNet2DModel` that computes the same as a network, without its labels.

    Raises:
        ConfigError: if `UNet2DModel` cannot represent the network; the message names a knob or a layer.
    """
    for line in knob_problems(model, network.image_size, network.given_channels):
        raise ConfigError(line)
    if gone := removed_blocks(network):
        raise ConfigError(f"{gone[0]}: was removed as a whole, but UNet2DModel has all blocks; {REMEDY}")
    pruned = bool(structure(network, model))
    widths = [level.blocks[-1].conv2.out_channels for level in network.down]  # type: ignore[index, union-attr]
    attention = [network.image_size // 2**depth in model.attention_resolutions for depth in range(len(widths))]
    prefixes = ["Attn" if attends else "" for attends in attention]
    groups = _norm_groups(network, model, pruned)
    settings = {
        **{key: values[0] for key, values in UNET_ALLOWED.items()},
        **{
            key: next(theirs for theirs, ours in names.items() if ours == getattr(model, knob))
            for key, (knob, names) in UNET_CHOICES.items()
        },
        "sample_size": network.image_size,
        "in_channels": network.in_channels,
        "out_channels": network.in_channels,
        "down_block_types": [f"{prefix}DownBlock2D" for prefix in prefixes],
        "up_block_types": [f"{prefix}UpBlock2D" for prefix in reversed(prefixes)],
        "block_out_channels": widths,
        "layers_per_block": model.num_res_blocks,
        "dropout": model.dropout,
        "attention_head_dim": _head_width(network, model),
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups if model.conditioning == "scale_shift" else None,
        "norm_eps": model.norm_epsilon,
        "freq_shift": _frequency_shift(network),
    }
    embedding = network.time_mlp[0].out_features
    if embedding != 4 * widths[0]:
        settings["time_embedding_dim"] = embedding
    _check_shapes(network, settings)
    return settings


def _norm_groups(network: UNet, model: ModelConfig, pruned: bool) -> int:
    """Return the number of groups of all norms."""
    norms = {name: module for name, module in network.named_modules() if isinstance(module, nn.GroupNorm)}
    found = sorted({norm.num_groups for norm in norms.values()})
    if len(found) == 1:
        return found[0]
    if pruned:
        name = next(name for name, norm in norms.items() if norm.num_groups == found[0])
        raise ConfigError(
            f"{name}: has {found[0]} groups where other norms have {found[-1]}, but UNet2DModel has one number of "
            f"groups; {REMEDY}"
        )
    raise ConfigError(
        f"model.norm_groups = {model.norm_groups}: UNet2DModel has one number of groups; here they are "
        f"{', '.join(map(str, found))}; expected a divisor of every width"
    )


def _head_width(network: UNet, model: ModelConfig) -> int | None:
    """Return the width of all attention heads; None if every layer has one head."""
    if model.num_heads == 1 and model.head_channels is None:
        return None
    heads = {
        name: module.query.out_features // module.heads
        for name, module in network.named_modules()
        if isinstance(module, AttentionBlock)
    }
    first, width = next(iter(heads.items()))
    for name, other in heads.items():
        if other != width:
            raise ConfigError(
                f"{name}: has heads of {other} channels and {first} has heads of {width}, but UNet2DModel has heads of "
                f"one width; {REMEDY}"
            )
    return width


def _frequency_shift(network: UNet) -> float:
    """Return `freq_shift`, with which fewer features have the frequencies that the network has kept."""
    kept, half = network.time_features, network.width // 2
    stride = kept_frequencies(network.width, kept).step
    # With all frequencies, this is the network's own shift to the bit.
    shift = (
        kept // 2 - half + network.frequency_shift
        if stride == 1
        else (kept // 2 - (half - network.frequency_shift) / stride)
    )
    return int(shift) if float(shift).is_integer() else shift


def _check_shapes(network: UNet, settings: dict[str, Any]) -> None:
    """Raise ConfigError if a layer has another width than that of its resolution, and name it."""
    from diffusers import UNet2DModel

    with torch.device("meta"):
        expected = UNet2DModel(**settings).state_dict()
    for name, module in network.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if name == "label_embedding" or name.endswith(".embed_scale"):
                continue
            theirs = expected.get(diffusers_name(f"{name}.{kind}"))
            shape = list(parameter.shape)
            if theirs is None:
                raise ConfigError(f"{name}: UNet2DModel has no such layer between equal widths; {REMEDY}")
            wanted = list(theirs.shape)
            if name.endswith(".embed") and settings["resnet_time_scale_shift"] == "scale_shift":
                wanted[0] //= 2
            if shape != wanted:
                raise ConfigError(
                    f"{name}: its {kind} is {_times(shape)}, but that of a UNet2DModel, which has one width for each "
                    f"resolution, is {_times(wanted)}; {REMEDY}"
                )


def _times(shape: list[int]) -> str:
    return " x ".join(map(str, shape))
