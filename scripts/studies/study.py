"""Train models once, measure their quality under equal conditions, and store the measurements."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agent.config import TrialConfig, build_config
from agent.trial import TrialResult, run_trial
from diffusion_core.checkpoint import Checkpoint, read_checkpoint
from diffusion_core.config import ConfigError
from diffusion_core.data.datasets import Dataset, load_data
from diffusion_core.evaluation.classifier.classifier import Classifier, classifier_for
from diffusion_core.evaluation.consistency import consistency_of_images
from diffusion_core.evaluation.validation import validation_loss
from diffusion_core.files import write_json
from diffusion_core.hardware import Precision, pick_precision
from diffusion_core.model.cost import count_cost
from diffusion_core.model.unet import UNet
from diffusion_core.runs.result import read_result
from diffusion_core.sampling.generation import Generator, Request, round_robin
from diffusion_core.tracking import NullTracker
from diffusion_core.training.stopping import StopRequest

SAMPLING_SEED = 1
FIGURES = frozenset({"agreement", "loss", "ssim", "mse", "params", "macs"})
"""Names of the measurements of a network."""
QUIET = {
    "sample.every": 0,
    "eval.every": 0,
    "eval.classifier": "none",
    "checkpoint.every": 0,
    "checkpoint.upload": False,
    "checkpoint.best_metric": "val/loss",
    "log.progress": False,
}


@dataclass(frozen=True)
class Study:
    """A comparison on one data set.

    Attributes:
        folder: folder of all results.
        seeds: training seeds.
        keeps: kept shares of the MACs.
        steps: optimizer steps of a dense model.
        tune_steps: optimizer steps of fine-tuning.
        images: number of generated images per model.
        knobs: knobs of all runs, over those of the digits preset.
    """

    folder: Path
    seeds: tuple[int, ...]
    keeps: tuple[float, ...]
    steps: int
    tune_steps: int
    images: int
    knobs: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def dataset(self) -> Dataset:
        return load_data(self.config().data)

    @cached_property
    def classifier(self) -> Classifier:
        data = self.config().data
        return classifier_for(self.dataset, data.name, mirrored=data.flips, device=torch.device("cpu"))

    def config(self, **changes: Any) -> TrialConfig:
        """Return the knobs and settings of this study with changes; write a dot of a key as two underscores."""
        fixed = {"preset": "digits", "train.steps": self.steps, "train.device": "cpu"} | QUIET
        return build_config(fixed | dict(self.knobs), {key.replace("__", "."): value for key, value in changes.items()})

    def fine_tuning(self, dense: Checkpoint) -> dict[str, Any]:
        """Return the changes of a configuration that fine-tunes a dense model, at half its learning rate."""
        warmup, lr = min(20, self.tune_steps // 2), self.config().train.lr / 2
        steps = {"train__steps": self.tune_steps, "train__warmup_steps": warmup, "train__lr": lr}
        return {"init__checkpoint": str(dense.path)} | steps

    def run(self, name: str, config: TrialConfig) -> Checkpoint:
        """Return the last checkpoint of a run; start or continue the run unless it has a result."""
        folder = self.folder / "runs" / name
        run_once(config, self.dataset, folder)
        return read_checkpoint(folder)

    def dense(self, seed: int) -> Checkpoint:
        """Return the dense model of a seed."""
        return self.run(f"dense-{self.steps}-seed{seed}", self.config(seed=seed))

    def wanted(self) -> list[Request]:
        """Return the images to generate; the classes take turns."""
        return round_robin(range(self.dataset.num_classes), range(self.images))

    def draw(self, network: UNet, config: TrialConfig) -> Tensor:
        """Return the images of a network, ``(N, C, H, W)`` uint8, with the same noise and labels for all networks."""
        generator = Generator(network.eval(), config, self.precision(network, config))
        return generator.images(self.wanted(), config.sample, SAMPLING_SEED)

    def precision(self, network: UNet, config: TrialConfig) -> Precision:
        """Return the precision of a network's arithmetic."""
        return pick_precision(config.train, next(network.parameters()).device)

    def measure(self, network: UNet, config: TrialConfig, dense_NCHW: Tensor) -> dict[str, float]:
        """Return the figures of a network: quality, similarity to the dense network's images, and cost (``FIGURES``).

        Args:
            network: a trained network.
            config: configuration of its training.
            dense_NCHW: images of the dense network before pruning, by :meth:`draw`.
        """
        images = self.draw(network, config)
        alike = consistency_of_images(images, dense_NCHW, SAMPLING_SEED)
        cost = count_cost(network)
        return {
            "agreement": self.classifier.class_agreement(images, [request.label for request in self.wanted()]),
            "loss": validation_loss(network, self.dataset.val, config, self.precision(network, config)),
            "ssim": alike.ssim,
            "mse": alike.mse,
            "params": cost.nonzero_params,
            "macs": cost.nonzero_macs,
        }


def run_once(config: TrialConfig, dataset: Dataset, folder: Path) -> TrialResult:
    """Return the result of a run, which is started or continued if it has none. A signal writes a checkpoint.

    Raises:
        Stopped: after a signal.
    """
    if (found := read_result(folder)) is not None:
        return found[0]
    print(f"run {folder.name}", file=sys.stderr)
    with stoppable() as stop:
        return run_trial(config, NullTracker(), dataset=dataset, folder=folder, run_id=folder.name, stop=stop)


@contextmanager
def stoppable() -> Iterator[StopRequest]:
    """Let signals stop the run inside this context after a step, with a checkpoint, or at its end.

    Raises:
        Stopped: after a signal.
    """
    with StopRequest().listening() as stop:
        yield stop
        stop.check_now()


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Record the settings of a folder's results.

    Raises:
        ConfigError: if the folder holds results of other settings.
    """
    file = folder / "settings.json"
    if file.is_file():
        if (before := json.loads(file.read_text(encoding="utf-8"))) != settings:
            raise ConfigError(f"--out = {str(folder)!r}: holds results of {before}; choose another folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, dict(settings))


class Results:
    """Measurements by row and seed, stored in a JSON file as they arrive.

    Args:
        file: the file; measurements that it holds are kept.
        figures: names of the measurements that a complete entry has.
    """

    def __init__(self, file: Path, figures: Collection[str] = FIGURES) -> None:
        self.file, self.figures = file, figures
        file.parent.mkdir(parents=True, exist_ok=True)
        self.values: dict[str, dict[str, float]] = json.loads(file.read_text("utf-8")) if file.is_file() else {}

    def __contains__(self, key: str) -> bool:
        """Whether an entry is complete; older files may lack some figures."""
        return self.values.get(key, {}).keys() >= set(self.figures)

    def add(self, key: str, measured: Mapping[str, float]) -> None:
        """Store the figures that an entry does not have yet."""
        self.values[key] = dict(measured) | self.values.get(key, {})
        write_json(self.file, self.values)

    def over_seeds(self, row: str, seeds: Sequence[int], figure: str) -> list[float]:
        """Return a figure of a row for each seed."""
        return [self.values[f"{row}, seed {seed}"][figure] for seed in seeds]
