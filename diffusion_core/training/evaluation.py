"""Evaluate the averaged weights at a cadence while training, with all processes together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from diffusion_core.checkpoint import STUDENT
from diffusion_core.config import CoreConfig, SampleConfig
from diffusion_core.data.datasets import DataError, Dataset
from diffusion_core.evaluation.baseline import bilinear_judgement
from diffusion_core.evaluation.features import ExtractorError
from diffusion_core.evaluation.generated import estimate_seconds, generated, generated_requests
from diffusion_core.evaluation.metrics import LossMetric
from diffusion_core.evaluation.opinions import first_images, write_opinions
from diffusion_core.evaluation.protocol import PREFIX, judge_of, sampling_protocol
from diffusion_core.evaluation.suite import Judgement, Suite
from diffusion_core.evaluation.validation import validation_losses
from diffusion_core.files import write_json
from diffusion_core.hardware import pick_precision
from diffusion_core.model.unet import UNet
from diffusion_core.registries import METRICS
from diffusion_core.run_folder import CLASSIFIER_FILE, PROTOCOLS_FILE, SAMPLES, read_protocols
from diffusion_core.sampling.cost import MACS, image_costs
from diffusion_core.sampling.generation import Generator
from diffusion_core.sampling.lows import held_out
from diffusion_core.terminal.progress import say
from diffusion_core.tracking import Tracker, Upload
from diffusion_core.training.callbacks import DrawSamples
from diffusion_core.training.measured import known_places
from diffusion_core.training.trainer import Callback, TrainState, is_due

DENSE = "dense/"
"""Prefix of the figures of a network before pruning. A sweep must not rank pruned networks by them."""

TEACHER = "teacher/"
"""Prefix of the figures of a network before step distillation, likewise."""

STAGE = "stage-{}/"
"""Prefix of the figures of students of all stages but the last, likewise, with the steps of the student."""

WORTH_TIMING_MACS = 1e12
"""Multiply-accumulates of an evaluation from which it is timed: 10 to 30 s on a core of a server."""

STATISTICS = "reference-statistics"
"""Type of the artifacts with statistics of real images."""


class Evaluate:
    """Every ``eval.every`` steps, compute ``val/loss`` and the figures of generated images that ``eval.*`` asks for.

    Before pruning they are named ``dense/val/loss`` and so on, before step distillation ``teacher/val/loss``, in its
    stages before the last ``stage-4/eval/...``. How each figure was measured is recorded in the run's summary and in
    ``protocols.json``. At the end, some images are listed with their labels and what the classifier takes them for. Of
    a model that upsamples, the figures of bilinear interpolation are named ``bilinear/eval/...``.

    Args:
        config: every knob of the core.
        dataset: the images.
        accelerator: processes and devices.
        tracker: receives protocols and reference statistics.
        folder: the run's folder.
        prefix: returns what is put before the names of a state's figures: ``DENSE``, ``TEACHER``, ``STAGE`` or nothing.
        pictures: takes what it shows from the images that are judged, where it can.
        stop: called with the state after each step of sampling; may raise to stop, in all processes together.

    Attributes:
        unfinished: the row of the step whose evaluation is under way or was stopped; else None.
    """

    def __init__(
        self,
        config: CoreConfig,
        dataset: Dataset,
        accelerator: Accelerator,
        tracker: Tracker,
        folder: Path,
        prefix: Callable[[TrainState], str] = lambda state: "",
        pictures: DrawSamples | None = None,
        stop: Callback | None = None,
    ) -> None:
        self.config = config
        self.prefix = prefix
        self.pictures = pictures
        self.stop = stop
        self.unfinished: dict[str, Any] | None = None
        self.dataset = dataset
        self.accelerator = accelerator
        self.tracker = tracker
        self.folder = folder
        self.precision = pick_precision(config.train, accelerator.device)
        self.protocols: dict[str, str] = {}
        self._before = read_protocols(folder)
        self._suite: Suite | None = None
        self._lows = held_out(dataset, config.upsample)
        self._baseline: Judgement | None = None
        self._first: list[tuple[Tensor, Tensor]] = []
        self._said: set[str] = set()

    def __call__(self, state: TrainState, row: dict[str, Any]) -> None:
        """Measure the figures if an evaluation is due, and put them into the row."""
        if not is_due(state.step, self.config.eval.every, self.config.train.steps):
            return
        self.unfinished = dict(row)
        network = state.ema.network
        figures = {} if STUDENT in state.extra_metadata else self._losses(network)
        if self.config.judges_images:
            sample = state.sampling(self.config.sample)
            generator = Generator(network, self.config, self.precision, lows=self._lows)
            judged = self._judge(generator, sample, state)
            figures |= judged.figures
            baseline = self._baseline or Judgement()
            row.update(baseline.figures)
            self._note(judged.protocols | baseline.protocols)
            if state.step >= self.config.train.steps and (file := self._list_opinions(state.step)):
                row["opinions"] = file
        prefix = self.prefix(state)
        row.update({f"{prefix}{name}": value for name, value in figures.items()})
        self.unfinished = None

    def _losses(self, network: UNet) -> dict[str, float]:
        """Return ``val/*``. They say nothing about a student of step distillation, which is no denoiser any more."""
        loss_N, t_N = validation_losses(network, self.dataset.val, self.config, self.precision)
        figures = {"val/loss": float(loss_N.mean())}
        for record in (METRICS[name] for name in self.config.eval.figures):
            if isinstance(record, LossMetric):
                figures |= record.compute(loss_N, t_N, self.config.diffusion.timesteps)
        return figures

    def _judge(self, generator: Generator, sample: SampleConfig, state: TrainState) -> Judgement:
        """Return the figures of generated images. If they cannot be computed, print why once and continue training."""
        config, total = self.config, self.config.eval.num_images
        try:
            if self._suite is None:  # Built at the first evaluation, because that may take seconds.
                self._suite = Suite(
                    config.data,
                    config.eval,
                    self.dataset,
                    with_classifier=config.has_classifier,
                    device=self.accelerator.device,
                    say=self._say,
                    share=self._share,
                    own=[place / CLASSIFIER_FILE for place in known_places(self.folder)],
                )
                if self.accelerator.is_main_process:
                    self._say_duration(generator, sample, self._suite)
            self._first = []
            sampled = generated_requests(generator, total)
            frames = self.pictures.frames(state, generator, sampled) if self.pictures else None

            def after_step(index: int, x_BCHW: Tensor, x0_BCHW: Tensor) -> None:
                if self.stop is not None:
                    self.stop(state, {})
                if frames is not None:
                    frames(index, x_BCHW, x0_BCHW)

            batches: Iterable[tuple[Tensor, Tensor]] = generated(
                generator, total, sample, config.seed, callback=after_step
            )
            noted = first_images(batches if frames is None else frames.keep(batches), self._first)
            judged = self._suite.judge(noted, total, sampling_protocol(sample, config.seed, config.upsample))
            if self._baseline is None:
                self._baseline = bilinear_judgement(self._suite, generator, total, sample)
            return judged
        except (DataError, ExtractorError) as error:
            self._say(f"no figures of generated images: {error}")
            return Judgement()

    def _say_duration(self, generator: Generator, sample: SampleConfig, suite: Suite) -> None:
        """Print how many images are judged, and how long that takes, unless timing it would take a part of that."""
        total, model, diffusion = self.config.eval.num_images, self.config.model, self.config.diffusion
        macs = total * image_costs(generator.network, sample, diffusion, model)[MACS]
        timed = ""
        if macs >= WORTH_TIMING_MACS:
            timed = f", about {estimate_seconds(generator, total, sample, suite.networks):.1f} s each time"
        self._say(f"evaluation: {total:,} images{timed} (eval.num_images)")

    def _list_opinions(self, step: int) -> Path | None:
        """Write the table of images of the last evaluation. Return its file, or None if nothing judges labels."""
        classifier = None if self._suite is None else self._suite.classifier
        if classifier is None or not self.accelerator.is_main_process:
            return None
        file = self.folder / SAMPLES / f"opinions-{step:08d}.json"
        return file if write_opinions(file, self._first, classifier, self.dataset.class_names) else None

    def _say(self, line: str) -> None:
        """Print a line once."""
        if self.accelerator.is_main_process and line not in self._said:
            self._said.add(line)
            say(line)

    def _share(self, name: str, source: str, file: Path) -> None:
        """Upload reference statistics."""
        if self.accelerator.is_main_process:
            self.tracker.artifact(Upload(name, STATISTICS, [file], ["latest"], {"source": source}))

    def _note(self, protocols: dict[str, str]) -> None:
        """Record how figures were measured, if that changed."""
        if not self.accelerator.is_main_process or protocols == self.protocols:
            return
        self.protocols = protocols
        for name, line in protocols.items():
            before, now = judge_of(self._before.get(name, "")), judge_of(line)
            if before and now and before != now:
                self._say(
                    f"warning: {name}: measured with {now}, and before this run was resumed with {before}; do not "
                    f"compare the two"
                )
        self.tracker.summary({f"{PREFIX}{name}": line for name, line in protocols.items()})
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / PROTOCOLS_FILE, protocols)
