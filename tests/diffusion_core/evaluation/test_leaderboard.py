"""Rows of the leaderboard from what W&B holds of a run: its summary, and the metadata of its models."""

from __future__ import annotations

from typing import Any

import pytest

from diffusion_core.evaluation.leaderboard import from_models

SLOW, FAST = (f"n=20, sampler=ddim, steps={steps}, seed=0, extractor=c, weights=w" for steps in (50, 2))
SUMMARY: dict[str, Any] = {
    "model/params": 7, "sample/evaluations": 50, "val/loss": 0.1, "eval/fid20": 1.0, "protocol/eval/fid20": SLOW,
}  # fmt: skip
OF_NETWORK, OF_TRAINING = {"parameters": 7}, {"parameters": 7, "evaluations an image": 50}


def model(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "config": {"train.steps": 9}, "figures": {"val/loss": step / 10, "eval/fid20": 2.0}} | more


def rows(*models: dict[str, Any], which: str = "best") -> list[tuple[int | None, dict[str, float], dict[str, float]]]:
    return [(row.step, row.costs, row.figures) for row in from_models("run", SUMMARY, models, which)]


def test_a_row_has_the_figures_of_its_model_not_the_best_of_the_run() -> None:
    assert rows(model(3), model(9)) == [(3, OF_TRAINING, {"val/loss": 0.3, "eval/fid20": 2.0})]


def test_figures_of_another_sampling_have_a_row_and_a_cost_of_their_own() -> None:
    later = {"eval/kid20": FAST, "sample/evaluations": FAST}
    figures = model(9)["figures"] | {"eval/kid20": 0.5, "sample/evaluations": 2}
    assert rows(model(9, figures=figures, protocols=later), model(9)) == [
        (9, OF_TRAINING, {"val/loss": 0.9, "eval/fid20": 2.0}),
        (9, OF_NETWORK | {"evaluations an image": 2}, {"val/loss": 0.9, "eval/kid20": 0.5}),
    ]


def test_an_older_evaluation_in_another_way_has_no_cost_of_the_training() -> None:
    found = model(9, figures={"eval/fid20": 3.0}, protocols={"eval/fid20": FAST})
    assert rows(found, found) == [(9, OF_NETWORK, {"eval/fid20": 3.0})]


@pytest.mark.parametrize("more", [{"pruned": [{"keep": 0.5}]}, {"student": {"steps": 2}}])
def test_costs_of_the_last_network_are_not_those_of_another_one(more: dict[str, Any]) -> None:
    assert rows(model(3), model(9, **more), which="3") == [(3, {}, {"val/loss": 0.3, "eval/fid20": 2.0})]


def test_a_run_without_a_model_has_the_best_values_of_its_summary_and_no_step() -> None:
    assert rows() == [(None, OF_TRAINING, {"val/loss": 0.1, "eval/fid20": 1.0})]
    bare = {"step": 3, "config": {}}
    assert rows(bare, bare) == rows(), "as of a model that another program has logged"
    assert rows(which="3") == []
    assert from_models("run", {"val/loss": 0.1}, [model(3), model(3)], "best") == [], "it made no network"
