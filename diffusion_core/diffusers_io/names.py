"""Convert weights and configurations of the network to and from Diffusers' `UNet2DModel`.

Pure functions over names, tensors and JSON; Diffusers itself is not imported. What one side cannot express becomes a
:class:`ConfigError` that names the key, the value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from diffusion_core.checkpoint import MAX_CLASSES
from diffusion_core.config import ConfigError, ModelConfig
from diffusion_core.diffusers_io.values import fixed_problems, is_count, is_list
from diffusion_core.model.norm import NORM_EPSILON
from diffusion_core.model.unet import UNet
from diffusion_core.registries import DATASETS

INDEX_FILE = "model_index.json"
UNET_FILE = "config.json"
WEIGHTS_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
CLASSES_FILE = "classes.json"
EXTRA = "diffusers"
"""What of the source has no knob here and is kept in the checkpoint's `extra` for export."""

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
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names before Diffusers 0.15, which published checkpoints such as google/ddpm-cifar10-32 keep."""

UNET_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
"""What `UNet2DModel` takes a key to be that its config.json leaves out."""

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
"""What each key that we have no knob for must be; the first is what is exported."""


WITHOUT_COUNTERPART: dict[str, Any] = {"conditioning": "bias", "self_conditioning": False, "learned_variance": False}
"""What knobs of our network must be for UNet2DModel, which does not have them."""


def diffusers_name(name: str) -> str:
    """The name of one of our weights in `UNet2DModel`'s state dictionary."""
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


def modern_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers' weights under today's names and shapes: old ones name attention otherwise, some as 1x1 convolutions.

    Raises:
        ConfigError: if a weight is there under both names, or is no floating-point tensor.
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
            raise ConfigError(f"{new_name!r}: is there twice, under its old name and its new one")
        if not tensor.is_floating_point():
            raise ConfigError(f"{name!r}: is of type {tensor.dtype}; expected floating-point weights")
        modern[new_name] = tensor
    return modern


def unet_knobs(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our knobs for the network and its images, from `UNet2DModel`'s config.json.

    Raises:
        ConfigError: with everything in it that our network cannot represent.
    """
    given = UNET_DEFAULTS | dict(config)
    problems = list(_unet_problems(given))
    if problems:
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
    """What in a complete `UNet2DModel` configuration we cannot represent, each with key, value and what is allowed."""

    def problem(key: str, expected: str) -> str:
        return f"{key} = {given[key]!r}: expected {expected}"

    yield from fixed_problems(given, UNET_ALLOWED)
    widths, down, up = given["block_out_channels"], given["down_block_types"], given["up_block_types"]
    if not (is_list(widths) and widths and all(is_count(width) for width in widths)):
        yield problem("block_out_channels", "a list of widths such as [128, 256, 256, 256]")
        return
    if any(width % widths[0] for width in widths):
        yield problem("block_out_channels", f"whole multiples of the first width, {widths[0]}")
    kinds = ("DownBlock2D", "AttnDownBlock2D")
    if not (is_list(down) and len(down) == len(widths) and all(_plain(kind) in kinds for kind in down)):
        yield problem("down_block_types", f"{len(widths)} of DownBlock2D and AttnDownBlock2D")
        return
    mirrored = [_plain(kind).replace("Down", "Up") for kind in reversed(down)]
    if not (is_list(up) and [_plain(kind) for kind in up] == mirrored):
        yield problem("up_block_types", f"the mirror image of down_block_types, {mirrored}")
    size = _square(given["sample_size"])
    if size is None or size % 2 ** (len(widths) - 1):
        yield problem("sample_size", f"one number, a multiple of {2 ** (len(widths) - 1)}")
    if given["in_channels"] not in (1, 3):
        yield problem("in_channels", "1 or 3")
    if given["out_channels"] != given["in_channels"]:
        yield problem("out_channels", f"as many as in_channels, {given['in_channels']}")
    if not is_count(given["layers_per_block"]):
        yield problem("layers_per_block", "one integer >= 1")
    if given["time_embedding_dim"] not in (None, 4 * widths[0]):
        yield problem("time_embedding_dim", f"None or {4 * widths[0]}, four times the first width")
    groups = given["norm_num_groups"]
    if not is_count(groups) or any(width % groups for width in widths):
        yield problem("norm_num_groups", f"a divisor of every width in {list(widths)}")
    if given["attn_norm_num_groups"] not in (None, groups):
        yield problem("attn_norm_num_groups", f"None or norm_num_groups, {groups}")
    head = given["attention_head_dim"]
    if head is not None and not is_count(head):
        yield problem("attention_head_dim", "None or an integer >= 1")
    elif head is not None and (len(_heads(given)) > 1 or any(width % head for width in _attention_widths(given))):
        wide = sorted(_attention_widths(given))
        yield problem("attention_head_dim", f"a divisor that gives equally many heads at the widths {wide}, or None")
    classes = given["num_class_embeds"]
    if classes is not None and not (is_count(classes) and classes <= MAX_CLASSES):
        yield problem("num_class_embeds", f"None or an integer >= 1 and <= {MAX_CLASSES}")


def _plain(kind: Any) -> str:
    """A block's type without the prefix that Diffusers drops as well."""
    return str(kind).removeprefix("UNetRes")


def _square(sample_size: Any) -> int | None:
    """Height and width, if they are given and equal."""
    if is_list(sample_size) and len(sample_size) == 2 and sample_size[0] == sample_size[1]:
        sample_size = sample_size[0]
    return sample_size if is_count(sample_size) else None


def _attention_widths(given: Mapping[str, Any]) -> set[int]:
    """The widths that there is attention at; the middle always has some."""
    widths = given["block_out_channels"]
    attending = {
        width for width, kind in zip(widths, given["down_block_types"], strict=True) if _plain(kind).startswith("Attn")
    }
    return attending | {widths[-1]}


def _heads(given: Mapping[str, Any]) -> set[int]:
    """The numbers of attention heads, of which we can have one."""
    head = given["attention_head_dim"]
    return {width // head if head else 1 for width in _attention_widths(given)}


def _data_knobs(channels: int, size: int | None) -> dict[str, Any]:
    """A data set whose images are of that shape: no more than a place to keep the shape, which is all we know."""
    known = {name: record for name, record in DATASETS.items() if record.path != "required"}
    for name, record in known.items():
        if (record.channels, record.size) == (channels, size):
            return {"data.name": name}
    alike = next(name for name, record in known.items() if record.channels == channels and record.path == "cache")
    return {"data.name": alike, "data.image_size": size}


def unet_config(network: UNet, model: ModelConfig) -> dict[str, Any]:
    """`UNet2DModel`'s configuration for a network of ours, without its labels.

    Raises:
        ConfigError: if it has none.
    """
    for key, value in WITHOUT_COUNTERPART.items():
        if getattr(model, key) != value:
            raise ConfigError(
                f"model.{key} = {getattr(model, key)!r}: cannot be a UNet2DModel that DDPMPipeline samples from; "
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
