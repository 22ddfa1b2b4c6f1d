"""Read the folders of runs, of an offline sweep, or of a chain of tickets into a study."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import yaml

from diffusion_core.config import ConfigError
from diffusion_core.config.metrics import Goal, goal_of
from diffusion_core.report.study import CHAIN, COSTS, REMAINING, RUNS, SECONDS, SWEEP, Study, Trial, differing
from diffusion_core.run_folder import (
    CHECKPOINTS,
    CONFIG_FILE,
    LOCK_FILE,
    RESULT_FILE,
    ROUNDS,
    RUN_FILE,
    SAMPLES,
    SWEEP_LOCK,
    SWEEP_STATE,
    SWEEP_TRIALS,
    best_figures,
    read_history,
    read_protocols,
    run_folders,
    without_step,
)
from diffusion_core.runs.inputs import recorded_inputs
from diffusion_core.search.objectives import objectives_of
from diffusion_core.tracking import STEP

COST_FIGURES = ("model/", "prune/", "sample/")
PREFERRED = ("eval/class_agreement", "val/loss")
"""Metrics of runs that belong to no sweep, if ``checkpoint.best_metric`` was not measured."""
CLOCK_S = 2.0
"""Seconds that the clock of the file system may differ from that of processes."""
IN_FLIGHT = frozenset({"running", "stopping"})


def read_study(folders: Sequence[Path], metric: str | None = None) -> Study:
    """Read what some folders hold: an offline sweep, a chain of tickets, or runs at any depth.

    Args:
        folders: one or several.
        metric: the figure to rank by; None: that of the sweep, or ``checkpoint.best_metric``.

    Raises:
        ConfigError: if a folder holds no run, or no trial has the metric.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{str(folder)!r}: no such folder; name a run, a sweep, or a folder of them")
    only = folders[0] if len(folders) == 1 else None
    if only is not None and (only / SWEEP_STATE).is_file():
        return complete(_read_sweep(only), metric)
    if only is not None and (only / ROUNDS).is_dir():
        return complete(_read_chain(only), metric)
    found = [run for folder in folders for run in run_folders(folder) if not (run / ROUNDS).is_dir()]
    if not found:
        raise ConfigError(f"{str(folders[0])!r}: no run here; name a run, a sweep, or a folder of them")
    trials = _distinct([read_trial(run) for run in dict.fromkeys(found)], found)
    title = ", ".join(folder.resolve().name for folder in folders)
    running = any(trial.state == "running" for trial in trials)
    return complete(Study(title, with_parents(trials), RUNS, running=running), metric)


