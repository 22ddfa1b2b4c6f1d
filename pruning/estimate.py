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
from diffusion_core.hardware import autocast, memory_format, pick_precision
from diffusion_core.machine.sharing import threads_each, visible_gpus
from diffusion_core.messages import size_in_words
from diffusion_core.model.cost import count_cost
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
SMALL_PARAMS = 5_000_000
"""Parameters of the largest network whose forward passes are timed, which is more exact than one step."""
MAX_TRIED_PARAMS = 300_000_000
"""Parameters of the largest network to time."""
MEASURE_S = 3.0
"""Seconds that a training step may be tried for on the processor."""
MEASURE_IN_ALL_S = 20.0
"""Seconds after which no further network of a sweep is timed."""
USUAL_BATCH = 128
"""Images of a step to assume if ``train.batch_size`` is ``auto``."""
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
        measured: what the time follows from, in words; None if it follows from other trials, or is unknown.
        device: ``cpu`` or ``cuda``, on which that was measured; None likewise.
    """

    params: int
    disk_bytes: int
    upload_bytes: int
    seconds: float | None
    measured: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class Speed:
    """How fast a network is.

    Attributes:
        image_seconds: seconds of a forward pass, per image.
        measured: what was measured, in words.
        device: ``cpu`` or ``cuda``.
    """

    image_seconds: float
    measured: str
    device: str


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
        self._speeds: dict[str, Speed | None] = {}
        self._measured_for = 0.0

    def trial(self, config: CoreConfig, prune: PruneConfig) -> TrialEstimate:
        """Return what a trial of this configuration will cost."""
        kind = repr((config.model, config.data, config.upsample.factor))
        if kind not in self._params:
            self._params[kind] = count_params(config)
        params = self._params[kind]
        size, saved = checkpoint_bytes(config, prune, params), checkpoints_saved(config)
        speed = None if self.past_seconds else self._speed(config, kind, params)
        seconds: float | None = statistics.mean(self.past_seconds) if self.past_seconds else None
        if speed is not None:
            seconds = STARTUP_SECONDS + trainings(prune) * speed.image_seconds * forward_passes(config, prune)
        return TrialEstimate(
            params=params,
            disk_bytes=trainings(prune) * size * min(saved, config.checkpoint.keep + 1),
            upload_bytes=trainings(prune) * size * saved if config.checkpoint.upload and not self.offline else 0,
            seconds=seconds,
            measured=None if speed is None else speed.measured,
            device=None if speed is None else speed.device,
        )

    def _speed(self, config: CoreConfig, kind: str, params: int) -> Speed | None:
        """Return the speed of a network; None if it cannot be measured, or others have taken all the time there is."""
        train = config.train
        kind = repr((kind, train.batch_size, train.device, train.precision))
        if kind not in self._speeds:
            started = time.monotonic()
            too_late = self._measured_for > MEASURE_IN_ALL_S
            self._speeds[kind] = None if too_late else measure_speed(config, self.threads, params)
            self._measured_for += time.monotonic() - started
        return self._speeds[kind]


def classes_of(config: CoreConfig) -> int:
    """Return the number of classes of the data set, or :data:`USUAL_CLASSES`."""
    return DATASETS[config.data.name].num_classes or USUAL_CLASSES


def count_params(config: CoreConfig) -> int:
    """Return the number of parameters of a configuration's network, without allocating them."""
    channels, size, _ = config.data.image_shape
    with torch.device("meta"):
        classes = classes_of(config) if config.model.class_conditional else 0
        network = UNet(config.model, size, channels, classes, config.upsample.channels(channels))
    return sum(parameter.numel() for parameter in network.parameters())


def checkpoint_bytes(config: CoreConfig, prune: PruneConfig, params: int) -> int:
    """Return the size of a checkpoint: weights, AdamW's two moments, each average, and one byte per weight for masks.

    Structured pruning makes later checkpoints smaller. This is not counted.
    """
    stored = 3 + copies(config.ema)
    masks = 0 if prune.method in ("none", "structured") else params
    return FLOAT_BYTES * stored * params + masks


