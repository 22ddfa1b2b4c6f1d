"""A run that prunes says how alike its images are to the dense network's, also when it was moved or is tuned on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY, digits

from agent.config import TrialConfig, build_config
from agent.lottery import run_chain
from agent.trial import TrialResult, run_trial
from diffusion_core.checkpoint import Checkpoint, read_checkpoint
from diffusion_core.config import flatten
from diffusion_core.evaluation.consistency import consistency_of_images, consistency_of_models
from diffusion_core.model.unet import build_network
from diffusion_core.sampling.generation import Generator
from diffusion_core.tracking import MemoryTracker
from diffusion_core.training.stopping import Stopped, StopRequest
from diffusion_core.training.trainer import TrainState
from pruning.consistency import DENSE_IMAGES, dense_consistency, keep_dense_images
from pruning.pruner import RECORD_KEY

COUNT = 12
SSIM, MSE = f"prune/consistency_ssim_{COUNT}", f"prune/consistency_mse_{COUNT}"
QUIET = {
    "eval.every": 0,
    "eval.classifier": "none",
    "eval.consistency_images": COUNT,
    "sample.every": 0,
    "checkpoint.every": 1,
    "checkpoint.keep": 9,
    "train.lr": 0.02,
}
METHODS = {
    "structured": {"prune.method": "structured", "prune.step": 4, "model.channels": 16},
    "magnitude": {"prune.method": "magnitude", "prune.step": 4},
    "gradual": {"prune.method": "gradual", "prune.step": 4, "prune.until": 7, "prune.interval": 1},
}


def configure(**changes: Any) -> TrialConfig:
    return build_config(TINY, QUIET, {key.replace("__", "."): value for key, value in changes.items()})


def trial(folder: Path, config: TrialConfig, stop: StopRequest | None = None) -> tuple[TrialResult, dict[str, Any]]:
    tracker = MemoryTracker()
    return run_trial(config, tracker, dataset=digits(), folder=folder, run_id="r", stop=stop), tracker.figures


def measured(one: Checkpoint, two: Checkpoint, config: TrialConfig) -> tuple[float, float]:
    """What the figures should be, from two checkpoints."""
    generators = [Generator(checkpoint.network(), config, "fp32") for checkpoint in (one, two)]
    alike = consistency_of_models(generators[0], generators[1], COUNT, config.sample, config.seed)
    return alike.ssim, alike.mse


def test_models_that_draw_by_different_versions_are_not_compared(tmp_path: Path) -> None:
    """Their noise differs, and so would their images."""
    network = build_network(configure(), 10).eval()
    one, two = (Generator(network, configure(draws=draws), "fp32") for draws in (1, 2))
    with pytest.raises(ValueError, match=r"draws = 1, 2: expected the same"):
        consistency_of_models(one, two, COUNT, configure().sample, 0)


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_images_are_compared_with_those_of_a_dense_network_of_any_version(draws: int) -> None:
    """A network that has not changed draws the stored images again, whatever the run draws by."""
    then, now = configure(draws=draws), configure(draws=draws % 3 + 1)
    state = TrainState.start(build_network(then, 10), then.train, then.ema)
    keep_dense_images(state, state.ema.network, then)
    state.extra_metadata[RECORD_KEY] = [{"step": 0}]
    if draws == 1:  # As earlier versions have stored them.
        del state.extra_metadata[DENSE_IMAGES]["draws"]
    figures = dense_consistency(state, now).figures
    assert [value for name, value in figures.items() if "mse" in name] == [0.0]


def test_equal_images_and_inverted_ones() -> None:
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    same, other = consistency_of_images(images, images, 7), consistency_of_images(images, 255 - images, 7)
    assert same.figures("x") == {"x/consistency_ssim_4": pytest.approx(1.0), "x/consistency_mse_4": 0.0}
    assert other.ssim < 0.0 < 1.0 < other.mse
    assert (other.num_images, other.seed) == (4, 7)


@pytest.mark.parametrize("method", METHODS)
def test_the_end_is_compared_with_the_network_before_the_pruning(method: str, tmp_path: Path) -> None:
    config = configure(**METHODS[method])
    result, summary = trial(tmp_path, config)
    dense, last = (read_checkpoint(tmp_path / "checkpoints" / f"step-0000000{step}") for step in (4, 8))
    assert (result.figures[SSIM], result.figures[MSE]) == pytest.approx(measured(dense, last, config))
    assert result.figures[MSE] > 0.0
    assert summary[SSIM] == result.figures[SSIM]
    line = "reference=the dense network, n=12, sampler=ddim, steps=4, spacing=uniform, guidance=1, seed=0"
    assert summary[f"protocol/{SSIM}"] == summary[f"protocol/{MSE}"] == line


class StopAt(StopRequest):
    """Stands for a signal that comes at a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def check(self, state: TrainState, _row: dict[str, Any]) -> None:
        if state.step == self.step:
            raise Stopped(15)


