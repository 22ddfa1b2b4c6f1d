"""Protocols: how a figure was measured, in one line that is logged beside it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from diffusion_core.config import SampleConfig, UpsampleConfig
from diffusion_core.redact import redact

if TYPE_CHECKING:  # It imports PyTorch.
    from diffusion_core.evaluation.features import Extractor

PREFIX = "protocol/"
"""Prefix of the name of a figure's protocol; the figure's name follows."""
SAMPLING = re.compile(r"(sampler=.*?), seed=[^,]*(, away from .*?)?(?:, extractor=|$)")
"""What :func:`sampling_protocol` wrote in a protocol; the guide of autoguidance may follow."""

JUDGE = re.compile(r"extractor=[^,]*, weights=[^,]*")
"""What :func:`protocol` wrote of a feature network."""


def sampling_protocol(config: SampleConfig, seed: int, upsample: UpsampleConfig | None = None) -> str:
    """Return how images were sampled; given the section, also what a model upsampled."""
    parts = [f"sampler={config.sampler}", f"steps={config.steps}", f"spacing={config.spacing}"]
    if config.start_level is not None:
        parts.append(f"start_level={config.start_level:g}")
    if config.eta:
        parts.append(f"eta={config.eta:g}")
    if config.sampler == "ddpm" and config.variance != SampleConfig().variance:
        parts.append(f"variance={config.variance}")
    parts.append(f"guidance={config.guidance:g}")
    if config.guidance_interval is not None:
        low, high = config.guidance_interval
        parts.append(f"guidance_interval={low:g}..{high:g}")
    if upsample is not None and upsample.wanted:
        parts.append(f"upsampled={upsample.factor}x from held-out images, noise={upsample.sample_noise:g}")
    return ", ".join([*parts, f"seed={seed}"])


def sampling_of(line: str) -> str | None:
    """Return how the images of a protocol were sampled, but for their seed; None if it does not say."""
    found = SAMPLING.search(line)
    return None if found is None else found[1] + (found[2] or "")


def judge_of(line: str) -> str | None:
    """Return the feature network or classifier of a protocol, with its weights; None if it names none."""
    found = JUDGE.search(line)
    return None if found is None else found[0]


def protocol(count: int | None, images: str, extractor: Extractor | None = None, reference: str | None = None) -> str:
    """Return how a figure was measured.

    Args:
        count: number of images, or None if it is unknown.
        images: their source: the result of :func:`sampling_protocol`, or a folder.
        extractor: the feature network, if there is one.
        reference: the images that they were compared with, if there are any.
    """
    parts = [f"reference={reference}"] if reference else []
    parts += [f"n={'unknown' if count is None else count}", images]
    if extractor is not None:
        parts += [f"extractor={extractor.name}", f"weights={extractor.weights}"]
    return redact(", ".join(parts))
