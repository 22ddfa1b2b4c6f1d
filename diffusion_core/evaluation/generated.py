"""Generate images of a model for evaluation, and estimate how long that takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffusion_core.config import SampleConfig
from diffusion_core.data.datasets import DataError, to_uint8
from diffusion_core.distributed import own_positions, sum_over_processes
from diffusion_core.evaluation.features import Extractor
from diffusion_core.hardware import NOT_FINITE_REMEDY
from diffusion_core.model.cost import LATENCY_BATCH
from diffusion_core.sampling.cost import SECONDS, image_costs, network_evaluations
from diffusion_core.sampling.generation import Generator, Request, all_labels, round_robin
from diffusion_core.sampling.samplers import StepCallback
from diffusion_core.terminal.progress import progress_of

T = TypeVar("T")

PRECISE_BELOW_S = 10.0
"""Below this, one timing is precise enough."""


def generated(
    generator: Generator,
    total: int,
    config: SampleConfig,
    seed: int,
    *,
    progress: bool = False,
    callback: StepCallback | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process's share of ``total`` images, uint8 ``(B, C, H, W)`` on the CPU, and labels, which alternate.

    Raises:
        DataError: in all processes, after the last image, if an image is not finite.
    """
    wanted = generated_requests(generator, total)
    not_finite = 0
    with progress_of("sampling", len(wanted), "image", shown=progress) as bar:
        for batch, x_BCHW in generator.unrounded_batches(wanted, config, seed, callback):
            not_finite += int((~torch.isfinite(x_BCHW)).flatten(1).any(1).sum())
            yield to_uint8(x_BCHW.nan_to_num()).cpu(), torch.tensor([image.label for image in batch])
            bar.update(len(batch))
    broken = int(sum_over_processes(torch.tensor(float(not_finite))))
    if broken:
        raise DataError(f"{broken} of {total} generated images are not finite; {NOT_FINITE_REMEDY}")


def generated_requests(generator: Generator, total: int) -> list[Request]:
    """Return this process's share of ``total`` images as :func:`generated` samples them."""
    return round_robin(all_labels(generator.network), own_positions(total))


@torch.no_grad()
def estimate_seconds(generator: Generator, total: int, config: SampleConfig, extractors: Sequence[Extractor]) -> float:
    """Return about how many seconds it takes to sample and evaluate this process's share of ``total`` images.

    Times a step with guidance, a step without it, and the feature networks on one batch; twice if the estimate is long,
    because a first call is slow.
    """
    share = len(own_positions(total))
    batch = min(share, config.batch_size)
    wanted = [Request(label, 0) for label in (all_labels(generator.network) * batch)[:batch]]
    images, sampling = _sampling_seconds(generator, wanted, config, share / batch)
    part = images[: max(1, batch // 8)]
    looking = 0.0
    for extractor in extractors:
        looking += _timed(partial(_features_of, extractor, part), share / len(part))[1]
    return sampling + looking


def costs_of_images(generator: Generator, config: SampleConfig) -> dict[str, float]:
    """Return what sampling an image costs: ``sample/evaluations``, ``sample/macs`` and ``sample/seconds``.

    Seconds are measured in a batch of ``LATENCY_BATCH`` images on this machine, by one step with guidance, one without.
    """
    batch = config.model_copy(update={"batch_size": LATENCY_BATCH})
    wanted = [Request(label, 0) for label in (all_labels(generator.network) * LATENCY_BATCH)[:LATENCY_BATCH]]
    seconds = _sampling_seconds(generator, wanted, batch, 1.0)[1] / LATENCY_BATCH
    trained = generator.config
    return image_costs(generator.network, config, trained.diffusion, trained.model) | {SECONDS: seconds}


def _sampling_seconds(
    generator: Generator, wanted: Sequence[Request], config: SampleConfig, batches: float
) -> tuple[Tensor, float]:
    """Return a batch of images after one step, and about how many seconds some batches take with all steps.

    Steps inside and outside ``sample.guidance_interval`` are timed one by one, because they cost different amounts.
    """
    total = 0.0
    for way, share in _ways_of_steps(generator, config):
        once = way.model_copy(update={"steps": 1})
        images, seconds = _timed(partial(_images_of, generator, wanted, once), share * batches)
        total += seconds
    return images, total


def _ways_of_steps(generator: Generator, config: SampleConfig) -> list[tuple[SampleConfig, float]]:
    """Return configurations all of whose steps cost the same, each with how many samplings in one step it stands for.

    Without an interval that is the configuration itself, else one that guides every step, and one that guides none.
    """

    def calls(**changes: Any) -> int:
        sample = config.model_copy(update=changes)
        return network_evaluations(sample, generator.config.diffusion, generator.config.model)

    plain: dict[str, Any] = {"guidance": 1.0, "guidance_interval": None}
    total, of_one = calls(**plain), calls(**plain, steps=1)
    if config.guidance == 1.0 or not config.guidance_interval:
        return [(config, total / of_one)]
    guided = calls(guidance=2.0) - total  # A guided evaluation counts twice.
    inside = config.model_copy(update={"guidance_interval": (0.0, math.inf)})
    ways = [(inside, guided / of_one), (config.model_copy(update=plain), (total - guided) / of_one)]
    return [(way, share) for way, share in ways if share]


def _images_of(generator: Generator, wanted: Sequence[Request], config: SampleConfig) -> Tensor:
    return to_uint8(generator.batch(wanted, config, 0).nan_to_num()).cpu()


def _features_of(extractor: Extractor, images_BCHW: Tensor) -> float:
    return extractor(images_BCHW).features_BD.sum().item()


def _timed(work: Callable[[], T], times: float) -> tuple[T, float]:
    """Return the result of ``work``, and about how many seconds ``times`` calls take."""
    seconds = math.inf
    for _ in range(2):
        started = time.perf_counter()
        result = work()
        seconds = min(seconds, (time.perf_counter() - started) * times)
        if seconds < PRECISE_BELOW_S:
            break
    return result, seconds
