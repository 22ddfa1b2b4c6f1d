"""Estimate the cost of a sweep before it starts: disk and uploads of its checkpoints, and time."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from agent.config import TrialConfig, build_config
from agent.sweep import engine
from agent.sweep.devices import threads_each, visible_gpus
from agent.sweep.file import SweepFile
from agent.sweep.results import duration, parameters_line
from diffusion_core.diffusion.schedule import build_schedule
from diffusion_core.model.unet import UNet, build_network
from diffusion_core.registries import DATASETS
from diffusion_core.sampling.media import GIF_COLUMNS, GIF_ROWS
from diffusion_core.sampling.samplers import evaluations
from diffusion_core.training.ema import profiles

SAMPLED_TRIALS = 10
"""Number of trials in the estimate; the others are assumed to be like them on average."""
FLOAT_BYTES = 4
USUAL_CLASSES = 10
"""Taken where the number of classes is known only once the data is read; each moves the size by an embedding row."""
TRIED_IMAGES = 16
"""Batch size of the speed measurement."""
TRIED_TIMES = 5
"""Number of passes, of which the fastest counts: other load only makes passes slower."""
MAX_TRIED_PARAMS = 5_000_000
"""The speed of larger networks is not measured: it takes long, and they are meant for GPUs."""
BACKWARD_COST = 2.0
"""A backward pass in units of the forward pass."""
STARTUP_SECONDS = 8.0
"""Time of a trial outside the network: imports, data, W&B, checkpoints."""


@dataclass(frozen=True)
class TrialEstimate:
    """The estimated cost of one trial.

    Attributes:
        params: parameters of its network, before pruning.
        disk_bytes: size of its checkpoints at the end. (Staged uploads are hard links to them.)
        upload_bytes: size of the artifacts that it uploads to W&B.
        seconds: its wall time, or None if it is unknown.
    """

    params: int
    disk_bytes: int
    upload_bytes: int
    seconds: float | None


class Estimator:
    """Estimates trials of one sweep; builds and times each network once.

    Args:
        offline: whether trials run without uploads.
        threads: CPU threads of a trial; None: all.
        past_seconds: wall times of finished trials of this sweep; they replace the measurement.
    """

    def __init__(self, *, offline: bool, threads: int | None = None, past_seconds: Sequence[float] = ()) -> None:
        self.offline = offline
        self.threads = threads or threads_each(1)
        self.past_seconds = past_seconds
        self._params: dict[str, int] = {}
        self._image_seconds: dict[str, float | None] = {}

    def trial(self, config: TrialConfig) -> TrialEstimate:
        """Return the estimated cost of a trial with this configuration."""
        kind = repr((config.model, config.data))
        if kind not in self._params:
            self._params[kind] = count_params(config)
        params = self._params[kind]
        size, saved = checkpoint_bytes(config, params), checkpoints_saved(config)
        return TrialEstimate(
            params=params,
            disk_bytes=trainings(config) * size * min(saved, config.checkpoint.keep + 1),
            upload_bytes=trainings(config) * size * saved if config.checkpoint.upload and not self.offline else 0,
            seconds=self._seconds(config, kind, params),
        )

    def _seconds(self, config: TrialConfig, kind: str, params: int) -> float | None:
        if self.past_seconds:
            return statistics.mean(self.past_seconds)
        if kind not in self._image_seconds:
            on_cpu = config.train.device == "cpu" or not visible_gpus()
            # With train.batch_size=auto, the batch size is not known yet.
            measured = on_cpu and params <= MAX_TRIED_PARAMS and config.train.batch_size != "auto"
            self._image_seconds[kind] = measure_image_seconds(config, self.threads) if measured else None
        each = self._image_seconds[kind]
        return None if each is None else STARTUP_SECONDS + trainings(config) * each * forward_passes(config)


def classes_of(config: TrialConfig) -> int:
    """Number of classes of a data set. That of a folder is unknown before it is read, so a usual one is assumed."""
    return DATASETS[config.data.name].num_classes or USUAL_CLASSES


def count_params(config: TrialConfig) -> int:
    """Return the number of parameters of a configuration's network, without allocating them."""
    channels, size, _ = config.data.image_shape
    with torch.device("meta"):
        network = UNet(config.model, size, channels, classes_of(config) if config.model.class_conditional else 0)
    return sum(parameter.numel() for parameter in network.parameters())


def checkpoint_bytes(config: TrialConfig, params: int) -> int:
    """Return the bytes of a checkpoint: weights, two moments of AdamW, each average, and a byte per weight for masks.

    Structured pruning makes later checkpoints smaller; that is not counted.
    """
    copies = 3 + len(profiles(config.ema))
    masks = 0 if config.prune.method in ("none", "structured") else params
    return FLOAT_BYTES * copies * params + masks


