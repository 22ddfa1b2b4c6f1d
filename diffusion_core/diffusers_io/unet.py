"""Convert the configuration of the network to and from Diffusers' `UNet2DModel`.

What the other side cannot express becomes a :class:`ConfigError` with the key, the value and the allowed values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from diffusion_core.checkpoint import MAX_CLASSES
from diffusion_core.config import ConfigError, ModelConfig
from diffusion_core.diffusers_io.values import defaults, fixed_problems, is_count, is_list, problem
from diffusion_core.model.norm import NORM_EPSILON
from diffusion_core.model.unet import UNet
from diffusion_core.registries import DATASETS

UNET_ALLOWED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "freq_shift": (1,),
    "flip_sin_to_cos": (False,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (0,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "norm_eps": (NORM_EPSILON,),
    "resnet_time_scale_shift": ("default",),
    "add_attention": (True,),
    "class_embed_type": (None,),
}
"""Allowed values of the keys that no knob covers; the first one is exported."""

WITHOUT_COUNTERPART: dict[str, Any] = {"conditioning": "bias", "self_conditioning": False, "learned_variance": False}
"""Required values of the knobs that UNet2DModel does not have."""


def unet_knobs(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return our knobs of the network and its images for a config.json of `UNet2DModel`.

    Raises:
        ConfigError: with all values that our network cannot represent.
    """
    from diffusers import UNet2DModel

    given = defaults(UNet2DModel) | dict(config)
    if problems := list(_unet_problems(given)):
        raise ConfigError(*problems)
    widths, size = given["block_out_channels"], _square(given["sample_size"])
    attention = [_plain(kind) == "AttnDownBlock2D" for kind in given["down_block_types"]]
    return {
        **_data_knobs(given["in_channels"], size),
        "model.channels": widths[0],
        "model.channel_multipliers": [width // widths[0] for width in widths],
        "model.num_res_blocks": given["layers_per_block"],
        "model.attention_resolutions": [size // 2**depth for depth, attends in enumerate(attention) if attends],
        "model.num_heads": _heads(given).pop(),
        "model.dropout": given["dropout"],
        "model.norm_groups": given["norm_num_groups"],
        "model.class_conditional": given["num_class_embeds"] is not None,
    }


def _unet_problems(given: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each value that we cannot represent."""
    yield from fixed_problems(given, UNET_ALLOWED)
    widths, down, up = given["block_out_channels"], given["down_block_types"], given["up_block_types"]
    if not (is_list(widths) and widths and all(is_count(width) for width in widths)):
        yield problem(given, "block_out_channels", "a list of widths such as [128, 256, 256, 256]")
        return
    if any(width % widths[0] for width in widths):
        yield problem(given, "block_out_channels", f"whole multiples of the first width, {widths[0]}")
    kinds = ("DownBlock2D", "AttnDownBlock2D")
    if not (is_list(down) and len(down) == len(widths) and all(_plain(kind) in kinds for kind in down)):
        yield problem(given, "down_block_types", f"{len(widths)} of DownBlock2D and AttnDownBlock2D")
        return
    mirrored = [_plain(kind).replace("Down", "Up") for kind in reversed(down)]
    if not (is_list(up) and [_plain(kind) for kind in up] == mirrored):
        yield problem(given, "up_block_types", f"the mirror image of down_block_types, {mirrored}")
    size = _square(given["sample_size"])
    if size is None or size % 2 ** (len(widths) - 1):
        yield problem(given, "sample_size", f"one number, a multiple of {2 ** (len(widths) - 1)}")
    if given["in_channels"] not in (1, 3):
        yield problem(given, "in_channels", "1 or 3")
    if given["out_channels"] != given["in_channels"]:
        yield problem(given, "out_channels", f"as many as in_channels, {given['in_channels']}")
    if not is_count(given["layers_per_block"]):
        yield problem(given, "layers_per_block", "one integer >= 1")
    if given["time_embedding_dim"] not in (None, 4 * widths[0]):
        yield problem(given, "time_embedding_dim", f"None or {4 * widths[0]}, four times the first width")
    groups = given["norm_num_groups"]
    if not is_count(groups) or any(width % groups for width in widths):
        yield problem(given, "norm_num_groups", f"a divisor of every width in {list(widths)}")
    if given["attn_norm_num_groups"] not in (None, groups):
        yield problem(given, "attn_norm_num_groups", f"None or norm_num_groups, {groups}")
    head = given["attention_head_dim"]
    if head is not None and not is_count(head):
        yield problem(given, "attention_head_dim", "None or an integer >= 1")
    elif head is not None and (len(_heads(given)) > 1 or any(width % head for width in _attention_widths(given))):
        wide = sorted(_attention_widths(given))
        yield problem(
            given, "attention_head_dim", f"a divisor that gives equally many heads at the widths {wide}, or None"
        )
    classes = given["num_class_embeds"]
    if classes is not None and not (is_count(classes) and classes <= MAX_CLASSES):
        yield problem(given, "num_class_embeds", f"None or an integer >= 1 and <= {MAX_CLASSES}")


def _plain(kind: Any) -> str:
    """Return a block type without the old prefix that Diffusers drops too."""
    return str(kind).removeprefix("UNetRes")


def _square(sample_size: Any) -> int | None:
    """Return height and width in pixels if they are given and equal."""
    if is_list(sample_size) and len(sample_size) == 2 and sample_size[0] == sample_size[1]:
        sample_size = sample_size[0]
    return sample_size if is_count(sample_size) else None


def _attention_widths(given: Mapping[str, Any]) -> set[int]:
    """Return the widths of all blocks with attention; the middle block always has it."""
    widths = given["block_out_channels"]
    attending = {
        width for width, kind in zip(widths, given["down_block_types"], strict=True) if _plain(kind).startswith("Attn")
    }
    return attending | {widths[-1]}


def _heads(given: Mapping[str, Any]) -> set[int]:
    """Return the numbers of attention heads; our network can have only one."""
    head = given["attention_head_dim"]
    return {width // head if head else 1 for width in _attention_widths(given)}


def _data_knobs(channels: int, size: int | None) -> dict[str, Any]:
    """Return a data set with images of this shape; only the shape matters, the training data are unknown."""
    known = {name: record for name, record in DATASETS.items() if record.path != "required"}
    for name, record in known.items():
        if (record.channels, record.size) == (channels, size):
            return {"data.name": name}
    alike = next(name for name, record in known.items() if record.channels == channels and record.path == "cache")
    return {"data.name": alike, "data.image_size": size}


def unet_config(network: UNet, model: ModelConfig) -> dict[str, Any]:
    """Return the configuration of `UNet2DModel` for a network of ours, without its labels.

    Raises:
        ConfigError: if `UNet2DModel` cannot represent the network.
    """
    for key, value in WITHOUT_COUNTERPART.items():
        if getattr(model, key) != value:
            raise ConfigError(
                f"model.{key} = {getattr(model, key)!r}: UNet2DModel has no counterpart that DDPMPipeline uses; "
                f"expected {value!r}"
            )
    if model.channel_multipliers[0] != 1:
        raise ConfigError(
            f"model.channel_multipliers = {model.channel_multipliers}: UNet2DModel's first convolution is as wide as "
            f"its first blocks; expected 1 at first"
        )
    widths = [model.channels * multiplier for multiplier in model.channel_multipliers]
    attention = [network.image_size // 2**depth in model.attention_resolutions for depth in range(len(widths))]
    heads = {width // model.num_heads for width, attends in zip(widths, attention, strict=True) if attends}
    heads.add(widths[-1] // model.num_heads)
    if model.num_heads > 1 and len(heads) > 1:
        raise ConfigError(
            f"model.num_heads = {model.num_heads}: UNet2DModel has heads of one width; here they would be "
            f"{', '.join(map(str, sorted(heads)))} wide; expected 1, or attention at one width"
        )
    groups = {module.num_groups for module in network.modules() if isinstance(module, nn.GroupNorm)}
    if len(groups) > 1:
        raise ConfigError(
            f"model.norm_groups = {model.norm_groups}: UNet2DModel has one number of groups; here they are "
            f"{', '.join(map(str, sorted(groups)))}; expected a divisor of every width"
        )
    prefixes = ["Attn" if attends else "" for attends in attention]
    return {
        **{key: values[0] for key, values in UNET_ALLOWED.items()},
        "sample_size": network.image_size,
        "in_channels": network.in_channels,
        "out_channels": network.in_channels,
        "down_block_types": [f"{prefix}DownBlock2D" for prefix in prefixes],
        "up_block_types": [f"{prefix}UpBlock2D" for prefix in reversed(prefixes)],
        "block_out_channels": widths,
        "layers_per_block": model.num_res_blocks,
        "dropout": model.dropout,
        "attention_head_dim": heads.pop() if model.num_heads > 1 else None,
        "norm_num_groups": groups.pop(),
    }
