"""Convert the configuration of Diffusers' `UNet2DModel` to our knobs.

What our network cannot express becomes a :class:`ConfigError` with the key, the value and the allowed values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from diffusion_core.checkpoint import MAX_CLASSES
from diffusion_core.config import ConfigError
from diffusion_core.diffusers_io.values import defaults, fixed_problems, is_count, is_list, is_number, problem
from diffusion_core.registries import DATASETS

UNET_ALLOWED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "class_embed_type": (None,),
}
"""Allowed values of the keys that no knob covers; the first one is exported."""

UNET_CHOICES: dict[str, tuple[str, dict[Any, Any]]] = {
    "flip_sin_to_cos": ("time_order", {False: "sin_cos", True: "cos_sin"}),
    "downsample_padding": ("downsample_padding", {0: "end", 1: "both"}),
    "resnet_time_scale_shift": ("conditioning", {"default": "bias", "scale_shift": "scale_shift"}),
}
"""Keys with a knob of ``model.*``, and what their values are called there."""

LEAST_SHIFT = -4096


def unet_knobs(config: Mapping[str, Any], image_size: int | None = None) -> dict[str, Any]:
    """Return our knobs of the network and its images for a config.json of `UNet2DModel`.

    Args:
        config: keys and values; those that are missing have Diffusers' defaults.
        image_size: height and width in pixels, for a configuration without ``sample_size``.

    Raises:
        ConfigError: with all values that our network cannot represent.
    """
    from diffusers import UNet2DModel

    given = defaults(UNet2DModel) | dict(config)
    if given["sample_size"] is None:
        given["sample_size"] = image_size
    elif image_size is not None:
        raise ConfigError(f"--image-size = {image_size}: the model has sample_size = {given['sample_size']}; drop it")
    if problems := list(_unet_problems(given)):
        raise ConfigError(*problems)
    widths, size = given["block_out_channels"], _square(given["sample_size"])
    attention = [_plain(kind) == "AttnDownBlock2D" for kind in given["down_block_types"]]
    embedding = given["time_embedding_dim"]
    return {
        **_data_knobs(given["in_channels"], size),
        "model.channels": widths[0],
        "model.channel_multipliers": [
            width / widths[0] if width % widths[0] else width // widths[0] for width in widths
        ],
        "model.num_res_blocks": given["layers_per_block"],
        "model.attention_resolutions": [size // 2**depth for depth, attends in enumerate(attention) if attends],
        "model.head_channels": given["attention_head_dim"],
        "model.embedding_channels": None if embedding == 4 * widths[0] else embedding,
        "model.frequency_shift": given["freq_shift"],
        "model.dropout": given["dropout"],
        "model.norm_groups": given["norm_num_groups"],
        "model.norm_epsilon": given["norm_eps"],
        "model.class_conditional": given["num_class_embeds"] is not None,
        **{f"model.{knob}": names[given[key]] for key, (knob, names) in UNET_CHOICES.items()},
    }


def _unet_problems(given: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each value that we cannot represent."""
    yield from fixed_problems(given, UNET_ALLOWED)
    yield from fixed_problems(given, {key: tuple(names) for key, (_, names) in UNET_CHOICES.items()})
    widths, down, up = given["block_out_channels"], given["down_block_types"], given["up_block_types"]
    if not (is_list(widths) and widths and all(is_count(width) for width in widths)):
        yield problem(given, "block_out_channels", "a list of widths such as [128, 256, 256, 256]")
        return
    kinds = ("DownBlock2D", "AttnDownBlock2D")
    if not (is_list(down) and len(down) == len(widths) and all(_plain(kind) in kinds for kind in down)):
        yield problem(given, "down_block_types", f"{len(widths)} of DownBlock2D and AttnDownBlock2D")
        return
    mirrored = [_plain(kind).replace("Down", "Up") for kind in reversed(down)]
    if not (is_list(up) and [_plain(kind) for kind in up] == mirrored):
        yield problem(given, "up_block_types", f"the mirror image of down_block_types, {mirrored}")
    size = _square(given["sample_size"])
    if size is None or size % 2 ** (len(widths) - 1):
        hint = "; give it with --image-size" if given["sample_size"] is None else ""
        yield problem(given, "sample_size", f"one number, a multiple of {2 ** (len(widths) - 1)}{hint}")
    if given["in_channels"] not in (1, 3):
        yield problem(given, "in_channels", "1 or 3")
    if given["out_channels"] != given["in_channels"]:
        yield problem(given, "out_channels", f"as many as in_channels, {given['in_channels']}")
    if not is_count(given["layers_per_block"]):
        yield problem(given, "layers_per_block", "one integer >= 1")
    if given["time_embedding_dim"] is not None and not is_count(given["time_embedding_dim"]):
        yield problem(given, "time_embedding_dim", "None or an integer >= 1")
    shift = given["freq_shift"]
    if not (is_number(shift) and LEAST_SHIFT <= shift < widths[0] // 2):
        yield problem(given, "freq_shift", f"a number >= {LEAST_SHIFT} and < {widths[0] // 2}, half of the first width")
    if not (is_number(given["norm_eps"]) and 0 < given["norm_eps"] <= 0.1):
        yield problem(given, "norm_eps", "a number > 0 and <= 0.1")
    yield from _group_problems(given, widths)
    head, attending = given["attention_head_dim"], sorted(_attention_widths(given))
    if head is not None and not (is_count(head) and all(width % head == 0 for width in attending)):
        yield problem(given, "attention_head_dim", f"None or a divisor of the widths with attention, {attending}")
    classes = given["num_class_embeds"]
    if classes is not None and not (is_count(classes) and classes <= MAX_CLASSES):
        yield problem(given, "num_class_embeds", f"None or an integer >= 1 and <= {MAX_CLASSES}")


def _group_problems(given: Mapping[str, Any], widths: list[int]) -> Iterator[str]:
    """Yield what is wrong with the groups of the norms."""
    groups = given["norm_num_groups"]
    if not is_count(groups) or any(width % groups for width in widths):
        yield problem(given, "norm_num_groups", f"a divisor of every width in {list(widths)}")
    # Without this key, a middle block with scale_shift has attention without a norm.
    scaled = given["resnet_time_scale_shift"] == "scale_shift"
    if given["attn_norm_num_groups"] not in ((groups,) if scaled else (None, groups)):
        expected = f"norm_num_groups, {groups}"
        yield problem(given, "attn_norm_num_groups", expected if scaled else f"None or {expected}")


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


def _data_knobs(channels: int, size: int | None) -> dict[str, Any]:
    """Return a data set with images of this shape; only the shape matters, the training data are unknown."""
    known = {name: record for name, record in DATASETS.items() if record.path != "required"}
    for name, record in known.items():
        if (record.channels, record.size) == (channels, size):
            return {"data.name": name}
    alike = next(name for name, record in known.items() if record.channels == channels and record.path == "cache")
    return {"data.name": alike, "data.image_size": size}
