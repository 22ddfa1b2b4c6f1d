"""Estimate what a training run will cost before it starts: disk, uploads and time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffusion_core.config import CoreConfig
from diffusion_core.diffusion.schedule import build_schedule
from diffusion_core.machine.sharing import threads_each, visible_gpus
from diffusion_core.model.unet import UNet, build_network
from diffusion_core.registries import DATASETS
from diffusion_core.sampling.media import GIF_COLUMNS, GIF_ROWS
from diffusion_core.sampling.samplers import evaluations
from diffusion_core.training.ema import copies
from pruning.config import PruneConfig

FLOAT_BYTES = 4
USUAL_CLASSES = 10
"""Number of classes to assume if it is unknown before reading the data. Each adds one row to an embedding."""
TRIED_IMAGES = 16
"""Images of the batch that speed is measured with."""
TRIED_TIMES = 5
"""Number of timed passes. The fastest counts, because other processes slow down the others."""
MAX_TRIED_PARAMS = 5_000_000
"""Parameters of the largest network to time. Timing a larger one takes long, and it needs a GPU anyway."""
BACKWARD_COST = 2.0
"""Cost of a backward pass in forward passes."""
STARTUP_SECONDS = 8.0
"""Seconds of a trial that do not depend on its network: imports, data, W&B, checkpoints."""


@dataclass(frozen=True)
class TrialEstimate:
    """What one trial will cost.

    Attributes:
        params: parameters of its network before pruning.
        disk_bytes: size of its checkpoints at the end. Staged uploads are hard links to them.
        upload_bytes: size of the artifacts that it uploads.
        seconds: its wall time, or None if unknown.
    """

    params: int
    disk_bytes: int
    upload_bytes: int
    seconds: float | None


class Estimator:
    """Estimates trials. Networks of one kind are built and timed once.

    Args:
        offline: whether nothing is uploaded while trials run.
        threads: processor threads of a trial; None: all.
        past_seconds: wall times of similar trials, which are more accurate than measurements.
    """

    def __init__(self, *, offline: bool, threads: int | None = None, past_seconds: Sequence[float] = ()) -> None:
        self.offline = offline
        self.threads = threads or threads_each(1)
        self.past_seconds = past_seconds
        self._params: dict[str, int] = {}
        self._image_seconds: dict[str, float | None] = {}

    def trial(self, config: CoreConfig, prune: PruneConfig) -> TrialEstimate:
        """Return what a trial of this configuration will cost."""
        kind = repr((config.model, config.data))
        if kind not in self._params:
            self._params[kind] = count_params(config)
        params = self._params[kind]
        size, saved = checkpoint_bytes(config, prune, params), checkpoints_saved(config)
        return TrialEstimate(
            params=params,
            disk_bytes=trainings(prune) * size * min(saved, config.checkpoint.keep + 1),
            upload_bytes=trainings(prune) * size * saved if config.checkpoint.upload and not self.offline else 0,
            seconds=self._seconds(config, prune, kind, params),
        )

    def _seconds(self, config: CoreConfig, prune: PruneConfig, kind: str, params: int) -> float | None:
        if self.past_seconds:
            return statistics.mean(self.past_seconds)
        if kind not in self._image_seconds:
            on_cpu = config.train.device == "cpu" or not visible_gpus()
            # The size of an `auto` batch is not known yet.
            measured = on_cpu and params <= MAX_TRIED_PARAMS and config.train.batch_size != "auto"
            self._image_seconds[kind] = measure_image_seconds(config, self.threads) if measured else None
        each = self._image_seconds[kind]
        return None if each is None else STARTUP_SECONDS + trainings(prune) * each * forward_passes(config, prune)


def classes_of(config: CoreConfig) -> int:
    """Return the number of classes of the data set, or :data:`USUAL_CLASSES`."""
    return DATASETS[config.data.name].num_classes or USUAL_CLASSES


def count_params(config: CoreConfig) -> int:
    """Return the number of parameters of a configuration's network, without allocating them."""
    channels, size, _ = config.data.image_shape
    with torch.device("meta"):
        network = UNet(config.model, size, channels, classes_of(config) if config.model.class_conditional else 0)
    return sum(parameter.numel() for parameter in network.parameters())


def checkpoint_bytes(config: CoreConfig, prune: PruneConfig, params: int) -> int:
    """Return the size of a checkpoint: weights, AdamW's two moments, each average, and one byte per weight for masks.

    Structured pruning makes later checkpoints smaller. This is not counted.
    """
    stored = 3 + copies(config.ema)
    masks = 0 if prune.method in ("none", "structured") else params
    return FLOAT_BYTES * stored * params + masks


def trainings(prune: PruneConfig) -> int:
    """Return how many times a trial trains: a lottery trains once per round, and the dense network first."""
    return 1 + prune.rounds if prune.method == "lottery" else 1


def checkpoints_saved(config: CoreConfig) -> int:
    """Return the number of checkpoints that a trial writes."""
    every = config.checkpoint.every
    return math.ceil(config.train.steps / every) if every else 1


def times_logged(config: CoreConfig, prune: PruneConfig, metric: str) -> float:
    """Return how often a trial logs a figure; infinite for a lottery, whose rounds log it one after the other.

    Before pruning, the figures of ``eval.every`` have other names.
    """
    if prune.method == "lottery":
        return math.inf
    every, steps, before = config.eval.every, config.train.steps, 0
    if metric == "train/loss":
        every = config.log.every
    elif prune.method != "none":
        before = prune.end(steps)
    return steps // every - before // every + (steps % every > 0) if every else 1


def forward_passes(config: CoreConfig, prune: PruneConfig) -> float:
    """Return the images that pass through the network in a trial, where a backward pass counts as several."""
    sample, evaluation, steps = config.sample, config.eval, config.train.steps
    guided = 2 if sample.guidance != 1.0 else 1
    image = evaluations(sample, build_schedule(config.diffusion)) * guided
    judgements = math.ceil(steps / evaluation.every) if evaluation.every else 1
    drawings = math.ceil(steps / sample.every) if sample.every else 1
    judged = evaluation.num_images * image if config.judges_images else 0
    # The first evaluation times one batch with one step, at most twice.
    tried = 2 * guided * min(evaluation.num_images, sample.batch_size) if config.judges_images else 0
    compared = 2 * evaluation.consistency_images * image if prune.method != "none" else 0
    classes = classes_of(config)
    drawn = classes * sample.per_class
    if drawn > sample.batch_size:  # Otherwise the GIF's images are among them.
        drawn += min(classes, GIF_ROWS) * min(GIF_COLUMNS, sample.per_class)
    return (
        steps * config.train.images_per_step * (1 + BACKWARD_COST)
        + judgements * (evaluation.val_images + judged)
        + tried
        + compared
        + drawings * drawn * image
    )


def measure_image_seconds(config: CoreConfig, threads: int) -> float:
    """Measure the seconds that the network takes per image on this processor."""
    network = build_network(config, classes_of(config)).eval()
    images = torch.zeros(TRIED_IMAGES, network.input_channels, network.image_size, network.image_size)
    times = torch.zeros(TRIED_IMAGES, dtype=torch.long)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            seconds = []
            for _ in range(TRIED_TIMES):
                started = time.perf_counter()
                network(images, times)
                seconds.append(time.perf_counter() - started)
            return min(seconds) / TRIED_IMAGES
    finally:
        torch.set_num_threads(before)
