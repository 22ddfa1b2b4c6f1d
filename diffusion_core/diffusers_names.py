"""Diffusers' names for what this network and its noise schedule are: weights, `UNet2DModel`, `DDPMScheduler`.

Pure functions over names, tensors and JSON; Diffusers itself is not imported.
What one side cannot express becomes a :class:`ConfigError` that names the key, the value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_core.checkpoint import MAX_CLASSES
from diffusion_core.config import IMAGE_SHAPES, CoreConfig, DiffusionConfig, ModelConfig
from diffusion_core.config_io import ConfigError
from diffusion_core.norm import NORM_EPSILON
from diffusion_core.schedule import MAX_BETA, NoiseSchedule, build_schedule, cosine_betas, zero_terminal_snr
from diffusion_core.unet import UNet

INDEX_FILE = "model_index.json"
UNET_FILE = "config.json"
SCHEDULER_FILE = "scheduler_config.json"
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

SCHEDULER_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "clip_sample_range": 1.0,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": True,  # DDIMScheduler's only.
}
SCHEDULER_ALLOWED: dict[str, tuple[Any, ...]] = {
    "thresholding": (False,),
    "rescale_betas_zero_snr": (False, True),
    "set_alpha_to_one": (True,),
    "predict_epsilon": (True,),  # Old; now prediction_type.
}
VARIANCES = {"fixed_small": "fixed_small", "fixed_small_log": "fixed_small", "fixed_large": "fixed_large"}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
SAMPLERS = {"DDPMScheduler": "ddpm", "DDIMScheduler": "ddim"}
DDIM_STEPS = 50
"""Steps of Diffusers' DDIMPipeline; its DDPMPipeline takes all timesteps."""

SPACINGS = {"linspace": "uniform", "trailing": "trailing"}
"""How fewer steps than there are timesteps are spaced, where both sides have a name for it."""

WITHOUT_COUNTERPART: dict[str, Any] = {"conditioning": "bias", "self_conditioning": False, "learned_variance": False}
"""What knobs of our network must be for UNet2DModel, which does not have them."""

BETA_TOLERANCE = 1e-6


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

    yield from _fixed_problems(given, UNET_ALLOWED)
    widths, down, up = given["block_out_channels"], given["down_block_types"], given["up_block_types"]
    if not (_is_list(widths) and widths and all(_is_count(width) for width in widths)):
        yield problem("block_out_channels", "a list of widths such as [128, 256, 256, 256]")
        return
    if any(width % widths[0] for width in widths):
        yield problem("block_out_channels", f"whole multiples of the first width, {widths[0]}")
    kinds = ("DownBlock2D", "AttnDownBlock2D")
    if not (_is_list(down) and len(down) == len(widths) and all(_plain(kind) in kinds for kind in down)):
        yield problem("down_block_types", f"{len(widths)} of DownBlock2D and AttnDownBlock2D")
        return
    mirrored = [_plain(kind).replace("Down", "Up") for kind in reversed(down)]
    if not (_is_list(up) and [_plain(kind) for kind in up] == mirrored):
        yield problem("up_block_types", f"the mirror image of down_block_types, {mirrored}")
    size = _square(given["sample_size"])
    if size is None or size % 2 ** (len(widths) - 1):
        yield problem("sample_size", f"one number, a multiple of {2 ** (len(widths) - 1)}")
    if given["in_channels"] not in (1, 3):
        yield problem("in_channels", "1 or 3")
    if given["out_channels"] != given["in_channels"]:
        yield problem("out_channels", f"as many as in_channels, {given['in_channels']}")
    if not _is_count(given["layers_per_block"]):
        yield problem("layers_per_block", "one integer >= 1")
    if given["time_embedding_dim"] not in (None, 4 * widths[0]):
        yield problem("time_embedding_dim", f"None or {4 * widths[0]}, four times the first width")
    groups = given["norm_num_groups"]
    if not _is_count(groups) or any(width % groups for width in widths):
        yield problem("norm_num_groups", f"a divisor of every width in {list(widths)}")
    if given["attn_norm_num_groups"] not in (None, groups):
        yield problem("attn_norm_num_groups", f"None or norm_num_groups, {groups}")
    head = given["attention_head_dim"]
    if head is not None and not _is_count(head):
        yield problem("attention_head_dim", "None or an integer >= 1")
    elif head is not None and (len(_heads(given)) > 1 or any(width % head for width in _attention_widths(given))):
        wide = sorted(_attention_widths(given))
        yield problem("attention_head_dim", f"a divisor that gives equally many heads at the widths {wide}, or None")
    classes = given["num_class_embeds"]
    if classes is not None and not (_is_count(classes) and classes <= MAX_CLASSES):
        yield problem("num_class_embeds", f"None or an integer >= 1 and <= {MAX_CLASSES}")


