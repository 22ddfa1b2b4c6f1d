"""What a sweep will cost, said before it starts: disk and uploads of its checkpoints, and time."""

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
from agent.sweep.results import choice, duration
from diffusion_core.diffusion.schedule import build_schedule
from diffusion_core.model.unet import UNet, build_network
from diffusion_core.registries import DATASETS
from diffusion_core.sampling.media import GIF_COLUMNS, GIF_ROWS
from diffusion_core.sampling.samplers import evaluations
from diffusion_core.training.ema import profiles

SAMPLED_TRIALS = 10
"""Trials that are looked at; the rest is taken to be like them on average."""
FLOAT_BYTES = 4
USUAL_CLASSES = 10
"""Taken where the number of classes is known only once the data is read; each moves the size by an embedding row."""
TRIED_IMAGES = 16
"""Images of the batch that speed is measured with."""
TRIED_TIMES = 5
"""Of so many passes the fastest counts: on a busy machine, the others tell of the machine."""
MAX_TRIED_PARAMS = 5_000_000
"""Larger networks are not tried: that alone would take long, and they are not meant for processors."""
BACKWARD_COST = 2.0
"""A backward pass in units of the forward pass."""
STARTUP_SECONDS = 8.0
"""A trial's own cost beside the network's: imports, data, W&B, checkpoints."""


@dataclass(frozen=True)
class TrialEstimate:
    """What one trial will cost.

    Attributes:
        params: parameters of its network, before pruning.
        disk_bytes: what its checkpoints take up in the end. (What waits for an upload are hard links to them.)
        upload_bytes: what goes to W&B as artifacts while it runs.
        seconds: its wall time, or None if that is unknown.
    """

    params: int
    disk_bytes: int
    upload_bytes: int
    seconds: float | None


class Estimator:
    """Estimates trials of one sweep; networks of one kind are built and timed once.

    Args:
        offline: whether nothing is uploaded while trials run.
        threads: processor threads of a trial; None: all.
        past_seconds: wall times of trials of this sweep that have ended, which are a better guide than any measurement.
    """

    def __init__(self, *, offline: bool, threads: int | None = None, past_seconds: Sequence[float] = ()) -> None:
        self.offline = offline
        self.threads = threads or threads_each(1)
        self.past_seconds = past_seconds
        self._params: dict[str, int] = {}
        self._image_seconds: dict[str, float | None] = {}

    def trial(self, config: TrialConfig) -> TrialEstimate:
        """What a trial of this configuration will cost."""
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
            # How large a batch that is `auto` will be is not known yet.
            measured = on_cpu and params <= MAX_TRIED_PARAMS and config.train.batch_size != "auto"
            self._image_seconds[kind] = measure_image_seconds(config, self.threads) if measured else None
        each = self._image_seconds[kind]
        return None if each is None else STARTUP_SECONDS + trainings(config) * each * forward_passes(config)


def classes_of(config: TrialConfig) -> int:
    """Number of classes of a data set. That of a folder is unknown before it is read, so a usual one is assumed."""
    return DATASETS[config.data.name].num_classes or USUAL_CLASSES


def count_params(config: TrialConfig) -> int:
    """Parameters of the network that a configuration asks for; it is not given any memory."""
    channels, size, _ = config.data.image_shape
    with torch.device("meta"):
        network = UNet(config.model, size, channels, classes_of(config) if config.model.class_conditional else 0)
    return sum(parameter.numel() for parameter in network.parameters())


def checkpoint_bytes(config: TrialConfig, params: int) -> int:
    """Size of a checkpoint: weights as trained, two moments of AdamW, each average, and a byte a weight for masks.

    Structured pruning makes later ones smaller, which is not counted.
    """
    copies = 3 + len(profiles(config.ema))
    masks = 0 if config.prune.method in ("none", "structured") else params
    return FLOAT_BYTES * copies * params + masks


def trainings(config: TrialConfig) -> int:
    """How often a trial trains: a chain of lottery tickets once a round, and the dense network first."""
    return 1 + config.prune.rounds if config.prune.method == "lottery" else 1


def checkpoints_saved(config: TrialConfig) -> int:
    """How many checkpoints a trial writes."""
    every = config.checkpoint.every
    return math.ceil(config.train.steps / every) if every else 1


def forward_passes(config: TrialConfig) -> float:
    """Images that pass forward through the network in a trial; one that passes backward too counts more."""
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
    """Seconds in which an image passes forward through the network on this processor."""
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
    """What the search engine suggests first, while no trial has ended."""
    runs: list[Any] = []
    while sweep.total is None or len(runs) < sweep.total:
        parameters = engine.suggest(sweep.engine_config(), runs)
        if parameters is None:
            return
        yield parameters
        runs.append(engine.past_run(str(len(runs)), parameters, "running", {}, []))


def size_in_words(number: float) -> str:
    """Bytes in words: ``12 MB``, ``3.4 GB``."""
    for unit in ("kB", "MB", "GB"):
        number /= 1000
        if number < 1000:
            return f"{number:.3g} {unit}"
    return f"{number / 1000:,.3g} TB"


def describe_sweep(
    sweep: SweepFile, estimator: Estimator, *, jobs: int, trials: int | None, folder: Path | None = None
) -> str:
    """A line on what a sweep will cost, and another one if the disk has not that much left.

    Args:
        jobs: trials at once.
        trials: how many will be run; None if there is no end to them.
        folder: where they go, if on this disk.
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
    """The first trials with what each will cost, two lines a trial."""
    lines = []
    for number, parameters in enumerate(islice(first_trials(sweep), count), start=1):
        estimate = estimator.trial(build_config(parameters))
        seconds = "time unknown" if estimate.seconds is None else f"about {duration(estimate.seconds)}"
        lines.append(f"[{number}] {choice(parameters, sweep.varied)}")
        lines.append(
            f"    {estimate.params:,} parameters, {size_in_words(estimate.disk_bytes)} of checkpoints, {seconds}"
        )
    return "\n".join(lines)
