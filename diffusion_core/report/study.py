"""What a report is made from: trials and what was searched, as plain data."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from diffusion_core.config import metrics
from diffusion_core.config.metrics import Goal
from diffusion_core.config.ranking import judged
from diffusion_core.redact import redacted
from diffusion_core.runs.inputs import Input
from diffusion_core.search.objectives import Objective

SEED = "seed"
SECONDS = "seconds"
REMAINING = "remaining"
"""Figure of a pruned network: share of the prunable weights or channels that is left, 1 - ``prune/sparsity``."""

COSTS = {
    **metrics.COSTS,
    "model/peak_memory": "peak memory of 16 images (bytes)",
    SECONDS: "wall time of the trial (s)",
    REMAINING: "share of weights that remain",
}
"""Figures of cost, smaller is cheaper, and their labels."""

FIRST_COSTS = ("model/nonzero_macs", "model/macs", "model/params", SECONDS)
"""Costs that plots show at first, those that are preferred first."""

COUNTED = ("model/macs", "model/nonzero_macs", "model/params", "model/nonzero_params", "model/checkpoint_bytes")
"""Costs that depend on the network alone: the same for every trial with the same settings of the model."""

SHARES = frozenset({"eval/class_agreement", "dense/eval/class_agreement"})
"""Figures that are a share of independent images."""

FINISHED = "finished"
"""State of trials that ended by themselves."""

CHAIN, SWEEP, RUNS = "chain", "sweep", "runs"
"""Kinds of studies: a chain of lottery tickets, a sweep, and runs that were put side by side."""

PLACES = ("log.", "checkpoint.", "plugins", "wandb")
"""Beginnings of settings that do not change what is trained."""


@dataclass(frozen=True)
class Trial:
    """A trial, or a round of a chain.

    Attributes:
        name: its run's id or name; unique in a study.
        state: ``finished``, ``stopped`` (by early termination), ``running``, ``failed``, ``unfinished``, or another
            word of the program that ran it.
        settings: every known knob, by dotted key.
        figures: what was measured on its checkpoint, the costs of its network, and ``seconds``.
        protocols: how figures were measured, by their names.
        step: step of that checkpoint; None if it is unknown.
        history: rows of figures, each with its ``step``, in order.
        pictures: files by what they show: ``samples`` (a grid), ``diffusion`` (an animation).
        parent: name of the trial whose network it starts from, or None.
        inputs: what it took from outside, by the section of the knobs that name it.
        links: web addresses by their labels.
        reproduce: command that trains it again; empty if it is unknown.
        sample: command that samples from its checkpoint; empty if it is unknown.
    """

    name: str
    state: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    protocols: Mapping[str, str] = field(default_factory=dict)
    step: int | None = None
    history: Sequence[Mapping[str, float]] = ()
    pictures: Mapping[str, Path] = field(default_factory=dict)
    parent: str | None = None
    inputs: Mapping[str, Input] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    reproduce: str = ""
    sample: str = ""

    @property
    def seed(self) -> int | None:
        """Its seed, or None if it is unknown."""
        return self.settings.get(SEED)

    def value(self, figure: str) -> float | None:
        """Return a figure, or None if it is missing, NaN or infinite."""
        value = self.figures.get(figure)
        return value if value is not None and math.isfinite(value) else None

    def judged(self, figure: str) -> float | None:
        """Return a figure as :meth:`value` does; None if the trial failed."""
        return self.value(figure) if figure in judged(self) else None

    def images(self, figure: str) -> int | None:
        """Return the number of images that a figure was measured on, which its protocol names as ``n=``."""
        found = re.search(r"(?:^|, )n=(\d+)", self.protocols.get(figure, ""))
        return int(found[1]) if found else None


@dataclass(frozen=True)
class Study:
    """Trials that a report is about.

    Attributes:
        title: name of the sweep or of the folder.
        kind: ``sweep``, ``chain`` or ``runs``.
        method: how trials were chosen, in a few words: ``grid search``.
        searched: values or range of each searched setting, in words.
        metric: the figure that trials are ranked by, or None.
        goals: which way each figure is better; figures without an entry are no measures of quality.
        trials: all trials, in the order of their creation.
        varied: settings that differ between trials, the searched ones first.
        objectives: the figures that a search with several of them made better; else none.
        running: whether more is to come.
        links: web addresses by their labels.
    """

    title: str
    trials: Sequence[Trial]
    kind: str = RUNS
    method: str = ""
    searched: Mapping[str, str] = field(default_factory=dict)
    metric: str | None = None
    goals: Mapping[str, Goal] = field(default_factory=dict)
    varied: Sequence[str] = ()
    objectives: Sequence[Objective] = ()
    running: bool = False
    links: Mapping[str, str] = field(default_factory=dict)

    def without_secrets(self) -> Study:
        """Return the study with secrets blanked out in all texts but the paths of pictures."""
        names = [
            entry.name for entry in fields(Trial) if entry.name not in ("pictures", "history", "figures", "inputs")
        ]
        texts = redacted([[getattr(trial, name) for name in names] for trial in self.trials])
        trials = [
            replace(trial, **dict(zip(names, values, strict=True)))
            for trial, values in zip(self.trials, texts, strict=True)
        ]
        own = {entry.name: redacted(getattr(self, entry.name)) for entry in fields(self) if entry.name != "trials"}
        return replace(self, **own, trials=trials)

    def qualities(self) -> list[str]:
        """Return the figures of quality that a trial has: the metric first."""
        found = dict.fromkeys(name for trial in self.trials for name in trial.figures if name in self.goals)
        return [name for name in dict.fromkeys([self.metric, *found]) if name in found]

    def costs(self) -> list[str]:
        """Return the costs that a trial has: those that are objectives first."""
        first = [each.name for each in self.objectives if each.name in COSTS]
        names = dict.fromkeys([*first, *COSTS])
        return [name for name in names if any(trial.value(name) is not None for trial in self.trials)]

    def first_cost(self) -> str | None:
        """Return the cost that plots show at first: one that tells trials apart, if there is one."""
        costs = self.costs()
        values = {name: [trial.value(name) for trial in self.trials] for name in costs}
        wanted = dict.fromkeys([*(each.name for each in self.objectives), *FIRST_COSTS])
        telling = [name for name in wanted if name in costs and len(set(values[name]) - {None}) > 1]
        # Without masks, the weights that are not pruned are all weights.
        same = [name for name in telling if values[name] == values.get(name.replace("nonzero_", ""))]
        preferred = [name for name in telling if "nonzero_" not in name or name not in same]
        return next(iter([*preferred, *costs]), None)

    def states(self) -> dict[str, int]:
        """Return the number of trials in each state, the most frequent first."""
        names = [trial.state for trial in self.trials]
        return dict(sorted(((name, names.count(name)) for name in set(names)), key=lambda pair: (-pair[1], pair[0])))


def recipe(trial: Trial) -> str:
    """Return a text that is equal for trials that differ in nothing but their seed and the places they write to."""
    decisive = {key: value for key, value in trial.settings.items() if key != SEED and not key.startswith(PLACES)}
    return json.dumps(decisive or {"name": trial.name}, sort_keys=True, default=str)


def differing(trials: Sequence[Trial]) -> list[str]:
    """Return the settings whose values differ between trials, in the order of their first appearance."""
    keys = dict.fromkeys(key for trial in trials for key in trial.settings if not key.startswith(PLACES))
    return [key for key in keys if len({json.dumps(trial.settings.get(key), default=str) for trial in trials}) > 1]
