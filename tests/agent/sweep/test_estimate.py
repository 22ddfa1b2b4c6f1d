"""What a sweep is said to cost, against what trials really write and compute."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY

from agent.config import TrialConfig, build_config
from agent.sweep.estimate import describe_sweep
from agent.sweep.file import check_sweep
from agent.trial import run_trial
from diffusion_core.checkpoint import list_checkpoints, read_checkpoint
from diffusion_core.data.datasets import load_data
from diffusion_core.distributed import make_accelerator
from diffusion_core.machine.jobs import JobSize
from diffusion_core.messages import size_in_words
from diffusion_core.model.unet import UNet, build_network
from diffusion_core.run_folder import CLASSIFIER_FILE
from diffusion_core.tracking import MemoryTracker
from diffusion_core.training.trainer import is_due
from pruning import estimate
from pruning.config import PruneConfig
from pruning.estimate import (
    BACKWARD_COST,
    STARTUP_SECONDS,
    Estimator,
    Speed,
    checkpoint_bytes,
    checkpoints_saved,
    count_params,
    forward_passes,
)


def config_of(**changes: Any) -> TrialConfig:
    return build_config(TINY, {key.replace("__", "."): value for key, value in changes.items()})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data__name": "cifar100", "data__image_size": 8, "model__class_conditional": False},
        {"model__self_conditioning": True, "model__conditioning": "scale_shift"},
        {"model__learned_variance": True, "data__name": "mnist", "data__image_size": 8},
    ],
)
def test_parameters_are_those_of_the_network(changes: dict[str, Any]) -> None:
    config = config_of(**changes)
    classes = {"digits": 10, "cifar100": 100, "mnist": 10}[config.data.name]
    network = build_network(config, classes)
    assert count_params(config) == sum(parameter.numel() for parameter in network.parameters())


def test_the_published_network_and_its_checkpoint() -> None:
    config = build_config({"preset": "cifar10", "model.class_conditional": False})
    assert count_params(config) == 35_746_307
    assert (
        checkpoint_bytes(config, config.prune, 35_746_307) == 16 * 35_746_307
    )  # Weights, average, two moments, as floats.


def trained(config: TrialConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[MemoryTracker, int, int]:
    """A trial that was really run: its tracker, and images that passed through the network with and without grad."""
    passed = {True: 0, False: 0}
    forward = UNet.forward

    def count(self: UNet, x_BCHW: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        if x_BCHW.any():  # All zero are the images whose latency is measured, for as long as there is time.
            passed[torch.is_grad_enabled()] += len(x_BCHW)
        return forward(self, x_BCHW, *arguments, **named)

    monkeypatch.setattr(UNet, "forward", count)
    tracker = MemoryTracker()
    dataset = load_data(config.data)
    run_trial(config, tracker, dataset=dataset, folder=folder, run_id="t", accelerator=make_accelerator(config.train))
    return tracker, passed[True], passed[False]


def test_a_trial_writes_and_computes_what_was_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(
        ema__power_widths=[0.1], checkpoint__every=3, checkpoint__keep=1, checkpoint__best_metric="val/loss",
        prune__method="magnitude", eval__every=4, eval__num_images=20, sample__guidance=2.0, sample__every=0,
    )  # fmt: skip
    tracker, with_gradient, without = trained(config, tmp_path, monkeypatch)
    size = checkpoint_bytes(config, config.prune, count_params(config))
    uploads = [artifact for artifact in tracker.artifacts if artifact["type"] == "model"]
    assert checkpoints_saved(config) == len(uploads)
    kept = list_checkpoints(tmp_path / "checkpoints")
    for path in kept:
        checkpoint = read_checkpoint(path)
        tensors = [tensor for part in checkpoint.parts for tensor in checkpoint.tensors(part).values()]
        # Of the network, a few parameters have no mask.
        assert sum(tensor.nbytes for tensor in tensors) == pytest.approx(size, rel=0.01)
    files = [(name, count) for artifact in tracker.artifacts for name, count in artifact["files"].items()]
    sent = sum(count for name, count in files if name != CLASSIFIER_FILE)  # W&B has equal files once.
    written = sum(file.stat().st_size for file in kept[-1].iterdir())  # With names and shapes, many in a tiny network.
    online, offline = (Estimator(offline=offline).trial(config, config.prune) for offline in (False, True))
    assert len(kept) * size <= online.disk_bytes <= (config.checkpoint.keep + 1) * size
    assert sent == pytest.approx(written * online.upload_bytes / size, rel=0.05)
    assert online.upload_bytes == len(uploads) * size
    assert (offline.upload_bytes, offline.disk_bytes) == (0, online.disk_bytes)
    not_uploaded = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"upload": False})})
    assert Estimator(offline=False).trial(not_uploaded, config.prune).upload_bytes == 0
    assert with_gradient == config.train.steps * config.train.batch_size
    passes = forward_passes(config, config.prune) - with_gradient * (1 + BACKWARD_COST)
    assert passes == pytest.approx(without, rel=0.05)


@pytest.mark.parametrize(("steps", "every"), [(10, 3), (9, 3), (10, 0), (5, 10), (1, 1)])
def test_checkpoints_are_counted_as_they_fall_due(steps: int, every: int) -> None:
    config = config_of(train__steps=steps, checkpoint__every=every)
    assert checkpoints_saved(config) == sum(is_due(step, every, steps) for step in range(1, steps + 1))


SWEEP = {
    "method": "random",
    "command": ["${args}"],
    "parameters": {key: {"value": value} for key, value in TINY.items()} | {"seed": {"min": 0, "max": 9}},
}


def described(content: dict[str, Any], trials: int | None, **more: Any) -> str:
    estimator = Estimator(offline=True, past_seconds=[40.0, 20.0])
    return describe_sweep(check_sweep(content, "x", "x"), estimator, trials=trials, **({"jobs": 1} | more))


def test_the_whole_is_the_sum_of_its_trials(tmp_path: Path) -> None:
    size = checkpoint_bytes(config_of(), PruneConfig(), count_params(config_of()))
    shown = size_in_words
    assert described(SWEEP, 8) == (
        f"estimate: 8 trials, 1 at a time; {shown(size)} of checkpoints a trial, {shown(8 * size)} in all; "
        "30 s a trial, 4 min in all"
    )
    endless = described(SWEEP, None)
    assert "trials without end (no run_cap, no --count)" in endless
    assert "in all" not in endless
    metric = {"name": "val/loss", "goal": "minimize"}
    stopped = SWEEP | {"metric": metric, "early_terminate": {"type": "hyperband", "min_iter": 3}}
    at_most = described(stopped, 8, jobs=3)
    assert at_most.startswith("estimate at most: 8 trials, 3 at a time; ")
    assert at_most.endswith("30 s a trial, 90 s in all")
    assert (
        described(SWEEP, 10**9, folder=tmp_path / "not" / "there").splitlines()[1].startswith("warning: that is more")
    )
    assert len(described(SWEEP, 8, folder=tmp_path / "not" / "there").splitlines()) == 1
    assert described(SWEEP, 480, jobs=16, size=JobSize(2, "GPU")).endswith(
        "30 s a trial, 15 min in all; about 8 GPU hours in all"
    )
    assert described(SWEEP, None, size=JobSize(6, "core")).endswith("30 s a trial; about 0.05 core hours a trial")


def test_time_is_unknown_where_it_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(config: TrialConfig, *past: float) -> float | None:
        return Estimator(offline=True, past_seconds=past).trial(config, config.prune).seconds

    monkeypatch.setattr(estimate, "MAX_TRIED_PARAMS", 100)
    assert seconds(config_of(train__device="cpu")) is None, "too large to try"
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert seconds(config_of(train__device="auto")) is None, "trials run on the GPU"
    assert seconds(config_of(train__device="auto"), 5.0) == 5.0
    measured = seconds(config_of(train__device="cpu"))
    assert measured is not None
    assert measured > STARTUP_SECONDS


def test_a_training_step_is_timed_where_forward_passes_would_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that the network moves: a quarter of a second an image forward, and twice that backward."""
    now, shown = 0.0, 0
    forward = UNet.forward

    def pass_on(self: UNet, x_BCHW: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        nonlocal now, shown
        now += 0.25 * len(x_BCHW) * (3 if torch.is_grad_enabled() else 1)
        shown += len(x_BCHW)
        return forward(self, x_BCHW, *arguments, **named)

    monkeypatch.setattr(UNet, "forward", pass_on)
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: now)
    config = config_of()
    small = estimate.measure_speed(config, 1, 1000)
    assert small == Speed(0.25, "forward passes of 16 images on the processor", "cpu")
    shown = 0
    large = estimate.measure_speed(config, 1, estimate.SMALL_PARAMS + 1)
    # Of 3 seconds, an image takes 0.75.
    assert large == Speed(0.25, "a training step of 4 images on the processor, scaled to 8", "cpu")
    assert shown == 5, "one image, then as many as there is time for"
    monkeypatch.setattr(estimate, "MEASURE_S", 0.5)
    slow = estimate.measure_speed(config, 1, estimate.SMALL_PARAMS + 1)
    assert slow == Speed(0.25, "a training step of 1 image on the processor, scaled to 8", "cpu")


def test_a_sweep_says_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "SMALL_PARAMS", 0)
    sweep = check_sweep(SWEEP, "x", "x")
    told = describe_sweep(sweep, Estimator(offline=True), jobs=1, trials=2)
    assert re.search(r" a trial, .* in all \(measured: a training step of 8 images on the processor\)$", told)
    monkeypatch.setattr(estimate, "MEASURE_IN_ALL_S", -1.0)
    assert "time unknown" in describe_sweep(sweep, Estimator(offline=True), jobs=1, trials=2)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "0 kB"),
        (999, "0.999 kB"),
        (4_340_000, "4.34 MB"),
        (571_940_912, "572 MB"),
        (5.1e10, "51 GB"),
        (2e15, "2e+03 TB"),
    ],
)
def test_sizes_in_words(number: float, words: str) -> None:
    assert size_in_words(number) == words