@pytest.mark.parametrize("step", [4, 5])
def test_a_run_that_was_stopped_says_the_same(step: int, tmp_path: Path) -> None:
    """Stopped right before or after the pruning, and gone on with by another sampler, where no dense weights are."""
    config = configure(**METHODS["magnitude"], checkpoint__keep=1)
    whole, _ = trial(tmp_path / "whole", config)
    with pytest.raises(Stopped):
        trial(tmp_path / "broken", config, StopAt(step))
    again, _ = trial(tmp_path / "broken", configure(**METHODS["magnitude"], checkpoint__keep=1, sample__steps=2))
    assert (again.figures[SSIM], again.figures[MSE]) == (whole.figures[SSIM], whole.figures[MSE])


def test_a_parent_is_the_dense_network_and_the_chain_of_runs_goes_on(tmp_path: Path) -> None:
    """Pruned at once from a trained model; then fine-tuned by a third run, which still compares with the first one."""
    trial(tmp_path / "dense", configure())
    dense = read_checkpoint(tmp_path / "dense")
    config = configure(init__checkpoint=str(tmp_path / "dense"), prune__method="magnitude", prune__step=0)
    pruned, _ = trial(tmp_path / "pruned", config)
    assert (pruned.figures[SSIM], pruned.figures[MSE]) == pytest.approx(
        measured(dense, read_checkpoint(tmp_path / "pruned"), config)
    )
    tuned, _ = trial(tmp_path / "tuned", configure(init__checkpoint=str(tmp_path / "pruned")))
    assert (tuned.figures[SSIM], tuned.figures[MSE]) == pytest.approx(
        measured(dense, read_checkpoint(tmp_path / "tuned"), config)
    )
    assert tuned.figures[SSIM] != pruned.figures[SSIM]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prune__method": "magnitude", "prune__step": 0},
        {"prune__method": "synflow"},
        {"prune__method": "magnitude", "prune__step": 4, "eval__consistency_images": 0},
    ],
    ids=["dense", "untrained", "at initialisation", "not wanted"],
)
def test_nothing_is_said_where_there_is_no_dense_network_or_no_wish(changes: dict[str, Any], tmp_path: Path) -> None:
    result, summary = trial(tmp_path, configure(**changes, train__steps=6))
    assert not [name for name in (*result.figures, *summary) if "consistency" in name]
    assert "dense_images" not in read_checkpoint(tmp_path).parts


def test_every_ticket_of_a_chain_is_compared_with_its_dense_network(tmp_path: Path) -> None:
    config = build_config(flatten(configure()), {"prune.method": "lottery", "prune.rounds": 2, "train.steps": 4})
    tracker = MemoryTracker()
    run_chain(config, tracker, dataset=digits(), folder=tmp_path, run_id="c")
    dense, last = (read_checkpoint(tmp_path / "rounds" / name) for name in ("00", "02"))
    assert (tracker.figures[SSIM], tracker.figures[MSE]) == pytest.approx(measured(dense, last, config))
