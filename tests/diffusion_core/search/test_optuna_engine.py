"""Searches by Optuna: they go on after a kill as if there had been none, and search what a sweep file says."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from diffusion_core.config import ConfigError
from diffusion_core.registries import SEARCHES
from diffusion_core.search import engine
from diffusion_core.search.method import Search, SearchRequest
from diffusion_core.search.objectives import Objective, front_among, point_of
from diffusion_core.search.optuna_engine import JOURNAL
from diffusion_core.search.settings import setting_problems

METHODS = ("tpe", "nsga2")
QUALITY, COST = Objective("eval/class_agreement", "maximize"), Objective("sample/macs", "minimize")
SPACE: dict[str, Any] = {
    "train.lr": {"min": 1e-4, "max": 1e-1, "distribution": "log_uniform_values"},
    "sample.steps": {"min": 1, "max": 50},
    "diffusion.schedule": {"values": ["linear", "cosine"]},
    "preset": {"value": "digits"},
}


def figures_of(parameters: Mapping[str, Any]) -> dict[str, float]:
    """Figures that depend on the parameters as those of a trial might: more steps are better and dearer."""
    rate = math.exp(-3.0 * (math.log10(parameters["train.lr"]) + 2.3) ** 2)
    schedule = 1.0 if parameters["diffusion.schedule"] == "cosine" else 0.8
    share = parameters["sample.steps"] / 50
    return {"eval/class_agreement": rate * schedule * (1.0 - math.exp(-5.0 * share)), "sample/macs": share}


def search_of(method: str, folder: Path | None = None, quality_from: float | None = None, **space: Any) -> Search:
    objectives = [Objective(QUALITY.name, QUALITY.goal, quality_from), COST]
    return SEARCHES[method].make(SearchRequest({"parameters": space or SPACE}, objectives, folder, 20))


class Sweep:
    """The trials of a sweep: asks a search for one after another, and measures them."""

    def __init__(self, figures: Callable[[Mapping[str, Any]], dict[str, float]] = figures_of) -> None:
        self.figures = figures
        self.past: list[dict[str, Any]] = []
        self.runs: list[Any] = []

    def go_on(self, search: Search, count: int) -> None:
        for _ in range(count):
            parameters = search.suggest(self.past, lambda: self.runs)
            assert parameters is not None
            self.past.append(parameters)
            figures = self.figures(parameters)
            name = str(len(self.runs))
            self.runs.append(engine.past_run(name, parameters, "finished" if figures else "failed", figures, []))

    def points(self) -> list[Any]:
        return [point_of(run.summary_metrics, [QUALITY, COST]) for run in self.runs]


@pytest.mark.parametrize("method", METHODS)
def test_a_search_that_is_opened_again_goes_on_as_if_it_had_not_been_closed(method: str, tmp_path: Path) -> None:
    whole, broken = Sweep(), Sweep()
    whole.go_on(search_of(method), 15)
    for _ in range(5):
        broken.go_on(search_of(method, tmp_path), 3)
    assert broken.past == whole.past
    assert len({str(parameters) for parameters in whole.past}) > 10


@pytest.mark.parametrize("method", METHODS)
def test_at_whichever_line_of_its_journal_it_is_killed_it_goes_on_the_same(method: str, tmp_path: Path) -> None:
    whole = Sweep()
    whole.go_on(search_of(method, tmp_path), 9)
    journal = (tmp_path / JOURNAL).read_bytes()
    known = Sweep()  # What the sweep's own state knows: the last suggestion never came to it.
    known.past, known.runs = whole.past[:8], whole.runs[:8]
    lines = journal.splitlines(keepends=True)
    told = max(place for place, line in enumerate(lines) if b'"place"' in line and b":7" in line)
    for end in range(told + 1, len(lines) + 1):
        for torn in (b"", b'{"op_code": 4, "wor'):
            (tmp_path / JOURNAL).write_bytes(b"".join(lines[:end]) + torn)
            again = Sweep()
            again.past, again.runs = list(known.past), list(known.runs)
            again.go_on(search_of(method, tmp_path), 1)
            assert again.past[8] == whole.past[8], f"killed after line {end} of {len(lines)}"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda journal: journal.unlink(), "lacks 5 of the sweep's 5 trials"),
        (lambda journal: journal.write_bytes(journal.read_bytes()[:-600].rpartition(b"\n")[0] + b"\n"), "lacks "),
        (lambda journal: journal.write_bytes(b"\x00garbage\n" + journal.read_bytes()), "is damaged ("),
        (lambda journal: journal.write_bytes(b'{"op_code": 99}\n' + journal.read_bytes()), "is damaged ("),
    ],
)
def test_a_damaged_journal_is_one_line(damage: Callable[[Path], Any], reason: str, tmp_path: Path) -> None:
    sweep = Sweep()
    sweep.go_on(search_of("tpe", tmp_path), 5)
    damage(tmp_path / JOURNAL)
    with pytest.raises(ConfigError) as caught:
        sweep.go_on(search_of("tpe", tmp_path), 1)
    message = str(caught.value)
    assert message.startswith(f"'{tmp_path / JOURNAL}': {reason}")
    assert message.endswith("; give this sweep another --name, or delete its folder")
    assert "\n" not in message


def test_a_journal_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).mkdir()
    with pytest.raises(ConfigError) as caught:
        Sweep().go_on(search_of("tpe", tmp_path), 1)
    said = f"'{tmp_path / JOURNAL}': Is a directory; free some space or make it writable, then repeat the command"
    assert str(caught.value) == said


def test_a_preview_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Sweep().go_on(search_of("tpe"), 3)
    assert list(tmp_path.iterdir()) == []


def test_trials_under_way_and_failed_ones_are_no_results(tmp_path: Path) -> None:
    sweep = Sweep(lambda parameters: {} if parameters["sample.steps"] % 2 else figures_of(parameters))
    search = search_of("tpe", tmp_path)
    sweep.go_on(search, 12)
    sweep.runs[-1] = engine.past_run("11", sweep.past[-1], "running", {}, [])
    parameters = search.suggest(sweep.past, lambda: sweep.runs)
    assert parameters is not None
    import optuna

    study = search._study  # type: ignore[attr-defined]
    states = [trial.state for trial in study.get_trials()]
    expected = [
        optuna.trial.TrialState.FAIL if each["sample.steps"] % 2 else optuna.trial.TrialState.COMPLETE
        for each in sweep.past[:11]
    ]
    assert states == [*expected, optuna.trial.TrialState.RUNNING, optuna.trial.TrialState.RUNNING]


@pytest.mark.parametrize("kept", [False, True], ids=["the same process", "another process"])
def test_a_failed_trial_that_finishes_when_it_is_run_again_is_a_result(kept: bool, tmp_path: Path) -> None:
    import optuna

    sweep = Sweep(lambda parameters: {})
    search = search_of("tpe", tmp_path, quality_from=0.5)
    sweep.go_on(search, 3)
    for _ in range(2):  # The second time, it is known.
        search = search_of("tpe", tmp_path, quality_from=0.5) if kept else search
        search.suggest(sweep.past, lambda: sweep.runs)
        again = figures_of(sweep.past[1])
        sweep.runs[1] = engine.past_run("1", sweep.past[1], "finished", again, [])
        before = len(sweep.past)
        sweep.go_on(search, 1)
        assert len(sweep.past) == before + 1
    done = [trial for trial in search._study.get_trials() if trial.state == optuna.trial.TrialState.COMPLETE]  # type: ignore[attr-defined]
    assert [trial.values for trial in done] == [point_of(again, [QUALITY, COST])]
    assert list(done[0].constraints.values()) == [pytest.approx(0.5 - again["eval/class_agreement"])]


def test_the_goals_of_the_objectives_are_those_of_the_study() -> None:
    """Of the trials so far, Optuna calls the same ones best as we do."""
    sweep, search = Sweep(), search_of("nsga2")
    sweep.go_on(search, 15)
    search.suggest(sweep.past, lambda: sweep.runs)
    best = {trial.number for trial in search._study.best_trials}  # type: ignore[attr-defined]
    assert best == set(front_among(sweep.points(), [QUALITY, COST]).trials)


@pytest.mark.parametrize("method", METHODS)
def test_trials_beyond_a_limit_are_drawn_less_often(method: str) -> None:
    free, limited = Sweep(), Sweep()
    free.go_on(search_of(method), 30)
    limited.go_on(search_of(method, quality_from=0.4), 30)

    def of_no_use(sweep: Sweep) -> int:
        return sum(quality < 0.4 for quality, _ in sweep.points()[10:])

    assert of_no_use(limited) < of_no_use(free)


def test_it_finds_a_larger_front_than_random_search() -> None:
    def volume(method: str) -> float:
        sweep = Sweep()
        if method == "random":
            config = {"method": "random", "parameters": SPACE}
            sweep.go_on(SEARCHES["random"].make(SearchRequest(config)), 40)
        else:
            sweep.go_on(search_of(method), 40)
        limits = [Objective(QUALITY.name, QUALITY.goal, 0.0), Objective(COST.name, COST.goal, 1.0)]
        return front_among(sweep.points(), limits).volume

    assert volume("tpe") > volume("random")


@pytest.mark.parametrize(
    ("spec", "accepts"),
    [
        ({"min": 2, "max": 5}, lambda value: value in range(2, 6) and isinstance(value, int)),
        ({"min": 0.0, "max": 2.0}, lambda value: 0.0 <= value <= 2.0),
        ({"min": 1e-4, "max": 1e-1, "distribution": "log_uniform_values"}, lambda value: 1e-4 <= value <= 1e-1),
        ({"min": 8, "max": 64, "q": 8, "distribution": "q_uniform"}, lambda value: value in range(8, 72, 8)),
        ({"mu": 1.0, "sigma": 0.1, "distribution": "normal"}, lambda value: 0.69 < value < 1.31),
        ({"values": [[1, 2], [1, 2, 2]]}, lambda value: value in ([1, 2], [1, 2, 2])),
        ({"values": [0.1, 0.2, 0.4]}, lambda value: value in (0.1, 0.2, 0.4)),
        ({"values": [True, None, "a"]}, lambda value: value in (True, None, "a")),
        ({"values": [7]}, lambda value: value == 7),
        ({"value": {"nested": 1}}, lambda value: value == {"nested": 1}),
    ],
)
def test_every_form_of_a_parameter_is_searched(spec: dict[str, Any], accepts: Callable[[Any], bool]) -> None:
    sweep = Sweep(lambda parameters: {"eval/class_agreement": 0.5, "sample/macs": float(parameters["seed"])})
    sweep.go_on(search_of("tpe", None, x=spec, seed={"min": 0, "max": 9}), 12)
    values = [parameters["x"] for parameters in sweep.past]
    assert all(map(accepts, values)), values
    different = len({repr(value) for value in values})
    assert different == 1 if "value" in spec or spec.get("values") == [7] else different > 1


def test_half_of_a_logarithmic_range_is_below_its_geometric_mean() -> None:
    spec = {"min": 1e-4, "max": 1e-2, "distribution": "log_uniform_values"}
    assert engine.quantile("x", spec, 0.5) == pytest.approx(1e-3)


def test_without_optuna_it_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else find(name))
    config = {"method": "tpe", "metric": {"name": "val/loss", "goal": "minimize"}}
    assert setting_problems(config) == ["method = 'tpe': needs optuna: pip install \"diffusion-sweeps[optuna]\""]


def test_a_trial_is_stopped_early_only_if_it_is_bad_in_all_that_trials_log() -> None:
    """By hyperband with one band, at three values; of the costs, which come at the end, nothing is known."""
    config = {"parameters": {}, "early_terminate": {"type": "hyperband", "max_iter": 9, "eta": 3, "s": 1}}
    losses = {"good": (0.1, 0.9), "bad": (0.9, 0.1), "one": (0.8, 0.8), "other": (0.2, 0.1)}
    runs = [
        engine.past_run(name, {}, "running", {}, [{"val/loss": a, "eval/class_agreement": b} for _ in range(5)])
        for name, (a, b) in losses.items()
    ]
    loss = Objective("val/loss", "minimize")

    def stopped(*objectives: Objective) -> set[str]:
        return engine.doomed_by_all(config, objectives, runs)

    by_loss, by_quality = stopped(loss), stopped(QUALITY)
    assert by_loss
    assert by_quality
    assert by_loss == engine.doomed({**config, "method": "random", "metric": {"name": "val/loss"}}, runs)
    assert stopped(loss, QUALITY) == by_loss & by_quality
    assert stopped(loss, QUALITY) != by_loss
    assert stopped(loss, COST) == by_loss
    assert stopped(COST) == set()
