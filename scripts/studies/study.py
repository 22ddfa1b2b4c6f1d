"""What the tables of the comparison share: runs that are made once, quality on equal terms, tables and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agent.config import TrialConfig, build_config
from agent.trial import run_trial
from diffusion_core.checkpoint import Checkpoint, read_checkpoint
from diffusion_core.data.datasets import Dataset, load_data
from diffusion_core.evaluation import validation_loss
from diffusion_core.evaluation.classifier.classifier import Classifier, classifier_for
from diffusion_core.evaluation.consistency import consistency_of_images
from diffusion_core.files import write_json, write_text
from diffusion_core.hardware import Precision, pick_precision
from diffusion_core.model.cost import count_cost
from diffusion_core.model.unet import UNet
from diffusion_core.run_folder import RESULT_FILE
from diffusion_core.sampling.generation import Generator, Request, round_robin
from diffusion_core.tables import markdown_table
from diffusion_core.tracking import NullTracker

SAMPLING_SEED = 1
FIGURES = frozenset({"agreement", "loss", "ssim", "mse", "params", "macs"})
"""What is measured of every network."""
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
    """A comparison on digits.

    Attributes:
        folder: where everything goes.
        seeds: every model is trained with each.
        keeps: shares that stay.
        steps: optimizer steps of a dense model.
        tune_steps: optimizer steps of a fine-tuning.
        images: how many images are judged of a model.
    """

    folder: Path
    seeds: tuple[int, ...]
    keeps: tuple[float, ...]
    steps: int
    tune_steps: int
    images: int

    @cached_property
    def dataset(self) -> Dataset:
        return load_data(build_config({"preset": "digits"}).data)

    @cached_property
    def classifier(self) -> Classifier:
        return classifier_for(self.dataset, "digits", mirrored=False, device=torch.device("cpu"))

    def config(self, **changes: Any) -> TrialConfig:
        """The digits preset with this study's settings; a dot is written as two underscores."""
        fixed = {"preset": "digits", "train.steps": self.steps, "train.device": "cpu"}
        return build_config(fixed | QUIET | {key.replace("__", "."): value for key, value in changes.items()})

    def run(self, name: str, config: TrialConfig) -> Checkpoint:
        """The last checkpoint of a run, which is made unless its result is there, or gone on with."""
        folder = self.folder / "runs" / name
        if not (folder / RESULT_FILE).is_file():
            print(f"run {name}", flush=True)
            run_trial(config, NullTracker(), dataset=self.dataset, folder=folder, run_id=name)
        return read_checkpoint(folder)

    def dense(self, seed: int) -> Checkpoint:
        """The dense model of a seed."""
        return self.run(f"dense-{self.steps}-seed{seed}", self.config(seed=seed))

    def wanted(self) -> list[Request]:
        """Which images are drawn: classes take turns."""
        return round_robin(range(self.dataset.num_classes), range(self.images))

    def draw(self, network: UNet, config: TrialConfig) -> Tensor:
        """A network's images: ``(N, C, H, W)`` uint8, from the same noise and labels for all networks."""
        generator = Generator(network.eval(), config, self.precision(network, config))
        return generator.images(self.wanted(), config.sample, SAMPLING_SEED)

    def precision(self, network: UNet, config: TrialConfig) -> Precision:
        """The arithmetic of a network."""
        return pick_precision(config.train, next(network.parameters()).device)

    def measure(self, network: UNet, config: TrialConfig, dense_NCHW: Tensor) -> dict[str, float]:
        """What a table tells of a network (``FIGURES``): its quality, how alike its images are to the dense network's,
        and its cost.

        Args:
            network: trained.
            config: what it was trained with.
            dense_NCHW: what :meth:`draw` gave of the dense network that it came from.
        """
        images = self.draw(network, config)
        alike = consistency_of_images(images, dense_NCHW, SAMPLING_SEED)
        cost = count_cost(network)
        return {
            "agreement": self.classifier.agreement(images, [request.label for request in self.wanted()]),
            "loss": validation_loss(network, self.dataset.val, config, self.precision(network, config)),
            "ssim": alike.ssim,
            "mse": alike.mse,
            "params": cost.nonzero_params,
            "macs": cost.nonzero_macs,
        }


class Results:
    """Measurements of a table, by row and seed, kept in a JSON file as they come.

    Args:
        file: where they are kept; what is there stays as it is.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        self.values: dict[str, dict[str, float]] = json.loads(file.read_text("utf-8")) if file.is_file() else {}

    def __contains__(self, key: str) -> bool:
        """Whether a measurement is there with all its figures: an older file may lack some."""
        return self.values.get(key, {}).keys() >= FIGURES

    def add(self, key: str, measured: Mapping[str, float]) -> None:
        """Keep of a measurement what is not there yet."""
        self.values[key] = dict(measured) | self.values.get(key, {})
        write_json(self.file, self.values)

    def over_seeds(self, row: str, seeds: Sequence[int], figure: str) -> list[float]:
        """A figure of a row, for each seed."""
        return [self.values[f"{row}, seed {seed}"][figure] for seed in seeds]


def write_table(file: Path, heading: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table as Markdown, and print it."""
    text = f"{heading}\n\n{markdown_table(columns, rows)}\n"
    write_text(file, text)
    print(text)


def plot(file: Path, points: Mapping[str, Sequence[tuple[float, Sequence[float]]]], x: str, y: str) -> None:
    """Quality against cost: a colour for each way of pruning; mean and range over the seeds, side by side at each cost.

    Args:
        file: a picture.
        points: cost and qualities, by name.
        x: label of the costs.
        y: label of the qualities.
    """
    from matplotlib.figure import Figure  # Slow to import, and needs no display this way.

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    costs = [cost for places in points.values() for cost, _ in places]
    apart = 0.006 * (max(costs) - min(costs)) or 0.01
    for index, (name, places) in enumerate(points.items()):
        means = [sum(values) / len(values) for _, values in places]
        ranges = [(mean - min(values), max(values) - mean) for mean, (_, values) in zip(means, places, strict=True)]
        shifted = [cost + (index - (len(points) - 1) / 2.0) * apart for cost, _ in places]
        axes.errorbar(shifted, means, list(zip(*ranges, strict=True)), fmt="o", markersize=4, capsize=2, label=name)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower right")
    figure.savefig(file, dpi=120)
