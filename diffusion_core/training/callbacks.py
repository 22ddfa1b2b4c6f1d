"""Training callbacks that draw pictures, write history, and raise alerts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion_core.checkpoint import STUDENT, Checkpoint
from diffusion_core.config import CoreConfig, TrainConfig
from diffusion_core.config.metrics import goal_of
from diffusion_core.data.datasets import Dataset
from diffusion_core.files import write_json_lines
from diffusion_core.hardware import pick_precision
from diffusion_core.messages import duration
from diffusion_core.model.compilation import pick_sampling_compilation
from diffusion_core.run_folder import HISTORY_FILE, best_figures, read_history
from diffusion_core.runs.recorded import log_rows
from diffusion_core.sampling import media
from diffusion_core.sampling.frames import Frames
from diffusion_core.sampling.generation import Generator, Request, all_labels, requests
from diffusion_core.sampling.lows import held_out
from diffusion_core.terminal.progress import say
from diffusion_core.tracking import STEP, Tracker
from diffusion_core.training.resume import unfinished_row
from diffusion_core.training.trainer import TrainState, is_due

WORSE_LOSS = 1.5
"""A loss above its best value times this is a regression."""

WORSE_SHARE = 0.75
"""A quality below its best value times this is a regression."""

WORTH_SAYING_S = 60.0
"""Seconds of training from which its duration is printed."""

LONG_S = 86_400.0
"""Seconds of training on a processor from which a warning is printed."""

PREEMPTIONS = 3
"""Number of preemptions at which a trial raises an alert."""

DIVERGED = "Training diverged"
REGRESSION = "Quality regression"
PREEMPTED = "Preempted again and again"


class DrawSamples:
    """Every ``sample.every`` steps, draw a grid with one row per class, and a GIF from noise to image.

    The GIF shows the images of each step beside those that the network expects at that step. Where an evaluation
    samples the same images, they are taken from there. A grid of a model that upsamples shows small image, sample and
    held-out image beside each other.
    """

    def __init__(self, config: CoreConfig, dataset: Dataset, accelerator: Accelerator, folder: Path) -> None:
        self.config = config
        self.class_names = dataset.class_names
        self.lows = held_out(dataset, config.upsample)
        self.precision = pick_precision(config.train, accelerator.device)
        self.folder = folder
        self.alone = accelerator.num_processes == 1
        self._frames: tuple[int, Frames] | None = None

    def frames(self, state: TrainState, generator: Generator, sampled: Sequence[Request]) -> Frames | None:
        """Return what takes the pictures from images that are sampled for another purpose; None if it cannot.

        Args:
            state: of this step.
            generator: samples its network with this run's seed.
            sampled: the images, in order.
        """
        config = state.sampling(self.config.sample)
        wanted, moving = self._requests(state)
        compiled = pick_sampling_compilation(config, generator.network, generator.device, len(sampled)) != "none"
        if not self.alone or compiled or not self._is_due(state) or not {*sampled} >= {*wanted, *moving}:
            return None
        frames = Frames(sampled, wanted, moving, media.spread(config.steps), generator.frame(config))
        self._frames = state.step, frames
        return frames

    def __call__(self, state: TrainState, row: dict[str, Any]) -> None:
        """Write the grid and the GIF if they are due, and put their paths into the row."""
        if not self._is_due(state):
            return
        config, labels = state.sampling(self.config.sample), all_labels(state.ema.network)
        names = self.class_names if len(labels) == len(self.class_names) else ()
        self.folder.mkdir(parents=True, exist_ok=True)
        images, noisy, expected = self._sampled(state)
        columns = min(media.GIF_COLUMNS, config.per_class)
        row["samples"] = self.folder / f"samples-{state.step:08d}.png"
        shown, across = images, config.per_class
        if self.lows is not None:
            wanted, _ = self._requests(state)
            shown, across = media.beside(self.lows(wanted), images, self.lows.originals(wanted)), 3 * across
        media.grid(shown, across, names).save(row["samples"])
        row["diffusion"] = self.folder / f"diffusion-{state.step:08d}.gif"
        media.save_gif(media.animation(noisy, expected, columns, names[: media.GIF_ROWS]), row["diffusion"])

    def _is_due(self, state: TrainState) -> bool:
        return is_due(state.step, state.sampling(self.config.sample).every, self.config.train.steps)

    def _requests(self, state: TrainState) -> tuple[list[Request], list[Request]]:
        """Return the images of the grid, and those of the GIF."""
        labels, per_class = all_labels(state.ema.network), self.config.sample.per_class
        return requests(labels, per_class), requests(labels[: media.GIF_ROWS], min(media.GIF_COLUMNS, per_class))

    def _sampled(self, state: TrainState) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the images of the grid, and the noisy and the expected frames of the GIF."""
        shared, self._frames = self._frames, None
        if shared is not None and shared[0] == state.step and shared[1].is_complete:
            return shared[1].taken()
        config, seed = state.sampling(self.config.sample), self.config.seed
        generator = Generator(state.ema.network, self.config, self.precision, lows=self.lows)
        (wanted, moving), moments = self._requests(state), media.spread(config.steps)
        if len(wanted) > config.batch_size:
            return generator.images(wanted, config, seed), *generator.trajectories(moving, config, seed, moments)
        # One batch: take the GIF's frames from the same sampling.
        noisy, expected = generator.trajectories(wanted, config, seed, moments)
        places = [wanted.index(request) for request in moving]
        return noisy[-1], [frame[places] for frame in noisy], [frame[places] for frame in expected]


