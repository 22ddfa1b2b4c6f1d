"""Studies made up from a seed: what their pages must show is known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion_core.report.study import CHAIN, SWEEP, Study, Trial

METRIC = "eval/class_agreement"
STATES = ("finished", "finished", "finished", "stopped", "failed", "running")


def made_up(count: int, folder: Path | None = None, seed: int = 0) -> Study:
    """A random search of `count` trials over a learning rate, a schedule and a pruner; the rate decides most."""
    draw = random.Random(seed)
    trials = []
    for number in range(count):
        rate, schedule = 10 ** draw.uniform(-4, -1), draw.choice(["linear", "cosine"])
        method = draw.choice(["none", "magnitude", "structured"])
        state = "finished" if number == 0 else draw.choice(STATES)
        kept = 1.0 if method == "none" else draw.uniform(0.2, 0.9)
        best = 0.97 - 0.12 * abs(math.log10(rate) + 2.5) - 0.2 * (1 - kept) ** 2 + draw.gauss(0, 0.01)
        last = 40 if state in ("stopped", "failed") else 100
        history: list[dict[str, float]] = [
            {"step": step, "train/loss": 1 / (1 + step * rate), METRIC: best * (1 - math.exp(-step / 30))}
            for step in range(2, last + 1, 2)
        ]
        figures = {METRIC: round(best * 500) / 500, "val/loss": 1.2 - best} if state != "failed" else {}
        figures |= {"model/macs": 16e6 * kept, "model/params": 7e5 * kept, "seconds": draw.uniform(40, 60)}
        pictures = {}
        if folder is not None and number < 8:
            pixels = np.random.default_rng(number).integers(0, 255, (90, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            pictures["samples"] = folder / f"{number}.png"
        settings: dict[str, Any] = {"seed": 0, "train.lr": rate, "diffusion.schedule": schedule,
                                    "prune.method": method, "prune.keep": kept, "train.steps": 100}  # fmt: skip
        trials.append(Trial(
            f"trial-{number:03d}", state, settings, figures, {METRIC: "n=500, sampler=ddim, steps=25"}, last, history,
            pictures, f"trial-{number - 1:03d}" if number % 10 == 9 else None,
            reproduce=f"python -m agent --config runs/{number}/config.yaml", sample="python scripts/sample_images.py",
        ))  # fmt: skip
    varied = ["train.lr", "diffusion.schedule", "prune.method", "prune.keep"]
    searched = {key: "0.0001 to 0.1 (log_uniform_values)" if key == "train.lr" else "some values" for key in varied}
    goals: Any = {METRIC: "maximize", "val/loss": "minimize"}
    return Study("made up", trials, SWEEP, "random search", searched, METRIC, goals, varied)


def chain(rounds: int = 6) -> Study:
    """A chain of tickets whose quality falls slowly, and a control at its end that is worse."""
    trials = []
    for number in range(rounds + 1):
        for control in ["none", *(["random_mask"] if number == rounds else [])]:
            value = 0.98 - 0.01 * number - (0.1 if control != "none" else 0.0)
            figures = {METRIC: value, "remaining": 0.8**number, "model/nonzero_params": 1e5 * 0.8**number}
            settings = {"prune.rounds": number, "prune.control": control}
            name = f"chain-{number:02d}" + ("" if control == "none" else "-random-mask")
            parent = f"chain-{number - 1:02d}" if number else None
            trials.append(Trial(name, "finished", settings, figures, {METRIC: "n=1000"}, 100, parent=parent))
    return Study("tickets", trials, CHAIN, "chain of lottery tickets", metric=METRIC, goals={METRIC: "maximize"},
                 varied=["prune.rounds", "prune.control"])  # fmt: skip


@pytest.fixture
def study_of() -> Callable[..., Study]:
    """Make up a study of some trials."""
    return made_up


@pytest.fixture
def chain_of_tickets() -> Study:
    return chain()
