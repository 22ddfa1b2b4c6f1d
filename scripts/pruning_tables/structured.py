"""Structured pruning to half the multiply-accumulates, by each importance, before and after a short fine-tuning."""

from __future__ import annotations

from functools import cache
from typing import get_args

import torch
from torch import Tensor

from pruning.calibration import Calibration
from pruning.config import PruneConfig
from pruning.structural import prune_channels
from pruning_tables.study import Results, Study, mean_and_range, plot, write_table

KEEP = 0.5
BATCHES = 20
IMPORTANCES = get_args(PruneConfig.model_fields["importance"].annotation)
DENSE = "dense"


def compare(study: Study) -> None:
    """Measure what is not measured yet, and write the table and its plot."""
    results = Results(study.folder / f"structured-{study.steps}-{study.tune_steps}.json")
    for seed in study.seeds:
        measure_seed(study, results, seed)
    stages = {"before": "pruned", "after": "and fine-tuned"}
    rows = []
    for name in (DENSE, *IMPORTANCES):
        cells = [name]
        for figure, form in (("agreement", ".1%"), ("loss", ".4f"), ("ssim", ".3f"), ("mse", ".4f")):
            for stage in stages:
                cells.append(mean_and_range(results.over_seeds(f"{name} {stage}", study.seeds, figure), form))
        cells.append(f"{results.over_seeds(f'{name} after', study.seeds, 'macs')[0] / 1e6:.2f} M")
        rows.append(cells)
    heading = (
        f"Structured pruning to {KEEP:.0%} of the multiply-accumulates on digits: dense models of {study.steps} steps, "
        f"fine-tuning of {study.tune_steps} steps from averaged weights (the dense ones likewise), gradients from "
        f"{BATCHES} batches, seeds {', '.join(map(str, study.seeds))} (mean, and range in brackets), {study.images} "
        f"images a model; the classifier is right on {study.classifier.accuracy:.2%} of the real held-out digits. SSIM "
        f"and mean squared difference (MSE) compare each image with the one that the dense model draws from the same "
        f"seed and label."
    )
    columns = ["importance"]
    columns += [
        f"{figure}, {words}" for figure in ("class agreement", "val/loss", "SSIM", "MSE") for words in stages.values()
    ]
    write_table(results.file.with_suffix(".md"), heading, [*columns, "MACs"], rows)
    for figure, ending, words in (("agreement", ".png", "class agreement"), ("ssim", "-ssim.png", "SSIM with dense")):
        points = {}
        for name in (DENSE, *IMPORTANCES):
            costs, qualities = (results.over_seeds(f"{name} after", study.seeds, wanted) for wanted in ("macs", figure))
            points[name] = [(macs / 1e6, quality) for macs, quality in zip(costs, qualities, strict=True)]
        file = results.file.with_name(results.file.stem + ending)
        plot(file, points, "million multiply-accumulates an image", words)


def measure_seed(study: Study, results: Results, seed: int) -> None:
    """Everything of one seed: the dense model, and its prunings, as they are and fine-tuned."""
    dense = study.dense(seed)

    @cache
    def dense_images() -> Tensor:
        return study.draw(dense.network(), study.config(seed=seed))

    for name in (DENSE, *IMPORTANCES):
        prune = None
        if name != DENSE:
            prune = PruneConfig(
                method="structured", importance=name, target="macs", keep=KEEP, calibration_batches=BATCHES
            )
        if f"{name} before, seed {seed}" not in results:
            network = dense.network()
            if prune is not None:
                images = Calibration.of(study.dataset.train, study.config(seed=seed), torch.device("cpu"))
                network, _ = prune_channels(network, prune, seed, images if prune.needs_images else None)
            results.add(f"{name} before, seed {seed}", study.measure(network, study.config(seed=seed), dense_images()))
        if f"{name} after, seed {seed}" not in results:
            pruning = {f"prune__{key}": value for key, value in prune.model_dump().items()} if prune else {}
            config = study.config(
                **pruning | ({"prune__step": 0} if prune else {}),
                seed=seed,
                train__steps=study.tune_steps,
                train__warmup_steps=min(20, study.tune_steps // 2),
                train__lr=1e-3,
                init__checkpoint=str(dense.path),
            )
            tuned = study.run(f"{name}-{study.steps}-{study.tune_steps}-seed{seed}", config)
            results.add(f"{name} after, seed {seed}", study.measure(tuned.network(), config, dense_images()))