class LogHistory:
    """Send each row to the tracker, and append it to ``history.jsonl`` in the run's folder.

    Args:
        tracker: receives the rows.
        folder: the run's folder.
        resumed: the checkpoint that the run resumes from, or None. Later rows are dropped, and that of its step if the
            run resumes with the evaluation of that step.
    """

    def __init__(self, tracker: Tracker, folder: Path, resumed: Checkpoint | None) -> None:
        self.tracker = tracker
        self.file = folder / HISTORY_FILE
        step, rows = 0, {}
        if resumed is not None:  # A checkpoint from another machine brings its history along.
            step, rows = resumed.step, {row[STEP]: row for row in read_history(resumed.path)}
            if unfinished_row(resumed) is not None:
                step -= 1
        rows |= {row[STEP]: row for row in read_history(folder)}
        kept = [rows[at] for at in sorted(rows) if at <= step]
        write_json_lines(self.file, kept)
        log_rows(tracker, folder, kept)

    def __call__(self, state: TrainState, row: dict[str, Any]) -> None:
        """Log the row. Numbers go to ``history.jsonl`` too; pictures only to the tracker."""
        if not row:
            return
        self.tracker.log(row, state.step)
        numbers = {key: value for key, value in row.items() if not isinstance(value, Path)}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({STEP: state.step, **numbers}) + "\n")


class SayDuration:
    """Once, after the first steps, print how long training will take; warn if a processor would take days.

    The first step is not timed, as it compiles and allocates. A GPU works behind the loop, so there the second row of
    figures counts.

    Args:
        train: number of steps and images a step.
        device: where it trains.
    """

    def __init__(self, train: TrainConfig, device: torch.device) -> None:
        self.train = train
        self.device = device
        self.said = False
        self.calls = self.rows = 0
        self.before = 0.0

    def __call__(self, state: TrainState, row: dict[str, Any]) -> None:
        """Print the estimate as soon as there is one."""
        if self.said:
            return
        seconds = self._seconds_of_a_step(row, state.since_row.seconds)
        if seconds is None:
            return
        self.said = True
        left = seconds * (self.train.steps - state.step)
        if left >= WORTH_SAYING_S:
            steps = f"{self.train.steps - state.step:,} more steps"
            say(f"training: {seconds:.2g} s a step, about {duration(left)} for {steps}")
        if left >= LONG_S and self.device.type == "cpu":
            say(
                f"warning: train.steps = {self.train.steps}: takes about {duration(left)} on this processor; use a "
                "GPU, fewer steps, or a smaller network (--preset=digits has one)"
            )

    def _seconds_of_a_step(self, row: dict[str, Any], summed: float) -> float | None:
        """Return how long a step takes, without callbacks; None as long as that is unknown."""
        self.calls += 1
        passed, self.before = summed - self.before, summed
        if rate := row.get("train/images_per_second"):
            self.rows += 1
            self.before = 0.0
            if self.calls > 1 and (self.device.type == "cpu" or self.rows > 1):
                return self.train.images_per_step / float(rate)
        elif self.calls > 1 and self.device.type == "cpu" and passed > 0:
            return passed
        return None


class WatchQuality:
    """Alert once when the metric that chooses the best checkpoint has become much worse.

    Each stage of step distillation is compared with itself.

    Args:
        metric: name of the metric. Figures before pruning have other names.
        history: the rows so far, of a run that resumes.
        tracker: receives the alert.
    """

    def __init__(self, metric: str, history: Sequence[Mapping[str, float]], tracker: Tracker) -> None:
        self.metric = metric
        self.history = history
        self.best: float | None = None
        self.since: int | None = None
        self.tracker = tracker
        self.told = False

    def __call__(self, state: TrainState, row: dict[str, Any]) -> None:
        """Compare the metric in the row, if it is there, with the best value, and update that."""
        since = state.extra_metadata.get(STUDENT, {}).get("start", 0)
        if since != self.since:
            self.since = since
            self.best = best_figures([past for past in self.history if past[STEP] > since]).get(self.metric)
        value = row.get(self.metric)
        if value is None:
            return
        if self.best is not None and not self.told and is_regression(self.metric, value, self.best):
            self.told = True
            self.tracker.alert(REGRESSION, f"{self.metric} = {value:.4g} at step {state.step}; it was {self.best:.4g}")
        if math.isfinite(value):
            better = min if goal_of(self.metric) == "minimize" else max
            self.best = value if self.best is None else better(value, self.best)


def is_regression(metric: str, value: float, best: float) -> bool:
    """Return whether a figure is much worse than its best value. A value that is not finite is a regression."""
    if not math.isfinite(value):
        return True
    if goal_of(metric) == "minimize":
        return value > WORSE_LOSS * best > 0
    return value < WORSE_SHARE * best
