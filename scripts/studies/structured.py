"""Prune channels to shares of the multiply-accumulates by each importance, with and without fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from diffusion_core.tables import markdown_table, mean_and_range
from pruning.calibration import Calibration
from pruning.channels.removal import prune_channels
from pruning.config import PruneConfig
from pruning.registries import IMPORTANCES
from studies.study import Results, Study
from studies.table import plot, write_table

BATCHES = 20
DENSE = "dense"
STAGES = {"before": "pruned", "after": "and fine-tuned"}


@dataclass(frozen=True)
class Variant:
    """The dense network, or a pruning of it.

    Attributes:
        importance: how channels are ranked, or ``dense``.
        keep: kept share of the multiply-accumulates.
    """

    importance: str
    keep: float = 1.0

    @property
    def name(self) -> str:
        """Name in results and folders."""
        return DENSE if self.prune is None else f"{self.importance}-{self.keep:g}"

    @property
    def prune(self) -> PruneConfig | None:
        """Configuration of the pruning; None for the dense network."""
        if self.importance == DENSE:
            return None
        knobs = {"importance": self.importance, "keep": self.keep, "calibration_batches": BATCHES}
        return PruneConfig.model_validate({"method": "structured", "target": "macs", **knobs})


def variants(study: Study) -> list[Variant]:
    """Return the rows of the table."""
    return [Variant(DENSE), *(Variant(importance, keep) for keep in study.keeps for importance in IMPORTANCES)]


def compare(study: Study) -> None:
    """Measure what is missing, and write the table and its plots."""
    results = Results(study.folder / f"structured-{study.steps}-{study.tune_steps}.json")
    for seed in study.seeds:
        measure_seed(study, results, seed)
    rows = []
    for variant in variants(study):
        cells = [
            variant.importance,
            f"{results.over_seeds(f'{variant.name} after', study.seeds, 'macs')[0] / 1e6:.2f} M",
        ]
        for figure, form in (("agreement", ".1%"), ("loss", ".4f"), ("ssim", ".3f"), ("mse", ".4f")):
            for stage in STAGES:
                cells.append(mean_and_range(results.over_seeds(f"{variant.name} {stage}", study.seeds, figure), form))
        rows.append(cells)
    heading = (
        f"Structured pruning on {study.config().data.name}, to {', '.join(f'{keep:.0%}' for keep in study.keeps)} of "
        f"the multiply-accumulates: dense models of {study.steps} steps, fine-tuning of {study.tune_steps} steps from "
        f"averaged weights (the dense ones likewise), gradients from {BATCHES} batches, seeds "
        f"{', '.join(map(str, study.seeds))} (mean, and range in brackets), {study.images} images a model; the "
        f"classifier is right on {study.classifier.accuracy:.2%} of the real held-out images. SSIM and mean squared "
        f"difference (MSE) compare each image with that of the dense model for the same seed and label."
    )
    columns = ["importance", "MACs"]
    columns += [
        f"{figure}, {words}" for figure in ("class agreement", "val/loss", "SSIM", "MSE") for words in STAGES.values()
    ]
    write_table(results.file.with_suffix(".md"), [heading, "", *markdown_table(columns, rows)])
    for figure, ending, words in (("agreement", ".png", "class agreement"), ("ssim", "-ssim.png", "SSIM with dense")):
        points: dict[str, list[tuple[float, list[float]]]] = {}
        for variant in variants(study):
            costs, qualities = (
                results.over_seeds(f"{variant.name} after", study.seeds, wanted) for wanted in ("macs", figure)
            )
            points.setdefault(variant.importance, []).append((costs[0] / 1e6, qualities))
        file = results.file.with_name(results.file.stem + ending)
        plot(file, points, "million MACs", f"{words}, fine-tuned", DENSE)


def measure_seed(study: Study, results: Results, seed: int) -> None:
    """Measure the dense model of a seed and its prunings, with and without fine-tuning."""
    dense = study.dense(seed)

    @cache
    def dense_images() -> Tensor:
        return study.draw(dense.network(), study.config(seed=seed))

    for variant in variants(study):
        prune = variant.prune
        if f"{variant.name} before, seed {seed}" not in results:
            network = dense.network()
            if prune is not None:
                images = Calibration.of(study.dataset.train, study.config(seed=seed), torch.device("cpu"))
                network, _ = prune_channels(network, prune, seed, images if prune.needs_images else None)
            measured = study.measure(network, study.config(seed=seed), dense_images())
            results.add(f"{variant.name} before, seed {seed}", measured)
        if f"{variant.name} after, seed {seed}" not in results:
            pruning = {f"prune__{key}": value for key, value in prune.model_dump().items()} if prune else {}
            config = study.config(
                **pruning | ({"prune__step": 0} if prune else {}) | study.fine_tuning(dense),
                seed=seed,
            )
            tuned = study.run(f"{variant.name}-{study.steps}-{study.tune_steps}-seed{seed}", config)
            results.add(f"{variant.name} after, seed {seed}", study.measure(tuned.network(), config, dense_images()))