def describe_model(network: UNet, config: CoreConfig, prune: PruneConfig) -> list[str]:
    """Return lines on the size and cost of a trial's network before pruning, and of its checkpoints."""
    cost, (channels, size, _) = count_cost(network), config.data.image_shape
    kept = checkpoint_bytes(config, prune, cost.params)
    return [
        f"model: {cost.params:,} parameters, {cost.macs:,} MACs an image of {channels} x {size} x {size} "
        f"({cost.macs_with_attention:,} with the products of attention)",
        f"checkpoint: about {size_in_words(kept)}, {config.checkpoint.keep} kept and the best one",
    ]


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
    judgements, drawings = _due(steps, evaluation.every), _due(steps, sample.every)
    judged = evaluation.num_images * image if config.judges_images else 0
    compared = 2 * evaluation.consistency_images * image if prune.method != "none" else 0
    classes = classes_of(config)
    drawn = classes * sample.per_class
    if config.judges_images and drawn <= evaluation.num_images:  # Pictures show images that are judged.
        drawings = drawings - judgements
    if drawn > sample.batch_size:  # Otherwise the GIF's images are among them.
        drawn += min(classes, GIF_ROWS) * min(GIF_COLUMNS, sample.per_class)
    return (
        steps * config.train.images_per_step * (1 + BACKWARD_COST)
        + len(judgements) * (evaluation.val_images + judged)
        + compared
        + len(drawings) * drawn * image
    )


def _due(steps: int, every: int) -> set[int]:
    """Return the steps at which something is due: the last one, and each ``every``-th unless that is 0."""
    return {*range(every, steps, every), steps} if every else {steps}


def measure_speed(config: CoreConfig, threads: int, params: int) -> Speed | None:
    """Measure how fast a network is on the device that it would train on, in a few seconds.

    A small network on the processor is timed in forward passes. Any other is timed in training steps: at the real batch
    on a GPU (or at the largest half, quarter, ... of it that fits), on the processor with as many images as there is
    time for.

    Args:
        config: configuration of the run.
        threads: processor threads.
        params: parameters of the network.

    Returns:
        None if there is no such device here, or the network is too large to try.
    """
    on_cpu = config.train.device == "cpu" or not visible_gpus()
    if params > MAX_TRIED_PARAMS or not (on_cpu or torch.cuda.is_available()):
        return None
    device = torch.device("cpu" if on_cpu else "cuda")
    batch = USUAL_BATCH if config.train.batch_size == "auto" else config.train.images_per_step
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if on_cpu and params <= SMALL_PARAMS:
            seconds = min(_seconds_of(config, device, TRIED_IMAGES, TRIED_TIMES, backward=False))
            return Speed(seconds / TRIED_IMAGES, f"forward passes of {TRIED_IMAGES} images on the processor", "cpu")
        images, seconds = _time_step(config, device, batch)
    finally:
        torch.set_num_threads(before)
    scaled = f", scaled to {batch}" if images < batch else ""
    many = f"{images} images" if images > 1 else "1 image"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the processor"
    return Speed(seconds / images / (1 + BACKWARD_COST), f"a training step of {many} on {where}{scaled}", device.type)


def _time_step(config: CoreConfig, device: torch.device, batch: int) -> tuple[int, float]:
    """Return images and seconds of a training step."""
    if device.type == "cpu":
        images, seconds = 1, min(_seconds_of(config, device, 1, 1))
        more = min(batch, TRIED_IMAGES, int(MEASURE_S / seconds))
        return (more, min(_seconds_of(config, device, more, 1))) if more > 1 else (images, seconds)
    while True:
        try:
            return batch, min(_seconds_of(config, device, batch, TRIED_TIMES))  # The first one warms up.
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2


def _seconds_of(
    config: CoreConfig, device: torch.device, images: int, times: int, *, backward: bool = True
) -> list[float]:
    """Return the seconds of forward passes, or of forward and backward passes, with black images."""
    precision = pick_precision(config.train, device)
    network = build_network(config, classes_of(config)).train(backward)
    network = network.to(device).to(memory_format=memory_format(device, precision))
    x_BCHW = torch.zeros(images, network.input_channels, network.image_size, network.image_size, device=device)
    t_B = torch.zeros(images, dtype=torch.long, device=device)
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        with torch.set_grad_enabled(backward):
            with autocast(device, precision):
                loss = network(x_BCHW, t_B).square().mean()
            if backward:
                loss.backward()
        loss.item()  # Waits for a GPU.
        seconds.append(time.perf_counter() - started)
    return seconds
