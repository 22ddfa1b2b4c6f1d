"""Tables whose rows are runs: blocks against channels, sparse training, and shares by sensitivity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from diffusion_core.evaluation.validation import validation_loss
from diffusion_core.model.cost import LATENCY_BATCH, latencies
from diffusion_core.runs.result import read_result
from diffusion_core.tables import markdown_table, mean_and_range
from pruning.calibration import Calibration
from pruning.channels.removal import prune_channels
from pruning.channels.sensitivity import study_sensitivity
from pruning.config import PruneConfig
from studies.study import Results, Study
from studies.table import write_table

BATCHES = 20
TIMED_S = 4.0
JUDGED = {
    "eval__classifier": "network",
    "eval__figures": ["frechet", "diversity"],
    "eval__extractors": ["classifier"],
    "sample__guidance": 1.0,
    "sample__steps": 10,
}
"""How runs of a table are judged, in the features of the data set's classifier, in ten steps without guidance."""
COLUMNS = {
    "FD": ("eval/fd_", ".2f"),
    "diversity": ("eval/diversity", ".3f"),
    "class agreement": ("eval/class_agreement", ".1%"),
    "val/loss": ("val/loss", ".4f"),
}
"""Figures of a table: how their names begin in a run's result, and how they are written."""


@dataclass(frozen=True)
class Row:
    """One row: a configuration for all seeds.

    Attributes:
        name: its name in the table and in folders.
        knobs: its knobs of pruning.
        tuned: whether it starts from the dense model of the seed, or is trained from the start.
    """

    name: str
    knobs: Mapping[str, Any] = field(default_factory=dict)
    tuned: bool = True


def depth_rows() -> list[Row]:
    """Return channels, blocks, and both, at equal multiply-accumulates and at equal measured times."""
    kinds: dict[str, float | str] = {"channels": 0.0, "both": 0.5, "blocks": 1.0, "auto": "auto"}
    rows = [Row("dense")]
    # Widths alone do not reach the shorter time.
    for target, keep, names in (
        ("macs", 0.5, ("channels", "both", "blocks")),
        ("latency", 0.5, ("channels", "both")),
        ("latency", 0.3, ("auto", "both")),
    ):
        rows += [Row(f"{name}, {target} {keep}", {"target": target, "keep": keep, "depth": kinds[name]})
                 for name in names]  # fmt: skip
    return rows


def depth(study: Study) -> None:
    """Compare blocks with channels: fine-tuned from the dense model, with output and feature distillation."""

    def config(row: Row, seed: int) -> dict[str, Any]:
        pruning = {"prune__method": "structured", "prune__step": 0, "prune__calibration_batches": BATCHES}
        pruning |= {f"prune__{key}": value for key, value in row.knobs.items()}
        return pruning | {"distill__output": 1.0, "distill__features": 1.0} if row.knobs else {}

    heading = (
        f"Blocks against channels on {study.config().data.name}: dense models of {study.steps} steps, fine-tuning of "
        f"{study.tune_steps} steps with output and feature distillation (dense: without), {study.images} images a "
        f"model in ten steps without guidance, seeds {', '.join(map(str, study.seeds))} (mean, and range in brackets); "
        f"times are relative to those of the dense model."
    )
    compare(study, "depth", heading, depth_rows(), config)