def _read_sweep(folder: Path) -> Study:
    """Return the study of an offline sweep, from its state and the folders of its trials."""
    try:
        state = json.loads((folder / SWEEP_STATE).read_text(encoding="utf-8"))
        sweep, listed = state["sweep"], [(str(trial["id"]), dict(trial)) for trial in state["trials"]]
        searched, _ = searched_settings(sweep["parameters"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{str(folder)!r}: its {SWEEP_STATE} is damaged; name the folders of its runs") from None
    running = _holder_lives(folder / SWEEP_LOCK)
    trials = []
    for name, trial in listed:
        known = str(trial.get("state", ""))
        known = "unfinished" if known in IN_FLIGHT and not running else known
        run = folder / SWEEP_TRIALS / name
        trials.append(read_trial(run, name, known, trial.get("parameters", {}), trial.get("seconds")))
    return Study(
        str(sweep.get("name") or folder.name),
        with_parents(trials),
        SWEEP,
        method=f"{sweep.get('method', '')} search",
        searched=searched,
        **metric_of(sweep),
        varied=list(searched),
        running=running,
    )


def metric_of(sweep: Mapping[str, Any]) -> dict[str, Any]:
    """Return metric, goals and objectives of a study from a sweep's configuration.

    It knows the goals of figures that plugins add.
    """
    several = sweep.get("metrics")
    if isinstance(several, list) and all(isinstance(each, Mapping) and "name" in each for each in several):
        objectives = objectives_of({"metrics": several})
        qualities = [each for each in objectives if each.name not in COSTS]
        goals = {"goals": {each.name: each.goal for each in qualities}, "objectives": objectives}
        return goals | ({"metric": qualities[0].name} if qualities else {})
    named = sweep.get("metric")
    if not isinstance(named, Mapping) or "name" not in named:
        return {}
    goal = named.get("goal")
    return {"metric": str(named["name"])} | (
        {"goals": {str(named["name"]): goal}} if goal in ("minimize", "maximize") else {}
    )


def flat_parameters(parameters: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the parameters of a sweep by dotted key; W&B nests them under ``parameters``."""
    for key, spec in parameters.items():
        if isinstance(spec, Mapping) and isinstance(spec.get("parameters"), Mapping):
            yield from flat_parameters(spec["parameters"], f"{prefix}{key}.")
        elif isinstance(spec, Mapping):
            yield f"{prefix}{key}", dict(spec)


def searched_settings(parameters: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Return the searched parameters of a sweep in words, by dotted key, and the keys of all its parameters."""
    flat = dict(flat_parameters(parameters))
    return {key: words_of(spec) for key, spec in flat.items() if _is_searched(spec)}, list(flat)


def _is_searched(spec: Mapping[str, Any]) -> bool:
    return "value" not in spec and len(spec.get("values", (0, 1))) > 1


def words_of(spec: Mapping[str, Any]) -> str:
    """Return a parameter of a sweep in words: ``linear, cosine``, or ``0.0001 to 0.1 (log_uniform_values)``."""
    if "values" in spec:
        return ", ".join(str(value) for value in spec["values"])
    if "min" in spec or "max" in spec:
        kind = f" ({spec['distribution']})" if "distribution" in spec else ""
        return f"{spec.get('min', '-')} to {spec.get('max', '-')}{kind}"
    return ", ".join(f"{key} {value}" for key, value in spec.items())


def _read_chain(folder: Path) -> Study:
    """Return the study of a chain of tickets: its rounds, each with its share of remaining weights."""
    runs = sorted(run.parent for run in (folder / ROUNDS).glob(f"*/{RUN_FILE}"))
    trials = [read_trial(run) for run in runs]
    if not trials:
        raise ConfigError(f"{str(folder)!r}: no round of the chain has begun; wait for the first one")
    again = _reproduce(folder)
    trials = [replace(trial, reproduce=again) for trial in trials]
    running = _holder_lives(folder / LOCK_FILE)
    joined = []
    for run, trial in zip(runs, trials, strict=True):
        number, _, control = run.name.partition("-")
        before = f"{int(number) - 1:02d}" if number.isdecimal() and int(number) else None
        parent = next((one.name for place, one in zip(runs, trials, strict=True) if place.name == before), None)
        state = "running" if running and trial.state == "unfinished" else trial.state
        figures = {**trial.figures}
        figures.setdefault(REMAINING, 1.0)  # The dense network has no figure of its sparsity.
        settings = {**trial.settings, "prune.control": control.replace("-", "_") or "none"}
        joined.append(replace(trial, state=state, parent=parent, figures=figures, settings=settings))
    return Study(folder.resolve().name, joined, CHAIN, "chain of lottery tickets", running=running)


def read_trial(
    folder: Path,
    name: str | None = None,
    state: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    seconds: float | None = None,
) -> Trial:
    """Read the folder of a run; what is missing or damaged is left out.

    Args:
        folder: the run's folder; it may be missing.
        name: its name; None: the run's id.
        state: its state; None: as the folder tells.
        parameters: settings that are known without the folder.
        seconds: wall time; None: that of its result.
    """
    result, history = _json(folder / RESULT_FILE), read_history(folder)
    settings = dict(parameters or {}) | (_mapping(result.get("config")) or _settings(folder))
    step, figures, protocols = _figures(folder, result, history)
    sparsity = figures.get("prune/sparsity")
    if sparsity is not None:
        figures[REMAINING] = 1.0 - sparsity
    seconds = seconds if seconds is not None else result.get("seconds")
    if isinstance(seconds, int | float):
        figures[SECONDS] = float(seconds)
    if state is None:
        live = "running" if _holder_lives(folder / LOCK_FILE) else "unfinished"
        state = "finished" if result else live
    has_checkpoint = (folder / CHECKPOINTS).is_dir()
    return Trial(
        name or str(_json(folder / RUN_FILE).get("id") or folder.name),
        state,
        settings,
        figures,
        protocols,
        step,
        history,
        newest_pictures(folder),
        str(settings.get("init.checkpoint") or settings.get("init.artifact") or "") or None,
        recorded_inputs(folder),
        reproduce=_reproduce(folder),
        sample=f"python scripts/sample_images.py --checkpoint {shlex.quote(str(folder))} --out samples"
        if has_checkpoint
        else "",
    )


def _figures(
    folder: Path, result: Mapping[str, Any], history: Sequence[Mapping[str, float]]
) -> tuple[int | None, dict[str, float], dict[str, str]]:
    """Return step, figures and protocols of the checkpoint that commands take of a run, and its costs.

    For a finished run they are those of its row on the leaderboard. For another one they are those that were logged
    at the step of its best checkpoint; the best values of the whole run if that step is unknown.
    """
    from diffusion_core.choice import best_of  # These import PyTorch, which the process of a sweep does not.
    from diffusion_core.evaluation.leaderboard import COSTS as COLUMNS
    from diffusion_core.evaluation.leaderboard import OF_IMAGES, from_folders

    final = {key: value for key, value in _mapping(result.get("figures")).items() if isinstance(value, int | float)}
    costs = {key: value for key, value in final.items() if key.startswith(COST_FIGURES)}
    entry = next(iter(from_folders([folder])), None) if {"run_id", "step", "figures"} <= result.keys() else None
    protocols = read_protocols(folder)
    if entry is not None:
        network = {key: value for key, value in costs.items() if not key.startswith(OF_IMAGES) and entry.costs}
        of_row = {COLUMNS[column]: value for column, value in entry.costs.items()}
        return entry.step, entry.figures | network | of_row, protocols | entry.protocols
    best = best_of(folder / CHECKPOINTS) if (folder / CHECKPOINTS).is_dir() else None
    step = None if best is None else int(best["step"])
    row = next((without_step(row) for row in history if row[STEP] == step), None)
    figures = best_figures(history) if row is None else row
    known = {**figures, **(final if row is None else costs)}
    return (None if row is None else step), known, protocols


def newest_pictures(folder: Path) -> dict[str, Path]:
    """Return the newest grid (``samples``) and animation (``diffusion``) of a run, those that exist."""
    samples = folder / SAMPLES
    newest = {
        kind: max(samples.glob(f"{kind}-*.{suffix}"), default=None)
        for kind, suffix in (("samples", "png"), ("diffusion", "gif"))
    }
    return {kind: path for kind, path in newest.items() if path is not None}


def with_parents(trials: Sequence[Trial]) -> list[Trial]:
    """Return trials whose parent is another one of them by its name; what starts from elsewhere has none.

    A parent is known by the path of a checkpoint or the name of an artifact, which contain the name of its run.
    """
    names = {trial.name for trial in trials}
    found = []
    for trial in trials:
        words = (trial.parent or "").replace(":", "/").split("/")
        parents = [word.removeprefix("model-") for word in words]
        found.append(replace(trial, parent=next((name for name in parents if name in names - {trial.name}), None)))
    return found


def complete(study: Study, metric: str | None = None) -> Study:
    """Return a study with the goals of its figures, its metric and its varied settings filled in.

    Raises:
        ConfigError: if a metric is asked for that no trial has.
    """
    figures = dict.fromkeys(name for trial in study.trials for name in trial.figures)
    goals: dict[str, Goal] = {name: goal for name in figures if (goal := goal_of(name) or study.goals.get(name))}
    if metric is not None and metric not in goals:
        known = ", ".join(goals) or "none"
        raise ConfigError(f"--metric = {metric!r}: no trial has it, or it is no figure of quality; there are {known}")
    named = [str(trial.settings.get("checkpoint.best_metric")) for trial in study.trials]
    wanted = [metric, study.metric, *named, *PREFERRED, *goals]
    chosen = next((name for name in wanted if name in goals), study.metric)
    varied = [*study.varied] or differing(study.trials)
    return replace(study, metric=chosen, goals=goals, varied=varied)


def _distinct(trials: Sequence[Trial], folders: Sequence[Path]) -> list[Trial]:
    """Return trials with distinct names: those of equal ids are named by their folders."""
    names = [trial.name for trial in trials]
    return [
        replace(trial, name=str(folder)) if names.count(trial.name) > 1 else trial
        for trial, folder in zip(trials, dict.fromkeys(folders), strict=True)
    ]


def _reproduce(folder: Path) -> str:
    if not (folder / CONFIG_FILE).is_file():
        return ""
    config, again = shlex.quote(str(folder / CONFIG_FILE)), shlex.quote(f"runs/{folder.resolve().name}-again")
    return f"python -m agent --config {config} --log.dir={again}"


def _settings(folder: Path) -> dict[str, Any]:
    try:
        text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
        loaded = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return _mapping(loaded)
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return _mapping(content)


def _mapping(content: Any) -> dict[str, Any]:
    """Return a mapping as a dictionary; anything else, which a damaged file may hold, as an empty one."""
    return {str(key): value for key, value in content.items()} if isinstance(content, Mapping) else {}


def _holder_lives(lock: Path) -> bool:
    """Return whether the process that wrote a lock file is alive. The lock itself is not tried: that would hold it."""
    try:
        process = psutil.Process(int(lock.read_text(encoding="utf-8")))
        with suppress(psutil.AccessDenied):
            if str(lock.resolve()) in [file.path for file in process.open_files()]:
                return True
        # Its files are another user's. A process that began after the file was written has inherited the id.
        return bool(process.create_time() <= lock.stat().st_mtime + CLOCK_S)
    except (OSError, ValueError, psutil.Error):
        return False
