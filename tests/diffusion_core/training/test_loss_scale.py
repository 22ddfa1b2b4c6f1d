"""Loss scaling in fp16, on the processor: skipped steps, stops, and what is refused. No GPU takes part."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    NUM_CLASSES,
    assert_same_tensors,
    cpu,
    lively,
    metadata,
    one_line,
    tiny_batches,
    tiny_config,
    tiny_state,
)

from diffusion_core.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from diffusion_core.config import CoreConfig
from diffusion_core.hardware import pick_precision
from diffusion_core.model.unet import build_network
from diffusion_core.training.loss_scale import LossScale
from diffusion_core.training.trainer import TrainingDiverged, TrainState, train

CONFIG = tiny_config(train__precision="fp16", train__batch_size=4, train__steps=10, ema__average_from=0)
SCALE = {"growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 3, "_growth_tracker": 0}


def lively_state(config: CoreConfig, scale: float | None = None) -> TrainState:
    state = TrainState.start(lively(build_network(config, NUM_CLASSES)), config.train, config.ema)
    if scale is not None:
        state.loss_scale = LossScale.restored({"scale": scale, **SCALE})
    return state


def run(state: TrainState, until: int, config: CoreConfig = CONFIG) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    train(state, tiny_batches(config), config, [lambda _, row: rows.append(dict(row))], accelerator=cpu(), until=until)
    return rows


def test_fp16_trains_as_fp32_does() -> None:
    """The same losses, to float16's three digits."""
    full = tiny_config(train__precision="fp32", train__batch_size=4, train__steps=10)
    ours, theirs = run(lively_state(CONFIG, scale=2.0**8), 10), run(lively_state(full), 10, full)
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=0.02)
        assert one["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=0.05)
        assert (one["train/loss_scale"], one["train/skipped_steps"]) == (
            2.0 ** (8 + step // 3),
            0,
        )  # It grows every third step.
        assert "train/loss_scale" not in other


def test_a_step_that_overflows_changes_nothing_but_the_scale() -> None:
    """Neither weights, moments nor averages; the images of the step are used up."""
    state = lively_state(CONFIG, scale=2.0**60)
    before = {part: {name: t.clone() for name, t in tensors.items()} for part, tensors in state.parts().items()}
    (row,) = run(state, 1)
    assert row["train/skipped_steps"] == 1
    assert row["train/loss_scale"] == 2.0**59
    assert math.isfinite(row["train/loss"])
    assert row["train/grad_norm"] == 0.0
    assert (state.step, state.ema.updates) == (1, 0)
    after = state.parts()
    for part in ("model", "ema", "ema-average", "float64-average"):
        assert_same_tensors(after[part], before[part])
    assert all(not float(value.abs().sum()) for value in after["optimizer"].values())
    rows = run(state, 10)
    taken = [row for row in rows if not row["train/skipped_steps"]]
    assert state.ema.updates == len(taken)
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_the_mean_norm_is_that_of_the_steps_that_were_taken() -> None:
    """A row of several steps, of which the first ones are skipped."""
    each = run(lively_state(CONFIG, scale=2.0**17), 10)
    skipped = sum(row["train/skipped_steps"] for row in each)
    assert 0 < skipped < 9
    together = tiny_config(train__precision="fp16", train__batch_size=4, train__steps=10, log__every=10)
    (row,) = [row for row in run(lively_state(together, scale=2.0**17), 10, together) if row]
    norms = [one["train/grad_norm"] for one in each if not one["train/skipped_steps"]]
    assert row["train/skipped_steps"] == skipped
    assert row["train/grad_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-5)
    assert row["train/loss"] == pytest.approx(sum(one["train/loss"] for one in each) / 10, rel=1e-5)


def test_a_stop_changes_nothing(tmp_path: Path) -> None:
    """Between a step that is skipped and one at which the scale grows, within a row."""
    config = tiny_config(train__precision="fp16", train__batch_size=4, train__steps=10, log__every=5)
    straight, halved = (lively_state(config, scale=2.0**17) for _ in range(2))
    rows = run(straight, 10, config)

    def stop(state: TrainState, _row: dict[str, Any]) -> None:
        if state.step == 7:
            raise StopIteration

    with pytest.raises(StopIteration):  # At the end of an ordinary training there would be a row.
        train(halved, tiny_batches(config), config, [stop], accelerator=cpu())
    described = metadata(halved.network, config) | halved.metadata()
    write_checkpoint(tmp_path, halved.step, described, halved.parts())
    resumed = TrainState.restore(read_checkpoint(tmp_path), config.train, config.ema, torch.device("cpu"))
    last = run(resumed, 10, config)[-1]
    assert straight.ema.updates == resumed.ema.updates < 10
    assert straight.loss_scale.stored() == resumed.loss_scale.stored()
    for part, tensors in straight.parts().items():
        assert_same_tensors(tensors, resumed.parts()[part])
    assert {**last, "train/images_per_second": 0} == {**rows[-1], "train/images_per_second": 0}


def test_gradients_that_overflow_at_every_scale_end_the_training() -> None:
    state = lively_state(CONFIG, scale=2.0**-13)
    state.network.conv_out.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingDiverged) as caught:
        run(state, 10)
    assert "gradients are not finite at a loss scale of" in one_line(caught.value)
    assert state.ema.updates == 0


@pytest.mark.parametrize(
    "damaged",
    [7, {}, {"scale": 0.0, **SCALE}, {"scale": "2", **SCALE}, {"scale": 1.0, **SCALE, "growth_interval": None}],
)
def test_a_damaged_scale_is_refused_in_one_line(damaged: Any, tmp_path: Path) -> None:
    state = tiny_state(CONFIG)
    described = metadata(state.network, CONFIG) | state.metadata() | {"loss_scale": damaged}
    checkpoint = write_checkpoint(tmp_path, 0, described, state.parts())
    with pytest.raises(CheckpointError) as caught:
        TrainState.restore(checkpoint, CONFIG.train, CONFIG.ema, torch.device("cpu"))
    assert "loss_scale: no scale of losses; take another checkpoint" in one_line(caught.value)


@pytest.mark.parametrize(
    ("capability", "precision"),
    [((6, 1), "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16")],
)
def test_auto_takes_what_a_gpu_computes_fastest(
    capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert pick_precision(tiny_config(train__precision="auto").train, torch.device("cuda")) == precision
