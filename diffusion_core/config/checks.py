"""Combinations of knobs that cannot work, each reported as one line for the user."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath

from diffusion_core.config.knobs import (
    DataConfig,
    DiffusionConfig,
    EmaConfig,
    EvalConfig,
    ModelConfig,
    SampleConfig,
    TrainConfig,
    UpsampleConfig,
)
from diffusion_core.config.metrics import EXTRACTORS, TORCHSCRIPT_SUFFIXES
from diffusion_core.messages import suggested
from diffusion_core.registries import DATASETS, METRICS, PREDICTIONS, SCHEDULES


def combination_problems(
    data: DataConfig,
    model: ModelConfig,
    diffusion: DiffusionConfig,
    train: TrainConfig,
    ema: EmaConfig,
    sample: SampleConfig,
    evaluation: EvalConfig,
) -> Iterator[str]:
    """What is wrong with the sections of a configuration taken together."""
    place = DATASETS[data.name].path
    if place == "required" and data.path is None:
        yield f"data.path = None: data.name={data.name} needs data.path=DIR, with one sub-folder of images a class"
    if place == "refused" and data.path is not None:
        yield f"data.path = {data.path!r}: data.name={data.name} is built in; leave it out, or use data.name=folder"
    yield from network_problems(model, data.image_shape[1])
    if diffusion.beta_start > diffusion.beta_end:
        yield (
            f"diffusion.beta_start = {diffusion.beta_start}: expected at most diffusion.beta_end = {diffusion.beta_end}"
        )
    if sample.steps > diffusion.timesteps:
        yield f"sample.steps = {sample.steps}: expected at most diffusion.timesteps = {diffusion.timesteps}"
    if sample.guidance != 1.0 and not (model.class_conditional and train.label_dropout):
        yield (
            f"sample.guidance = {sample.guidance}: guidance other than 1 needs model.class_conditional=true "
            f"and train.label_dropout above 0"
        )
    yield from formulation_problems(model, diffusion, train, ema, sample)
    if train.label_dropout == 1.0 and model.class_conditional:
        yield "train.label_dropout = 1.0: no label would ever be seen; use model.class_conditional=false"
    if train.batch_size == "auto":
        if train.accumulation != 1:
            yield f"train.accumulation = {train.accumulation}: not with train.batch_size=auto"
    elif train.batch_size % train.accumulation:
        yield f"train.accumulation = {train.accumulation}: must divide train.batch_size = {train.batch_size}"
    if evaluation.classifier == "network" and not model.class_conditional:
        yield "eval.classifier = 'network': class agreement needs model.class_conditional=true"
    for figure in evaluation.figures:
        if METRICS[figure].labels and not model.class_conditional:
            yield f"eval.figures = {evaluation.figures}: {figure} needs model.class_conditional=true"
    yield from extractor_problems(evaluation)


def extractor_problems(evaluation: EvalConfig) -> Iterator[str]:
    """What is wrong with the names of the feature networks that figures need."""
    for wanted in evaluation.extractors if evaluation.in_features else ():
        if wanted not in EXTRACTORS and PurePath(wanted).suffix not in (*TORCHSCRIPT_SUFFIXES, ".safetensors"):
            hint = suggested(wanted, EXTRACTORS)
            yield (
                f"eval.extractors = {wanted!r}: expected {', '.join(EXTRACTORS)}, or a file of TorchScript "
                f"({', '.join(TORCHSCRIPT_SUFFIXES)}) or of a classifier (.safetensors){hint and f'; {hint}'}"
            )


def network_problems(model: ModelConfig, size: int) -> Iterator[str]:
    """What is wrong with the network's knobs for images of ``size`` pixels."""
    levels, multipliers = len(model.channel_multipliers), model.channel_multipliers
    if size % 2 ** (levels - 1):
        yield (
            f"model.channel_multipliers = {multipliers}: {levels} resolutions need a "
            f"data.image_size that is a multiple of {2 ** (levels - 1)}, not {size}"
        )
    for multiplier in multipliers:
        width = model.channels * multiplier
        if round(width) < 1 or abs(width - round(width)) > 1e-6 * width:
            yield (
                f"model.channel_multipliers = {multipliers}: {multiplier:g} of model.channels = {model.channels} is "
                f"{width:g} channels; expected a whole number"
            )
    resolutions = [size // 2**depth for depth in range(levels)]
    attending = {}
    for resolution in model.attention_resolutions:
        if resolution not in resolutions:
            yield (
                f"model.attention_resolutions = {model.attention_resolutions}: the network works at "
                f"{', '.join(map(str, resolutions))} (for small images there is --preset=digits or mnist)"
            )
        else:
            attending[f"the width at {resolution} pixels"] = model.widths[resolutions.index(resolution)]
    attending["the width of the middle block"] = model.widths[-1]
    for place, width in attending.items():
        if width % model.num_heads:
            yield f"model.num_heads = {model.num_heads}: must divide {width}, {place}"
        if model.head_channels is not None and width % model.head_channels:
            yield f"model.head_channels = {model.head_channels}: must divide {width}, {place}"
    if model.head_channels is not None and model.num_heads != 1:
        yield (
            f"model.num_heads = {model.num_heads}: has no effect with model.head_channels={model.head_channels}; drop "
            f"one of them"
        )
    if model.frequency_shift >= model.channels // 2:
        yield (
            f"model.frequency_shift = {model.frequency_shift:g}: expected less than {model.channels // 2}, half of "
            f"model.channels"
        )


def upsampling_problems(upsample: UpsampleConfig, size: int) -> Iterator[str]:
    """What is wrong with the knobs of upsampling to images of ``size`` pixels."""
    if upsample.factor is None:
        for name, default in UpsampleConfig().model_dump().items():
            value = getattr(upsample, name)
            if value != default:
                yield f"upsample.{name} = {value}: has no effect without upsample.factor; set it, or drop this"
        return
    if size % upsample.factor:
        yield f"upsample.factor = {upsample.factor}: expected a data.image_size that is a multiple of it, not {size}"
    if upsample.sample_noise > upsample.noise:
        yield (
            f"upsample.sample_noise = {upsample.sample_noise}: expected at most upsample.noise = {upsample.noise}, the "
            f"largest level that the network learns"
        )


def leaking_problems(
    upsample: UpsampleConfig, evaluation: EvalConfig, figures: str = "eval.figures", reference: str = "eval.reference"
) -> Iterator[str]:
    """What compares a model's images with the held-out images that it enlarged: each with its own original.

    Args:
        upsample: the knobs of the model.
        evaluation: what is measured.
        figures: what the figures are chosen with, for messages.
        reference: what the reference is chosen with, for messages.
    """
    if upsample.factor is None:
        return
    why = f"with held-out images, and upsample.factor={upsample.factor} is judged by enlarging those"
    for figure in evaluation.figures:
        if getattr(METRICS[figure], "split", "train") == "val":
            yield f"{figures} = {evaluation.figures}: {figure} compares {why}; leave it out"
    if evaluation.reference == "val" and any(getattr(METRICS[name], "compares", False) for name in evaluation.figures):
        yield f"{reference} = 'val': compares {why}; use {reference}=train"


def formulation_problems(
    model: ModelConfig, diffusion: DiffusionConfig, train: TrainConfig, ema: EmaConfig, sample: SampleConfig
) -> Iterator[str]:
    """What is wrong with schedule, prediction, guidance and averages taken together."""
    prediction = PREDICTIONS[diffusion.prediction]
    if not SCHEDULES[diffusion.schedule].variance_preserving:
        if prediction.inputs is None:
            yield (
                f"diffusion.prediction = {diffusion.prediction!r}: diffusion.schedule={diffusion.schedule} needs "
                f"{' or '.join(name for name, record in PREDICTIONS.items() if record.inputs)}, whose inputs are scaled"
            )
        for key, value in (
            ("diffusion.logsnr_shift", diffusion.logsnr_shift),
            ("diffusion.zero_terminal_snr", diffusion.zero_terminal_snr),
            ("model.learned_variance", model.learned_variance),
        ):
            if value:
                yield f"{key} = {value}: not for diffusion.schedule={diffusion.schedule}"
    if diffusion.sigma_min >= diffusion.sigma_max:
        yield f"diffusion.sigma_min = {diffusion.sigma_min}: expected less than sigma_max = {diffusion.sigma_max}"
    if diffusion.zero_terminal_snr and not prediction.at_pure_noise:
        yield (
            f"diffusion.prediction = {diffusion.prediction!r}: diffusion.zero_terminal_snr needs "
            f"{' or '.join(name for name, record in PREDICTIONS.items() if record.at_pure_noise)}, since "
            f"pure noise holds no image to divide by"
        )
    if sample.variance == "learned" and not model.learned_variance:
        yield "sample.variance = 'learned': needs model.learned_variance=true"
    if sample.guidance_interval is not None:
        if sample.guidance_interval[0] >= sample.guidance_interval[1]:
            yield f"sample.guidance_interval = {sample.guidance_interval}: expected the lower level first"
        if sample.guidance == 1.0:
            yield (
                f"sample.guidance_interval = {sample.guidance_interval}: has no effect with sample.guidance = 1.0; "
                f"drop it or set another guidance"
            )
    if len({f"{width:g}" for width in ema.power_widths}) < len(ema.power_widths):  # As profiles are named.
        yield f"ema.power_widths = {ema.power_widths}: expected widths that differ in their first six digits"
    if ema.sampled == "power" and not ema.power_widths:
        yield "ema.sampled = 'power': needs ema.power_widths, such as 0.05,0.1"
    if ema.sampled == "average" and ema.average_from is None:
        yield "ema.sampled = 'average': needs ema.average_from"
    if ema.average_from is not None and ema.average_from >= train.steps:
        yield f"ema.average_from = {ema.average_from}: expected less than train.steps = {train.steps}"
