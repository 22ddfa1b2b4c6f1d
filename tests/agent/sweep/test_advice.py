"""What a sweep file may say but hardly means is said before the sweep starts, once, and the sweep runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import TINY

from agent.config import build_config
from agent.sweep import __main__ as sweep_command
from agent.sweep.advice import advice
from agent.sweep.file import check_sweep, load_sweep
from diffusion_core.search import engine
from pruning.estimate import times_logged

FILES = sorted((Path(__file__).parents[3] / "sweeps").glob("*.yaml"))
LOSS = {"name": "val/loss", "goal": "minimize"}


def content(parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
    fixed: dict[str, Any] = {"preset": {"value": "digits"}, "train.steps": {"value": 100}, "eval.every": {"value": 10}}
    fixed["checkpoint.best_metric"] = {"value": "val/loss"}
    command = ["python", "-m", "agent", "${args}"]
    return {"method": "random", "metric": LOSS, "command": command, "parameters": fixed | parameters, **more}


def hyperband(**early: Any) -> dict[str, Any]:
    return {"early_terminate": {"type": "hyperband", **early}}


KEEP_TRAIN = {"checkpoint.best_metric": {"value": "train/loss"}}
RANGE = {"train.lr": {"min": 0.1, "max": 0.5}}
NINE = {"train.lr": {"values": [0.1, 0.2, 0.3]}, "seed": {"min": 0, "max": 2}}
MASKED = {"prune.method": {"value": "magnitude"}}
ADVICE: dict[str, tuple[dict[str, Any], int | None, str | None]] = {
    "nothing": (content(RANGE), 12, None),
    # Numbers
    "a number that YAML takes for text": (
        content({"train.lr": {"values": ["1e-5", 0.1, "1e-3"]}}),
        2,
        "train.lr = {'values': ['1e-5', 0.1, '1e-3']}: numbers without a point, such as 1e-5, are text in YAML",
    ),
    "ends that YAML takes for text": (
        content({"train.lr": {"distribution": "log_uniform_values", "min": "1e-5", "max": "1e-3"}}),
        12,
        "numbers without a point, such as 1e-5, are text in YAML, and here numbers; write 1.0e-5",
    ),
    "an integer that YAML takes for text": (content({"train.batch_size": {"value": "8"}} | RANGE), 12, None),
    "text that is meant as text": (content({"data.path": {"value": None}, "init.artifact": {"value": "1e5"}}), 1, None),
    "whole numbers for a fraction": (
        content({"sample.guidance": {"min": 1, "max": 10}} | RANGE),
        12,
        "sample.guidance = {'min': 1, 'max': 10}: draws only whole numbers; write 1.0 and 10.0, or distribution:",
    ),
    "one whole number": (content({"sample.guidance": {"min": 1, "max": 2.5}}), 12, None),
    "whole numbers as asked": (
        content({"sample.guidance": {"distribution": "int_uniform", "min": 1, "max": 3}} | RANGE),
        12,
        None,
    ),
    "whole numbers for an integer": (content({"train.warmup_steps": {"min": 1, "max": 10}} | RANGE), 12, None),
    "exponents": (
        content({"train.lr": {"distribution": "log_uniform", "min": -9.0, "max": -3.0}}),
        12,
        "exponents of e, so from 0.000123 to 0.0498; log_uniform_values takes the values",
    ),
    # Repetition
    "few combinations": (content(NINE), 12, "method = random: of 12 trials about 7 differ, of 9 combinations; method"),
    "few combinations, bayes": (content(NINE, method="bayes"), 12, "method = bayes: of 12 trials about 7 differ"),
    "few combinations, all of them": (content(NINE, method="grid"), 9, None),
    "many combinations": (content(NINE | {"seed": {"min": 0, "max": 50}}), 12, None),
    "few trials": (content(NINE), 3, None),
    "one combination": (content({}), 3, "of 3 trials about 1 differ, of 1 combinations"),
    "no end": (content(NINE), None, "method = random: trials without end, of 9 combinations"),
    "no end of other values": (content(RANGE), None, None),
    "steps of a range": (
        content({"model.dropout": {"distribution": "q_uniform", "min": 0.0, "max": 0.6, "q": 0.2}}),
        12,
        "of 4 combinations",
    ),
    "steps of a logarithmic range": (
        content({"train.batch_size": {"distribution": "q_log_uniform_values", "min": 8, "max": 32, "q": 8}}),
        12,
        "of 4 combinations",
    ),
    "probabilities": (content({"seed": {"values": [1, 2], "probabilities": [0.5, 0.5]}}), 12, "of 2 combinations"),
    "very many trials": (content(RANGE), 1001, "1,001 trials; --count N or run_cap: N runs fewer"),
    # The checkpoint that is kept as the best
    "another best checkpoint": (
        content(RANGE | KEEP_TRAIN),
        12,
        "checkpoint.best_metric = 'train/loss': trials are ranked by the best val/loss of the whole run, but the "
        "checkpoint that commands and reports take may have another; set it to val/loss",
    ),
    "another best checkpoint in some": (
        content(RANGE | {"checkpoint.best_metric": {"values": ["val/loss", "train/loss"]}}),
        12,
        "checkpoint.best_metric = 'train/loss'",
    ),
    # Hyperband: ten values of val/loss in 100 steps, and five after pruning at step 50
    "a band that is reached": (content(RANGE, **hyperband(min_iter=9)), 12, None),
    "a band beyond the end": (
        content(RANGE, **hyperband(min_iter=10)),
        12,
        "stops no trial: it compares those with more than 10 values of val/loss, and a trial logs at most 10; lower it",
    ),
    "bands from the end": (content(RANGE, **hyperband(max_iter=81, s=2)), 12, None),
    "bands beyond the end": (content(RANGE, **hyperband(max_iter=300, s=2)), 12, "more than 33 values of val/loss"),
    "a band before pruning": (content(RANGE | MASKED, **hyperband(min_iter=4)), 12, None),
    "a band in what is left after pruning": (
        content(RANGE | MASKED, **hyperband(min_iter=5)),
        12,
        "logs at most 5; lower it, or log more often",
    ),
    "some trials that are longer": (
        content(RANGE | {"train.steps": {"values": [100, 120]}}, **hyperband(min_iter=10)),
        12,
        None,
    ),
    "another metric": (
        content(RANGE | KEEP_TRAIN, **hyperband(min_iter=10)) | {"metric": {"name": "train/loss"}},
        12,
        "more than 10 values of train/loss, and a trial logs at most 4",
    ),
    "a lottery": (
        content(RANGE | {"prune.method": {"value": "lottery"}}, **hyperband(min_iter=100)),
        12,
        None,
    ),
    "strictness": (
        content(RANGE, **hyperband(min_iter=3, strict=True)),
        12,
        "early_terminate.strict = True: W&B's server knows it; offline, trials are stopped as without it",
    ),
    "no strictness": (content(RANGE, **hyperband(min_iter=3, strict=False)), 12, None),
}


@pytest.mark.parametrize(("given", "trials", "expected"), ADVICE.values(), ids=ADVICE.keys())
def test_what_is_hardly_meant_is_said(given: dict[str, Any], trials: int | None, expected: str | None) -> None:
    lines = list(advice(check_sweep(given, "x", "x"), trials, offline=True))
    assert len(lines) == (expected is not None), lines
    assert all(str(expected) in line and "\n" not in line for line in lines)


def test_on_a_server_strictness_needs_no_word() -> None:
    assert list(advice(check_sweep(ADVICE["strictness"][0], "x", "x"), 12, offline=False)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_of_the_files_that_come_with_the_project_nothing_is_said(path: Path) -> None:
    loaded = load_sweep(path)
    assert list(advice(loaded, loaded.total, offline=True)) == []


def test_it_is_printed_once_and_the_sweep_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ADVICE["few combinations"][0] | hyperband(min_iter=10)
    Path("x.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    assert sweep_command.main(["x.yaml", "--offline", "--dry-run", "--count=12"]) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: method = random: of 12 trials about 7 differ")
    assert second.startswith("warning: early_terminate = {'type': 'hyperband', 'min_iter': 10}: stops no trial")


def test_about_seven_of_twelve_trials_differ() -> None:
    config = check_sweep(ADVICE["few combinations"][0], "x", "x").engine_config()
    runs: list[Any] = []
    for number in range(240):
        chosen = engine.suggest(config, [None] * number)  # The n-th draw of a random search depends on n alone.
        assert chosen is not None
        runs.append((chosen["train.lr"], chosen["seed"]))
    different = [len(set(runs[start : start + 12])) for start in range(0, 240, 12)]
    assert 6 <= sum(different) / len(different) <= 7.6


@pytest.mark.parametrize("metric", ["val/loss", "train/loss"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"train.steps": 9, "eval.every": 4}, {"eval.every": 0}, {"prune.method": "magnitude", "prune.step": 4},
     {"prune.method": "gradual", "prune.interval": 1, "eval.every": 2, "log.every": 3}],
)  # fmt: skip
def test_a_trial_logs_its_metric_as_often_as_expected(changes: dict[str, Any], metric: str, tmp_path: Path) -> None:
    from agent.trial import run_trial
    from diffusion_core.data.datasets import load_data
    from diffusion_core.distributed import make_accelerator
    from diffusion_core.tracking import MemoryTracker

    config = build_config(TINY | {"eval.every": 2, "log.every": 2, "sample.every": 0} | changes)
    tracker = MemoryTracker()
    run_trial(
        config,
        tracker,
        dataset=load_data(config.data),
        folder=tmp_path,
        run_id="t",
        accelerator=make_accelerator(config.train),
    )
    rows = [row for row in tracker.rows if metric in row]
    assert len(rows) == times_logged(config, config.prune, metric)