def sparse(study: Study) -> None:
    """Compare RigL with gradual pruning and with random masks, trained from the start."""
    rows = [Row("dense", tuned=False)]
    for keep in study.keeps:
        rows += [Row(f"{method}, {1 - keep:.0%}", {"method": method, "keep": keep}, tuned=False)
                 for method in ("gradual", "random", "rigl")]  # fmt: skip

    def config(row: Row, seed: int) -> dict[str, Any]:
        pruning = {f"prune__{key}": value for key, value in row.knobs.items()}
        if pruning and row.knobs["method"] != "gradual":
            pruning |= {"prune__step": 0, "prune__scope": "layer", "prune__profile": "erk"}
        if pruning and row.knobs["method"] != "random":
            pruning["prune__interval"] = max(1, min(20, study.steps // 8))
        return pruning

    heading = (
        f"Sparse training on {study.config().data.name}: {study.steps} steps, {study.images} images a model in ten "
        f"steps without guidance, seeds {', '.join(map(str, study.seeds))} (mean, and range in brackets). "
        f"Random masks and RigL share weights by ERK."
    )
    compare(study, "sparse", heading, rows, config)


def compare(
    study: Study, name: str, heading: str, rows: Sequence[Row], config: Callable[[Row, int], dict[str, Any]]
) -> None:
    """Train the rows that have no result yet, seed by seed. Write the table of all rows that have one."""
    keys = ["model/nonzero_params", "model/macs", "time 1", f"time {LATENCY_BATCH}"]
    results = Results(study.folder / f"{name}-{study.steps}-{study.tune_steps}.json", [*keys, "val/loss"])
    for seed in study.seeds:
        dense = study.dense(seed)
        for row in rows:
            key = f"{row.name}, seed {seed}"
            if key in results:
                continue
            start = study.fine_tuning(dense) if row.tuned else {}
            knobs = JUDGED | {"eval__num_images": study.images} | start | config(row, seed)
            folder = f"{name}-{row.name}-{study.steps}-{study.tune_steps}-seed{seed}".replace(", ", "-").replace(
                " ", ""
            )
            checkpoint = study.run(folder, study.config(seed=seed, **knobs))
            found = read_result(study.folder / "runs" / folder)
            assert found is not None
            figures = {
                key: next(value for name, value in found[0].figures.items() if name.startswith(key))
                for key in [*keys[:2], *(key for key, _ in COLUMNS.values())]
            }
            for batch in (1, LATENCY_BATCH):
                ours, theirs = latencies([checkpoint.network(), dense.network()], batch, TIMED_S, least=10)
                figures[f"time {batch}"] = ours / theirs
            results.add(key, figures)
        written(study, results, heading, rows)


def written(study: Study, results: Results, heading: str, rows: Sequence[Row]) -> None:
    """Write the table of the seeds that are complete."""
    seeds = [seed for seed in study.seeds if all(f"{row.name}, seed {seed}" in results for row in rows)]
    cells = []
    for row in rows:
        numbers = [results.over_seeds(row.name, seeds, f"model/{what}")[0] for what in ("macs", "nonzero_params")]
        times = [results.over_seeds(row.name, seeds, f"time {batch}") for batch in (1, LATENCY_BATCH)]
        cells.append(
            [
                row.name,
                f"{numbers[0] / 1e6:.2f} M",
                f"{numbers[1] / 1e3:.0f} k",
                *(mean_and_range(time, ".2f") for time in times),
                *(mean_and_range(results.over_seeds(row.name, seeds, key), form) for key, form in COLUMNS.values()),
            ]
        )
    columns = ["", "MACs", "parameters", "time, batch 1", f"time, batch {LATENCY_BATCH}", *COLUMNS]
    write_table(results.file.with_suffix(".md"), [heading, "", *markdown_table(columns, cells)])


def shares(study: Study) -> None:
    """Compare the shares that sensitivity proposes with uniform ones, before fine-tuning."""
    results = Results(study.folder / f"shares-{study.steps}.json", ["uniform", "sensitivity", "dense"])
    for seed in study.seeds:
        dense, config = study.dense(seed), study.config(seed=seed)
        images = Calibration.of(study.dataset.train, config, torch.device("cpu"))
        network = dense.network()
        for keep in study.keeps:
            key = f"{keep:g}, seed {seed}"
            if key in results:
                continue
            prune = PruneConfig(method="structured", keep=keep, calibration_batches=BATCHES)
            folder = study.folder / f"sensitivity-{keep:g}-seed{seed}"
            folder.mkdir(exist_ok=True)
            proposed = list(study_sensitivity(network, prune, seed, images, folder)["proposed"].values())
            variants = {"dense": network, "uniform": prune_channels(network, prune)[0]}
            variants["sensitivity"] = prune_channels(network, prune.model_copy(update={"block_keep": proposed}))[0]
            losses = {
                name: validation_loss(one, study.dataset.val, config, study.precision(one, config))
                for name, one in variants.items()
            }
            results.add(key, losses)
    rows = [
        [f"{keep:.0%}", *(mean_and_range(results.over_seeds(f"{keep:g}", study.seeds, name), ".4f")
                          for name in ("dense", "uniform", "sensitivity"))]
        for keep in study.keeps
    ]  # fmt: skip
    heading = (
        f"val/loss of channels pruned by l2 to a share of the multiply-accumulates, before fine-tuning: dense models "
        f"of {study.steps} steps, sensitivity from {BATCHES} batches, seeds {', '.join(map(str, study.seeds))} "
        f"(mean, and range in brackets)."
    )
    columns = ["MACs kept", "dense", "uniform shares", "shares by sensitivity"]
    write_table(results.file.with_suffix(".md"), [heading, "", *markdown_table(columns, rows)])
