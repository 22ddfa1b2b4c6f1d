"""Generate images of a model for evaluation, and estimate how long that takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from diffusion_core.config import SampleConfig
from diffusion_core.data.datasets import DataError, to_uint8
from diffusion_core.distributed import own_positions, sum_over_processes
from diffusion_core.evaluation.features import Extractor
from diffusion_core.sampling.generation import Generator, Request, all_labels, round_robin
from diffusion_core.sampling.samplers import evaluations
from diffusion_core.terminal.progress import progress_of

T = TypeVar("T")

PRECISE_BELOW_S = 10.0
"""Below this, one timing is precise enough."""


def generated(
    generator: Generator, total: int, config: SampleConfig, seed: int, *, progress: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process's share of ``total`` images, uint8 ``(B, C, H, W)`` on the CPU, and labels, which alternate.

    Raises:
        DataError: in all processes, after the last image, if an image is not finite.
    """
    wanted = round_robin(all_labels(generator.network), own_positions(total))
    not_finite = 0
    with progress_of("sampling", len(wanted), "image", shown=progress) as bar:
        for batch, x_BCHW in generator.unrounded_batches(wanted, config, seed):
            not_finite += int((~torch.isfinite(x_BCHW)).flatten(1).any(1).sum())
            yield to_uint8(x_BCHW.nan_to_num()).cpu(), torch.tensor([image.label for image in batch])
            bar.update(len(batch))
    broken = int(sum_over_processes(torch.tensor(float(not_finite))))
    if broken:
        raise DataError(
            f"{broken} of {total} generated images are not finite; lower sample.guidance, or sample in fp32 "
            f"(train.precision)"
        )


@torch.no_grad()
def estimate_seconds(generator: Generator, total: int, config: SampleConfig, extractors: Sequence[Extractor]) -> float:
    """Return about how many seconds it takes to sample and evaluate this process's share of ``total`` images.

    Times one step and the feature networks on one batch; twice if the estimate is long, because a first call is slow.
    """
    share = len(own_positions(total))
    batch = min(share, config.batch_size)
    schedule = generator.denoiser().schedule
    once = config.model_copy(update={"steps": 1})
    wanted = [Request(label, 0) for label in (all_labels(generator.network) * batch)[:batch]]

    def sample() -> Tensor:
        return to_uint8(generator.batch(wanted, once, 0).nan_to_num()).cpu()

    images, sampling = _timed(sample, evaluations(config, schedule) / evaluations(once, schedule) * share / batch)
    part = images[: max(1, batch // 8)]
    looking = 0.0
    for extractor in extractors:
        looking += _timed(partial(_features_of, extractor, part), share / len(part))[1]
    return sampling + looking


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
