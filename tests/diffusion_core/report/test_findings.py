"""What a study found: fronts by brute force, repeated seeds, winners and their equals, lineages, importances."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from diffusion_core.config import SampleConfig
from diffusion_core.evaluation.protocol import protocol, sampling_protocol
from diffusion_core.report.findings import candidates, equal_to, front_of, stages, trial_interval
from diffusion_core.report.importance import importances
from diffusion_core.report.study import Study, Trial, differing, recipe
from diffusion_core.report.words import headline, notes
from diffusion_core.runs.inputs import PARENT_KEY, inputs_of

METRIC = "eval/class_agreement"


def trial(name: str, value: float, *, seed: int = 0, state: str = "finished", **more: Any) -> Trial:
    settings = {"seed": seed, "train.lr": 0.1, "log.dir": name} | more.pop("settings", {})
    return Trial(name, state, settings, {METRIC: value}, more.pop("protocols", {METRIC: "n=200, x"}), **more)


def study(*trials: Trial, **more: Any) -> Study:
    return Study("t", trials, metric=METRIC, goals={METRIC: "maximize"}, **more)


def test_trials_that_differ_in_seed_and_folder_only_are_joined() -> None:
    one, two = trial("a", 0.90), trial("b", 0.96, seed=1)
    other = trial("c", 0.94, settings={"train.lr": 0.2})
    found = candidates(study(one, two, other))
    assert [[t.name for t in group.trials] for group in found] == [["c"], ["b", "a"]]
    joined = found[1]
    assert joined.value == pytest.approx(0.93)
    assert joined.interval is not None
    low, high = stats.t.interval(0.95, 1, loc=0.93, scale=stats.sem([0.90, 0.96]))
    assert (joined.interval.low, joined.interval.high) == pytest.approx((max(0, low), min(1, high)))
    assert "0.93 (0.9 to 0.96), mean and range of 2 seeds (1, 0), 95% t interval of 2 seeds " in joined.text()
    assert recipe(one) == recipe(two) != recipe(other)
    assert differing([one, two, other]) == ["seed", "train.lr"]


def test_a_seed_counts_once_with_its_last_trial() -> None:
    """A search may draw the same values again: the same training is no independent repetition."""
    again = [trial(name, value) for name, value in (("a", 0.90), ("b", 0.94), ("c", 0.92))]
    (alone,) = candidates(study(*again))
    assert [one.name for one in alone.trials] == ["c"]
    assert alone.interval == trial_interval(again[2], METRIC)
    assert alone.text().endswith(", 2 more of the same seed not counted")
    (joined,) = candidates(study(*again, trial("d", 0.96, seed=1)))
    assert [one.name for one in joined.trials] == ["d", "c"]
    assert joined.value == pytest.approx(0.94)
    assert "mean and range of 2 seeds (1, 0)" in joined.text()


def test_a_trial_that_was_stopped_early_is_no_seed_of_those_that_finished() -> None:
    finished = [trial("a", 0.94), trial("b", 0.96, seed=1)]
    stopped = [trial("c", 0.50, seed=2, state="stopped"), trial("d", 0.97, seed=1, state="stopped")]
    (joined,) = candidates(study(*finished, *stopped))
    assert [one.name for one in joined.trials] == ["b", "a"]
    assert joined.text().endswith(", 2 more stopped early not counted")
    (none_finished,) = candidates(study(*stopped))
    assert [one.name for one in none_finished.trials] == ["d", "c"]
    assert "not counted" not in none_finished.text()


def test_equal_values_of_several_seeds_do_not_tell_how_much_they_vary() -> None:
    losses = losses_of((0.1, 0.1), (0.1001, 0.1002))
    ranked = candidates(losses)
    assert [group.interval is None for group in ranked] == [True, False]
    said = " ".join(notes(losses, ranked[0], ranked))
    assert "Equal values of all its seeds do not tell how much val/loss varies" in said


def test_the_mean_of_a_share_is_at_least_as_uncertain_as_its_images() -> None:
    """Seeds that happen to agree do not make 400 images more than 400 images."""
    equal = [trial("a", 1.0), trial("b", 1.0, seed=1)]
    close = [trial("a", 0.90), trial("b", 0.905, seed=1), trial("c", 0.90, seed=2)]
    for trials, hits, images in ((equal, 400, 400), (close, 541, 600)):
        (found,) = candidates(study(*trials))
        wilson = stats.binomtest(hits, images).proportion_ci(method="wilson")
        assert found.interval is not None
        assert (found.interval.low, found.interval.high) == pytest.approx((wilson.low, wilson.high))
        assert f"95% Wilson interval of {images} images " in found.text()
    (unknown,) = candidates(study(*(replace(one, protocols={}) for one in equal)))
    assert unknown.interval is None


def test_the_winner_has_ended_and_its_equals_are_not_told_apart() -> None:
    best = trial("best", 0.99, settings={"x": 1})
    near = trial("near", 0.985, settings={"x": 2})
    far = trial("far", 0.80, settings={"x": 3})
    running = trial("running", 1.0, state="running", settings={"x": 4})
    failed = trial("failed", 1.0, state="failed", settings={"x": 5})
    ranked = candidates(study(running, far, near, best, failed))
    assert [group.best.name for group in ranked] == ["best", "near", "far"]
    assert [group.best.name for group in equal_to(ranked[0], ranked)] == ["near"]
    text = headline(study(best), ranked[0])
    wilson = stats.binomtest(198, 200).proportion_ci(method="wilson")
    assert text.startswith("best is the best: eval/class_agreement 0.99")
    assert f"Wilson interval of 200 images {wilson.low:.4g} to {wilson.high:.4g} (higher is better)" in text


def test_one_trial_of_a_figure_without_images_tells_nothing_of_its_spread() -> None:
    pair = [Trial(name, "finished", {"x": name}, {"val/loss": value}) for name, value in (("a", 0.1), ("b", 0.1001))]
    losses = Study("t", pair, metric="val/loss", goals={"val/loss": "minimize"})
    ranked = candidates(losses)
    assert ranked[0].best.name == "a"
    assert ranked[0].interval is None
    assert equal_to(ranked[0], ranked) == []
    assert "repeat the best trials with other seeds" in " ".join(notes(losses, ranked[0], ranked))


def losses_of(*values: Sequence[float]) -> Study:
    """One configuration for each sequence, with a trial for each seed."""
    trials = [
        Trial(f"{x}-{seed}", "finished", {"x": x, "seed": seed}, {"val/loss": value})
        for x, seeds in enumerate(values) for seed, value in enumerate(seeds)
    ]  # fmt: skip
    return Study("t", trials, metric="val/loss", goals={"val/loss": "minimize"})


@pytest.mark.parametrize(
    ("values", "said", "equal"),
    [
        ([(10.0, 10.5, 9.8), (10.2,)], "The other one has no interval of val/loss, so nothing could be compared", []),
        ([(10.0, 10.5, 9.8), (10.1,), (10.1,)], "The 2 others have no interval of val/loss, so nothing could be", []),
        (
            [(10.0, 10.5, 9.8), (10.0, 10.6), (30.0, 30.1), (11.0,)],
            "1 of the 2 others that have an interval cannot be told from it: the 95% interval of the difference "
            "contains zero. 1 more has none and could not be compared.",
            ["1-0"],
        ),
        (
            [(10.0, 10.1), (30.0, 30.1), (31.0,), (32.0,)],
            "The other one that has an interval differs from it: the 95% interval of the difference does not contain "
            "zero. 2 more have none and could not be compared.",
            [],
        ),
        ([(10.0, 10.1), (30.0, 30.1), (40.0, 40.1)], "The 2 others differ from it: the 95%", []),
        ([(10.0, 10.1), (10.0, 10.2)], "The other one cannot be told from it: the 95%", ["1-0"]),
        ([(10.0,), (10.0,)], "One trial does not tell how much val/loss varies", []),
    ],
)
def test_only_what_was_compared_is_called_different_or_equal(
    values: list[tuple[float, ...]], said: str, equal: list[str]
) -> None:
    found = losses_of(*values)
    ranked = candidates(found)
    assert notes(found, ranked[0], ranked)[0].startswith(said)
    assert [other.best.name for other in equal_to(ranked[0], ranked)] == equal


@pytest.mark.parametrize("protocol", ["", "n=unknown, x", "images=200"])
def test_without_a_number_of_images_there_is_no_interval(protocol: str) -> None:
    assert trial_interval(trial("a", 0.9, protocols={METRIC: protocol}), METRIC) is None


def test_several_protocols_are_said() -> None:
    trials = [trial("a", 0.9), trial("b", 0.8, protocols={METRIC: "n=100, x"}, settings={"y": 1})]
    ranked = candidates(study(*trials))
    assert "2 protocols" in " ".join(notes(study(*trials), ranked[0], ranked))


def test_the_seed_of_the_images_is_no_other_protocol() -> None:
    ways = [protocol(200, sampling_protocol(SampleConfig(), seed)) for seed in (0, 1)]
    assert len(set(ways)) == 2
    same = study(*(trial(way, 0.9, seed=seed, protocols={METRIC: way}) for seed, way in enumerate(ways)))
    ranked = candidates(same)
    assert "protocols" not in " ".join(notes(same, ranked[0], ranked))
    other = trial("c", 0.8, protocols={METRIC: ways[0].replace("n=200", "n=100")}, settings={"y": 1})
    ranked = candidates(study(*same.trials, other))
    assert "2 protocols" in " ".join(notes(same, ranked[0], ranked))


def test_trials_that_started_from_different_checkpoints_of_one_name_are_told() -> None:
    def of(step: int) -> dict[str, Any]:
        parent = {"step": step, "sha256": str(step)}
        return inputs_of({"config": {"init.checkpoint": "parent"}, "extra": {PARENT_KEY: parent}})

    trials = [trial("a", 0.9, inputs=of(20)), trial("b", 0.8, inputs=of(120), settings={"y": 1})]
    ranked = candidates(study(*trials))
    said = " ".join(notes(study(*trials), ranked[0], ranked))
    assert "Trials of the same init.checkpoint took different ones" in said
    assert "step 20 (sha256 20); step 120 (sha256 120)." in said
    ranked = candidates(study(trials[0], replace(trials[1], inputs=of(20))))
    assert "took different ones" not in " ".join(notes(study(*trials), ranked[0], ranked))


@pytest.mark.parametrize("metric", [None, "eval/other"])
def test_without_a_metric_there_is_no_winner(metric: str | None) -> None:
    nothing = replace(study(trial("a", 0.9)), metric=metric)
    assert candidates(nothing) == []
    assert headline(nothing, None)


def test_a_front_leaves_out_failed_trials_and_values_that_are_not_finite() -> None:
    trials = [trial("a", 0.9), trial("b", float("nan")), trial("c", 1.0, state="failed"), trial("d", 0.8)]
    costly = [replace(t, figures={**t.figures, "seconds": cost}) for t, cost in zip(trials, (5, 1, 1, 6), strict=True)]
    assert front_of(study(*costly), METRIC, "seconds") == [0]


def test_a_pruned_trial_comes_from_a_dense_network_of_known_cost() -> None:
    settings = {"model.channels": 8, "prune.method": "structured"}
    history = [{"step": 10, f"dense/{METRIC}": 0.9}, {"step": 20, METRIC: 0.5}, {"step": 40, METRIC: 0.85}]
    pruned = replace(trial("p", 0.85, settings=settings, history=history, step=40))
    pruned = replace(pruned, figures={METRIC: 0.85, "model/macs": 50.0, "seconds": 3.0})
    dense = replace(trial("d", 0.91, settings={"model.channels": 8, "prune.method": "none"}))
    dense = replace(dense, figures={METRIC: 0.91, "model/macs": 100.0, "seconds": 3.0})
    other = replace(dense, settings={**dense.settings, "model.channels": 16}, name="o")
    found = stages(study(pruned, dense), pruned, METRIC, "model/macs")
    assert [(s.label, s.cost, s.quality) for s in found] == [("dense", 100.0, 0.9), ("pruned", 50.0, 0.5)]
    assert [s.label for s in stages(study(pruned, other), pruned, METRIC, "model/macs")] == ["pruned"]
    assert stages(study(pruned, dense), pruned, METRIC, "seconds") == [], "seconds of another trial are not its own"
    assert stages(study(pruned, dense), dense, METRIC, "model/macs") == []


def test_the_forest_finds_the_setting_that_decides(study_of: Callable[..., Study]) -> None:
    trials = []
    for number, made in enumerate(study_of(120).trials):
        value = 3.0 * made.settings["train.lr"] + 0.01 * (made.settings["diffusion.schedule"] == "cosine")
        trials.append(replace(made, figures={METRIC: value}, settings={**made.settings, "noise": number % 7}))
    found = importances(study(*trials, varied=["noise", "train.lr", "diffusion.schedule", "prune.method"]))
    assert found is not None
    assert found.settings[0].setting == "train.lr"
    assert found.settings[0].share > 0.8
    # Without ties, Spearman's correlation is Pearson's of the ranks.
    rates, values = (
        np.array(column) for column in zip(*((t.settings["train.lr"], t.figures[METRIC]) for t in trials), strict=True)
    )
    expected = np.corrcoef(rates.argsort().argsort().astype(float), values.argsort().argsort().astype(float))[0, 1]
    assert found.settings[0].correlation == pytest.approx(expected)
    assert sum(item.share for item in found.settings) == pytest.approx(1.0)
    assert next(item for item in found.settings if item.setting == "diffusion.schedule").correlation is None
    assert found.explained > 0.9
    assert found.warning == ""
    assert found == importances(study(*trials, varied=["noise", "train.lr", "diffusion.schedule", "prune.method"]))


def test_few_trials_and_noise_are_warned_of(study_of: Callable[..., Study]) -> None:
    made = study_of(120).trials
    noise = [replace(t, figures={METRIC: float(hash((i * 7919) % 101))}) for i, t in enumerate(made)]
    learned_nothing = importances(study(*noise, varied=["train.lr", "prune.method"]))
    assert learned_nothing is not None
    assert "does not predict" in learned_nothing.warning
    few = importances(study(*noise[:8], varied=["train.lr", "prune.method"]))
    assert few is not None
    assert few.warning.startswith("only 8 trials for 2 settings")
    assert importances(study(*noise[:4], varied=["train.lr"])) is None
    assert importances(study(*noise, varied=["train.steps"])) is None, "it never varied"
    same = [replace(t, figures={METRIC: 1.0}) for t in made]
    assert importances(study(*same, varied=["train.lr"])) is None


@pytest.mark.parametrize(("state", "said"), [("running", True), ("finished", False)])
def test_a_winner_that_did_not_finish_is_told(state: str, said: bool) -> None:
    found = study(trial("a", 1.0, state=state))
    ranked = candidates(found)
    words = " ".join(notes(found, ranked[0], ranked))
    assert ("It has not ended" in words) == said
