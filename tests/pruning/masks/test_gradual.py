"""Gradual pruning: the cubic of Zhu & Gupta, exact at every step, and the same after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import assert_same_tensors, cpu, digits, one_line, tiny_config, tiny_network

from agent.config import TrialConfig, build_config
from agent.trial import run_trial
from diffusion_core.checkpoint import list_checkpoints, read_checkpoint
from diffusion_core.config import ConfigError, flatten
from diffusion_core.model.structure import maskable
from diffusion_core.tracking import MemoryTracker
from diffusion_core.training.stopping import Stopped
from diffusion_core.training.trainer import TrainState
from pruning.config import unheard
from pruning.masks.gradual import GradualPruning, Ramp
from pruning.masks.mask import held_masks, sparsity
from pruning.training import train_and_prune


class NoSaver:
    """Stands where checkpoints are not looked at."""

    def forget_best(self) -> None:
        pass


def config(**changes: Any) -> TrialConfig:
    tiny = flatten(tiny_config(train__steps=16, train__weight_decay=0.1, train__lr=3e-3, log__every=100))
    knobs = {"method": "gradual", "keep": 0.2, "step": 2, "until": 12, "interval": 2} | changes
    return build_config(tiny, {f"prune.{key}": value for key, value in knobs.items()})


def test_the_ramp_is_the_cubic_of_the_paper() -> None:
    ramp = Ramp(start=10, end=50, interval=10)
    assert [step for step in range(80) if ramp.is_due(step)] == [20, 30, 40]
    for step in range(10, 51):
        final, initial = 0.9, 0.0  # Zhu & Gupta 2017, eq. 1
        sparse = final + (initial - final) * (1 - (step - 10) / 40) ** 3
        assert final * ramp.progress(step) == pytest.approx(sparse)
    assert (ramp.progress(0), ramp.progress(10), ramp.progress(50), ramp.progress(60)) == (0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_sparsity_rises_as_the_ramp_says_exact_to_one_weight(scope: str) -> None:
    settings = config(scope=scope)
    state = TrainState.start(tiny_network(settings), settings.train, settings.ema)
    total = sum(weight.numel() for weight in maskable(state.network).values())
    seen: dict[int, int] = {}

    def watch(state: TrainState, _row: dict[str, Any]) -> None:
        for network in (state.network, state.ema.network):
            zeros = sum(int((weight == 0).sum()) for weight in maskable(network).values())
            assert seen.setdefault(state.step, zeros) == zeros

    sections = settings.prune, settings.distill, settings.steps
    train_and_prune(state, settings, *sections, digits(), [watch], NoSaver(), cpu())  # type: ignore[arg-type]
    ramp = Ramp(2, 12, 2)
    for step, zeros in seen.items():
        done = 1.0 if step > 12 else ramp.progress(min(10, max(2, step - step % 2)))
        assert zeros == round(0.8 * done * total), step
    (record,) = state.extra_metadata["pruning"]
    assert (record["method"], record["step"], record["knobs"]["keep"]) == ("gradual", 12, 0.2)
    assert sparsity(held_masks(state) or {}) == pytest.approx(0.8, abs=1e-3)


def test_stopped_on_the_way_it_prunes_as_if_it_had_not_been(tmp_path: Path) -> None:
    settings = config().model_copy(update={"eval": config().eval.model_copy(update={"classifier": "none"})})
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"

    def run(folder: Path, stop_at: int | None) -> None:
        def stop(state: TrainState, _row: dict[str, Any]) -> None:
            if state.step == stop_at:
                raise Stopped(15)

        run_trial(settings, MemoryTracker(), dataset=digits(), folder=folder, run_id="r", callbacks=[stop])

    run(unbroken, None)
    for stop_at in (5, 8):  # Between two prunings, and right after one.
        with pytest.raises(Stopped):
            run(broken, stop_at)
    run(broken, None)
    ours, theirs = (read_checkpoint(list_checkpoints(folder / "checkpoints")[-1]) for folder in (broken, unbroken))
    assert ours.step == theirs.step == 16
    for part in theirs.parts:
        assert_same_tensors(ours.tensors(part), theirs.tensors(part))
    assert ours.metadata["extra"] == theirs.metadata["extra"]


def test_the_callback_prunes_at_its_steps_alone() -> None:
    settings = config()
    state = TrainState.start(tiny_network(settings), settings.train, settings.ema, step=5)
    callback = GradualPruning(Ramp(2, 12, 2), settings.seed, settings.prune)
    callback(state, {})
    assert held_masks(state) is None
    state.step = 6
    callback(state, {})
    assert sparsity(held_masks(state) or {}) == pytest.approx(0.8 * (1 - 0.6**3), abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"until": 2}, "prune.until = 2: expected more than prune.step = 2 and less than train.steps = 16"),
        ({"until": 16}, "prune.until = 16: expected more than prune.step = 2 and less than train.steps = 16"),
        ({"interval": 0}, "prune.interval = 0: expected an integer >= 1"),
        ({"keep": 1.0}, "prune.keep = 1.0: expected a number > 0 and < 1"),
        ({"scope": "layer", "profile": "blocks"}, "prune.profile = 'blocks': needs prune.block_keep"),
        ({"method": "lottery", "profile": "blocks", "block_keep": [0.5] * 5}, "'blocks': not for prune.method=lottery"),
    ],
)
def test_wrong_knobs_are_refused_in_one_line(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert expected in one_line(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"profile": "erk"}, ["prune.profile = 'erk': has no effect with prune.scope=auto"]),
        (
            {"scope": "layer", "block_keep": [0.5] * 5},
            ["prune.block_keep = [0.5, 0.5, 0.5, 0.5, 0.5]: has no effect"],
        ),
        ({"rounds": 3}, ["prune.rounds = 3: has no effect with prune.method=gradual; drop it or use lottery"]),
        ({"scope": "layer", "profile": "blocks", "block_keep": [0.5] * 5}, []),
    ],
)
def test_knobs_without_effect_are_named(changes: dict[str, Any], expected: list[str]) -> None:
    problems = list(unheard(config(**changes).prune))
    assert len(problems) == len(expected)
    assert all(problem.startswith(start) for problem, start in zip(problems, expected, strict=True))
