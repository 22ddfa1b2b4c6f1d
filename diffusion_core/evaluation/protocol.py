"""How a figure came about, in one line that stands beside it."""

from __future__ import annotations

from collections.abc import Iterable

from diffusion_core.config import SampleConfig
from diffusion_core.evaluation.features import Extractor

PREFIX = "protocol/"
"""What the name of a figure's protocol begins with, before the figure's own name."""


def sampling_protocol(config: SampleConfig, seed: int) -> str:
    """How images were sampled."""
    parts = [f"sampler={config.sampler}", f"steps={config.steps}", f"spacing={config.spacing}"]
    if config.eta:
        parts.append(f"eta={config.eta:g}")
    if config.sampler == "ddpm" and config.variance != SampleConfig().variance:
        parts.append(f"variance={config.variance}")
    parts.append(f"guidance={config.guidance:g}")
    if config.guidance_interval is not None:
        low, high = config.guidance_interval
        parts.append(f"guidance_interval={low:g}..{high:g}")
    return ", ".join([*parts, f"seed={seed}"])


def protocol(count: int | None, images: str, extractor: Extractor | None = None, reference: str | None = None) -> str:
    """How a figure was measured.

    Args:
        count: images judged, if known.
        images: where they are from: what :func:`sampling_protocol` says, or a folder.
        extractor: the network that judged them.
        reference: what they were compared to.
    """
    parts = [f"reference={reference}"] if reference else []
    parts += [f"n={'unknown' if count is None else count}", images]
    if extractor is not None:
        parts += [f"extractor={extractor.name}", f"weights={extractor.weights}"]
    return ", ".join(parts)


def protocols(
    figures: Iterable[str], count: int | None, images: str, extractor: Extractor | None, reference: str
) -> dict[str, str]:
    """How figures in one feature space were measured, by name; a score is compared to nothing."""
    return {name: protocol(count, images, extractor, None if "score" in name else reference) for name in figures}