def _fixed_problems(given: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> Iterator[str]:
    for key, values in allowed.items():
        if key in given and given[key] not in values:
            yield f"{key} = {given[key]!r}: expected {' or '.join(map(repr, values))}"


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(kind: Any) -> str:
    """A block's type without the prefix that Diffusers drops as well."""
    return str(kind).removeprefix("UNetRes")


def _square(sample_size: Any) -> int | None:
    """Height and width, if they are given and equal."""
    if _is_list(sample_size) and len(sample_size) == 2 and sample_size[0] == sample_size[1]:
        sample_size = sample_size[0]
    return sample_size if _is_count(sample_size) else None


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
    for name in ("cifar10", "mnist", "digits"):
        if IMAGE_SHAPES[name] == (channels, size):
            return {"data.name": name}
    return {"data.name": "cifar10" if channels == 3 else "mnist", "data.image_size": size}


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


def scheduler_knobs(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our knobs for the noise schedule and for sampling, from a scheduler_config.json.

    Raises:
        ConfigError: with everything in it that we do not have.
    """
    given = SCHEDULER_DEFAULTS | dict(config)
    problems = list(_scheduler_problems(given))
    if problems:
        raise ConfigError(*problems)
    timesteps = given["num_train_timesteps"] if given["trained_betas"] is None else len(given["trained_betas"])
    sampler = SAMPLERS[given["_class_name"]]
    knobs = {
        **_schedule_knobs(given, timesteps),
        "diffusion.timesteps": timesteps,
        "diffusion.zero_terminal_snr": given["rescale_betas_zero_snr"],
        "diffusion.prediction": PREDICTIONS[given["prediction_type"]],
        "sample.sampler": sampler,
        "sample.steps": timesteps if sampler == "ddpm" else min(DDIM_STEPS, timesteps),
        "sample.spacing": SPACINGS.get(str(given["timestep_spacing"]), "uniform"),
        "sample.clip_x0": given["clip_sample"],
    }
    if sampler == "ddpm":
        knobs["sample.variance"] = VARIANCES[given["variance_type"]]
    return knobs


def _scheduler_problems(given: Mapping[str, Any]) -> Iterator[str]:
    def problem(key: str, expected: str) -> str:
        return f"{key} = {given.get(key)!r}: expected {expected}"

    def one_of(names: Sequence[str]) -> str:
        return f"one of {', '.join(names)}"

    if given.get("_class_name") not in list(SAMPLERS):
        yield problem("_class_name", one_of(list(SAMPLERS)))
    yield from _fixed_problems(given, SCHEDULER_ALLOWED)
    if not _is_count(given["num_train_timesteps"]) or given["num_train_timesteps"] < 2:
        yield problem("num_train_timesteps", "an integer >= 2")
    if given["trained_betas"] is None:
        if given["beta_schedule"] not in ("linear", "squaredcos_cap_v2"):
            yield problem("beta_schedule", one_of(["linear", "squaredcos_cap_v2"]))
        elif given["beta_schedule"] == "linear":
            for key in ("beta_start", "beta_end"):
                if not (_is_number(given[key]) and 0 < given[key] <= MAX_BETA):
                    yield problem(key, f"a number > 0 and <= {MAX_BETA}")
    elif not (_is_list(given["trained_betas"]) and all(map(_is_number, given["trained_betas"]))):
        yield "trained_betas: expected a list of numbers"
    elif len(given["trained_betas"]) < 2 or not _named_schedule(given["trained_betas"]):
        shown = ", ".join(map(str, given["trained_betas"][:3]))
        yield f"trained_betas = [{shown}, ..]: expected those of a linear or cosine schedule"
    if given.get("_class_name") != "DDIMScheduler" and given["variance_type"] not in list(VARIANCES):
        yield problem("variance_type", one_of(list(VARIANCES)))
    if given["clip_sample"] not in (True, False):
        yield problem("clip_sample", "true or false")
    if given["clip_sample"] and given["clip_sample_range"] != 1:
        yield problem("clip_sample_range", "1.0")
    if given["prediction_type"] not in list(PREDICTIONS):
        yield problem("prediction_type", one_of(list(PREDICTIONS)))


def _named_schedule(betas: Sequence[float]) -> str | None:
    """Which of our schedules some variances are, if any."""
    theirs = torch.tensor(betas, dtype=torch.float64)
    straight = torch.linspace(betas[0], betas[-1], len(betas), dtype=torch.float64)
    if betas[0] > 0 and max(betas) <= MAX_BETA and torch.allclose(theirs, straight, rtol=0, atol=BETA_TOLERANCE):
        return "linear"
    return "cosine" if torch.allclose(theirs, cosine_betas(len(betas)), rtol=0, atol=BETA_TOLERANCE) else None


def _schedule_knobs(given: Mapping[str, Any], timesteps: int) -> dict[str, Any]:
    betas = given["trained_betas"]
    if given["beta_schedule"] == "squaredcos_cap_v2" if betas is None else _named_schedule(betas) == "cosine":
        return {"diffusion.schedule": "cosine"}
    start, end = (given["beta_start"], given["beta_end"]) if betas is None else (betas[0], betas[-1])
    # Our two ends are stated for 1,000 timesteps.
    scale = timesteps / 1000
    if scale * end >= 1:
        key = "beta_end" if betas is None else "trained_betas"
        raise ConfigError(f"{key} = {end!r} at last: expected less than {1 / scale:g} for {timesteps} timesteps")
    return {
        "diffusion.schedule": "linear",
        "diffusion.beta_start": scale * start,
        "diffusion.beta_end": scale * end,
    }


def fewer_steps(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """What of a scheduler decides which timesteps are visited by fewer steps than all, and is no knob of ours."""
    kept = {"timestep_spacing": "leading"} if scheduler.get("timestep_spacing") == "leading" else {}
    offset = scheduler.get("steps_offset")
    return kept | ({"steps_offset": offset} if _is_count(offset) else {})


def scheduler_config(config: CoreConfig) -> dict[str, Any]:
    """`DDPMScheduler`'s configuration for a noise schedule of ours; one that has no name there is listed in full.

    Takes the schedule and the prediction from ``config`` and, of sampling, the variance, the spacing of steps, and
    whether images are clipped.

    Raises:
        ConfigError: if it has none.
    """
    diffusion, sample = config.diffusion, config.sample
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if diffusion.prediction not in predictions:
        raise ConfigError(
            f"diffusion.prediction = {diffusion.prediction!r}: DDPMScheduler does not know it; expected one of "
            f"{', '.join(predictions)}"
        )
    spacings = {ours: theirs for theirs, ours in SPACINGS.items()}
    return {
        **_betas(diffusion),
        "num_train_timesteps": diffusion.timesteps,
        "variance_type": sample.variance,
        "clip_sample": sample.clip_x0,
        "clip_sample_range": 1.0,
        "prediction_type": predictions[diffusion.prediction],
        "timestep_spacing": spacings.get(sample.spacing, "linspace"),
    }


def _betas(diffusion: DiffusionConfig) -> dict[str, Any]:
    """The schedule by name if it has one there, or else its variances."""
    signal = build_schedule(diffusion).alphas.square()
    scale = 1000.0 / diffusion.timesteps
    start, end = scale * diffusion.beta_start, scale * diffusion.beta_end
    named = {
        "linear": torch.linspace(start, end, diffusion.timesteps, dtype=torch.float64),
        "squaredcos_cap_v2": cosine_betas(diffusion.timesteps),
    }
    for name, betas in named.items():
        if end > MAX_BETA and name == "linear":
            continue
        schedule = NoiseSchedule.from_betas(betas)
        for rescaled in (False, True):
            found = zero_terminal_snr(schedule) if rescaled else schedule
            if torch.allclose(found.alphas.square(), signal, rtol=1e-9, atol=0):
                ends = {"beta_start": start, "beta_end": end} if name == "linear" else {}
                return {"beta_schedule": name, **ends, "rescale_betas_zero_snr": rescaled}
    return {"trained_betas": (1.0 - signal / torch.cat([signal.new_ones(1), signal[:-1]])).tolist()}


def unknown_keys(config: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """The keys of a Diffusers configuration that its class does not know, and passes over."""
    return [key for key in config if key not in known and not key.startswith("_")]