def trainings(config: TrialConfig) -> int:
    """Return the number of trainings in a trial: the dense network and one per round of lottery tickets, else one."""
    return 1 + config.prune.rounds if config.prune.method == "lottery" else 1


def checkpoints_saved(config: TrialConfig) -> int:
    """Return the number of checkpoints that a training writes."""
    every = config.checkpoint.every
    return math.ceil(config.train.steps / every) if every else 1


def forward_passes(config: TrialConfig) -> float:
    """Return the forward passes of single images in a training; a backward pass counts ``BACKWARD_COST``."""
    sample, evaluation, steps = config.sample, config.eval, config.train.steps
    guided = 2 if sample.guidance != 1.0 else 1
    image = evaluations(sample, build_schedule(config.diffusion)) * guided
    judgements = math.ceil(steps / evaluation.every) if evaluation.every else 1
    drawings = math.ceil(steps / sample.every) if sample.every else 1
    judged = evaluation.num_images * image if config.judges_images else 0
    # Before the first one a batch is tried, with one step, at most twice.
    tried = 2 * guided * min(evaluation.num_images, sample.batch_size) if config.judges_images else 0
    compared = 2 * evaluation.consistency_images * image if config.prune.method != "none" else 0
    classes = classes_of(config)
    drawn = classes * sample.per_class
    if drawn > sample.batch_size:  # Else the animated ones are among them.
        drawn += min(classes, GIF_ROWS) * min(GIF_COLUMNS, sample.per_class)
    return (
        steps * config.train.images_per_step * (1 + BACKWARD_COST)
        + judgements * (evaluation.val_images + judged)
        + tried
        + compared
        + drawings * drawn * image
    )


def measure_image_seconds(config: TrialConfig, threads: int) -> float:
    """Return the seconds of a forward pass of one image on this CPU."""
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


def first_trials(sweep: SweepFile) -> Iterator[dict[str, Any]]:
    """Yield the first suggestions of the search engine, while no trial has ended."""
    runs: list[Any] = []
    while sweep.total is None or len(runs) < sweep.total:
        parameters = engine.suggest(sweep.engine_config(), runs)
        if parameters is None:
            return
        yield parameters
        runs.append(engine.past_run(str(len(runs)), parameters, "running", {}, []))


def size_in_words(number: float) -> str:
    """Return a number of bytes as text: ``12 MB``, ``3.4 GB``."""
    for unit in ("kB", "MB", "GB"):
        number /= 1000
        if number < 1000:
            return f"{number:.3g} {unit}"
    return f"{number / 1000:,.3g} TB"


def describe_sweep(
    sweep: SweepFile, estimator: Estimator, *, jobs: int, trials: int | None, folder: Path | None = None
) -> str:
    """Return a line with the estimated cost of a sweep, and a warning if the disk has too little space.

    Args:
        jobs: number of trials that run at the same time.
        trials: number of trials to run; None: unlimited.
        folder: the folder of an offline sweep, whose disk is checked.
    """
    found = [estimator.trial(build_config(chosen)) for chosen in islice(first_trials(sweep), SAMPLED_TRIALS)]
    disk = statistics.mean(trial.disk_bytes for trial in found)
    upload = statistics.mean(trial.upload_bytes for trial in found)
    times = [trial.seconds for trial in found if trial.seconds is not None]

    def amount(words: Callable[[float], str], each: float, what: str, at_once: int = 1) -> str:
        whole = f", {words(each * math.ceil(trials / at_once))} in all" if trials is not None else ""
        return f"{words(each)} {what}a trial{whole}"

    said = [
        f"{trials:,} trials, {jobs} at a time" if trials is not None else "trials without end (no run_cap, no --count)",
        amount(size_in_words, disk, "of checkpoints "),
        *([amount(size_in_words, upload, "of uploads ")] if upload else []),
        "time unknown until a trial has ended"
        if not times
        else amount(duration, statistics.mean(times), "", at_once=jobs),
    ]
    least = " at most" if "early_terminate" in sweep.config else ""
    lines = [f"estimate{least}: {'; '.join(said)}"]
    if folder is not None and trials is not None:
        free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.is_dir())).free
        if disk * trials > free:
            lines.append(f"warning: that is more than the {size_in_words(free)} that are free at {str(folder)!r}")
    return "\n".join(lines)


def list_trials(sweep: SweepFile, estimator: Estimator, count: int) -> str:
    """Return the first trials with the estimated cost of each, two lines per trial."""
    lines = []
    for number, parameters in enumerate(islice(first_trials(sweep), count), start=1):
        estimate = estimator.trial(build_config(parameters))
        seconds = "time unknown" if estimate.seconds is None else f"about {duration(estimate.seconds)}"
        lines.append(f"[{number}] {parameters_line(parameters, sweep.varied)}")
        lines.append(
            f"    {estimate.params:,} parameters, {size_in_words(estimate.disk_bytes)} of checkpoints, {seconds}"
        )
    return "\n".join(lines)
