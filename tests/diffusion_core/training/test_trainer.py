"""The training loop: what a step does, what it reports, and what it refuses to go on with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import NUM_CLASSES, assert_same_tensors, cpu, digits, lively, one_line, tiny_batches, tiny_config, tiny_state
from torch import Tensor, nn

from diffusion_core.checkpoint import CheckpointError, newest_checkpoint, write_checkpoint
from diffusion_core.config import CoreConfig, TrainConfig, flatten
from diffusion_core.model.unet import NO_LABEL, build_network
from diffusion_core.terminal import progress
from diffusion_core.training.trainer import (
    Callback,
    TrainingDiverged,
    TrainState,
    build_optimizer,
    is_due,
    learning_rate,
    train,
)


def run(config: CoreConfig, *callbacks: Callback, until: int | None = None, state: TrainState | None = None) -> Any:
    state = state or tiny_state(config)
    return train(state, tiny_batches(config), config, callbacks, accelerator=cpu(), until=until)


def rows_of(config: CoreConfig) -> list[tuple[int, dict[str, Any]]]:
    rows: list[tuple[int, dict[str, Any]]] = []
    run(config, lambda state, row: rows.append((state.step, dict(row))))
    return rows


def flat(network: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def lively_state(config: CoreConfig) -> TrainState:
    return TrainState.start(lively(build_network(config, NUM_CLASSES)), config.train, config.ema)


# What a step does.


@pytest.mark.parametrize("parts", [2, 8])
def test_gradient_accumulation_equals_the_whole_batch(parts: int) -> None:
    """AdamW divides by the gradient's size, so plain gradients are compared: their norms, and the weights after."""

    def trained(accumulation: int) -> tuple[Tensor, list[float]]:
        config = tiny_config(train__accumulation=accumulation, train__steps=4, train__grad_clip=None)
        state, rows = lively_state(config), []
        run(config, lambda _, row: rows.append(dict(row)), state=state)
        return flat(state.network), [row[key] for row in rows for key in ("train/loss", "train/grad_norm")]

    whole, parted = trained(1), trained(parts)
    assert parted[1] == pytest.approx(whole[1], rel=1e-4)
    # A step moves a weight by at most about the learning rate, whatever rounding does to a tiny gradient.
    difference = (whole[0] - parted[0]).abs()
    assert difference.max() < 4 * 1e-3
    assert difference.mean() < 1e-5


def one_step_by_hand(config: CoreConfig, clip: float | None) -> tuple[nn.Module, float, float]:
    """Step 0 with plain torch: what the trainer draws is read off a network that records it."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    noises: list[Tensor] = []
    state = lively_state(config)
    state.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))

    def record(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: noises.append(output.detach() - gradient * output.numel() / 2))

    state.network.register_forward_hook(record)
    run(config, until=1, state=state)
    # The gradient of the mean squared error is 2 (prediction - noise) / size, which gives the noise away.
    ((x, t, labels),), (noise,) = seen, noises
    network = lively(build_network(config, NUM_CLASSES))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, config.train.beta2), weight_decay=0.25)
    loss = (network(x, t, labels) - noise).square().mean()
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in network.parameters()))
    if clip is not None:
        for parameter in network.parameters():
            parameter.grad *= min(1.0, clip / norm)
    optimizer.step()
    return network, loss.item(), norm


@pytest.mark.parametrize("clip", [None, 0.05, 1e9])
def test_a_step_is_adamw_on_the_clipped_gradient_of_the_loss(clip: float | None) -> None:
    config = tiny_config(train__grad_clip=clip, train__weight_decay=0.25, train__beta2=0.99)
    expected, loss, norm = one_step_by_hand(config, clip)
    rows: list[dict[str, Any]] = []
    state = run(config, lambda _, row: rows.append(row), until=1, state=lively_state(config))
    assert rows[0]["train/loss"] == pytest.approx(loss, rel=1e-5)
    assert rows[0]["train/grad_norm"] == pytest.approx(norm, rel=1e-4)  # Before clipping.
    moments = torch.cat([state.optimizer.state[p]["exp_avg"].flatten() for p in state.network.parameters()])
    clipped_norm = norm if clip is None else min(norm, clip)
    assert moments.norm().item() == pytest.approx(0.1 * clipped_norm, rel=1e-3)
    assert (flat(state.network) - flat(expected)).abs().max() < 1e-4
    assert (flat(state.network) - flat(expected)).abs().mean() < 1e-6


def test_the_average_follows_every_step() -> None:
    config = tiny_config(train__steps=5, ema__decay=0.9, ema__warmup=False)
    state = lively_state(config)
    expected = flat(state.network)

    def follow(state: TrainState, _row: dict[str, Any]) -> None:
        expected.mul_(0.9).add_(0.1 * flat(state.network))

    run(config, follow, state=state)
    assert (flat(state.ema.network) - expected).abs().max() < 1e-6
    assert state.ema.updates == 5


def test_labels_are_dropped_as_often_as_asked() -> None:
    config = tiny_config(train__label_dropout=0.3, train__steps=40, train__batch_size=64)
    seen: list[Tensor] = []
    state = tiny_state(config)
    state.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    run(config, state=state)
    labels = torch.cat(seen)
    share = (labels == NO_LABEL).float().mean().item()
    assert share == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / len(labels)))
    batches = tiny_batches(config)
    true = torch.cat([batches.at(step)[1] for step in range(40)])
    assert torch.equal(labels[labels != NO_LABEL], true[labels != NO_LABEL])  # The others are left alone.


def test_no_label_is_dropped_where_none_should_be() -> None:
    config = tiny_config(train__label_dropout=0.0, train__steps=5)
    seen: list[Tensor] = []
    state = tiny_state(config)
    state.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    run(config, state=state)
    assert (torch.cat(seen) != NO_LABEL).all()


def test_timesteps_and_noise_are_drawn_anew_over_their_whole_range() -> None:
    config = tiny_config(train__steps=40, train__batch_size=64)
    images: list[Tensor] = []
    times: list[Tensor] = []
    state = tiny_state(config)

    def record(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        images.append(inputs[0])
        times.append(inputs[1])

    state.network.register_forward_pre_hook(record)
    run(config, state=state)
    counts = torch.cat(times).bincount(minlength=50).double()
    assert len(counts) == 50
    expected = counts.sum() / 50
    assert ((counts - expected).square() / expected).sum() < 49 + 5 * math.sqrt(2 * 49)  # Chi-squared, 5 deviations.
    noisy = torch.cat(images)[torch.cat(times) == 49]  # Pure noise but for 1e-3 of the image.
    assert noisy.mean().abs() < 5 / math.sqrt(noisy.numel())
    assert noisy.std() == pytest.approx(1.0, abs=0.05)
    assert not torch.allclose(noisy[0], noisy[1], atol=0.1)


def test_dropout_acts_while_training_and_follows_the_seed() -> None:
    def trained(**changes: Any) -> Tensor:
        config = tiny_config(train__steps=3, **changes)
        return flat(run(config, state=lively_state(config)).network)

    torch.manual_seed(1)
    first = trained(model__dropout=0.5)
    torch.manual_seed(2)
    assert torch.equal(first, trained(model__dropout=0.5))
    assert not torch.equal(first, trained(model__dropout=0.0))


def test_bf16_keeps_weights_in_fp32() -> None:
    config = tiny_config(train__precision="bf16", train__steps=3)
    seen: list[torch.dtype] = []
    state = lively_state(config)
    state.network.conv_in.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    run(config, state=state)
    assert set(seen) == {torch.bfloat16}
    for tensors in state.parts().values():
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_training_twice_is_the_same_to_the_bit_and_in_one_go_or_two() -> None:
    config = tiny_config(train__steps=8, model__dropout=0.3)
    straight, halved = run(config), run(config, until=3)
    assert halved.step == 3
    run(config, state=halved)
    assert (straight.step, halved.step) == (8, 8)
    for part, tensors in straight.parts().items():
        assert_same_tensors(tensors, halved.parts()[part])
    assert not torch.equal(flat(run(tiny_config(train__steps=8, seed=1)).network), flat(straight.network))


# The learning rate.


def test_learning_rate_warms_up_linearly_and_stays() -> None:
    config = TrainConfig(lr=0.01, warmup_steps=4, steps=100)
    assert [learning_rate(step, config) for step in range(6)] == pytest.approx(
        [0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01]
    )
    assert learning_rate(99, config) == pytest.approx(0.01)
    assert learning_rate(0, TrainConfig(lr=0.01, warmup_steps=0)) == pytest.approx(0.01)


def test_learning_rate_falls_along_half_a_cosine() -> None:
    config = TrainConfig(lr=0.01, warmup_steps=20, steps=120, lr_schedule="cosine")
    assert learning_rate(9, config) == pytest.approx(0.005)
    assert learning_rate(20, config) == pytest.approx(0.01)
    assert learning_rate(45, config) == pytest.approx(0.01 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(70, config) == pytest.approx(0.005)
    assert 0 < learning_rate(119, config) < 1e-5
    assert learning_rate(120, config) == pytest.approx(0.0, abs=1e-12)
    never_warm = TrainConfig(lr=0.01, warmup_steps=50, steps=10, lr_schedule="cosine")
    assert learning_rate(9, never_warm) == pytest.approx(0.002)


def test_the_learning_rate_is_the_one_that_is_used() -> None:
    config = tiny_config(train__lr=0.004, train__warmup_steps=4, train__steps=6)
    used: list[float] = []
    state = tiny_state(config)
    state.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    rows: list[dict[str, Any]] = []
    run(config, lambda _, row: rows.append(row), state=state)
    assert used == pytest.approx([0.001, 0.002, 0.003, 0.004, 0.004, 0.004])
    assert [row["train/lr"] for row in rows] == used


def test_the_optimizer_holds_all_weights() -> None:
    network = build_network(tiny_config(), NUM_CLASSES)
    optimizer = build_optimizer(network, TrainConfig(beta2=0.95, weight_decay=0.1))
    (group,) = optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in network.parameters()}
    assert group["betas"] == (0.9, 0.95)
    assert group["weight_decay"] == 0.1


# What is reported.


def test_rows_hold_what_is_documented_when_it_is_due() -> None:
    config = tiny_config(train__steps=8, log__every=3, train__batch_size=16)
    rows = rows_of(config)
    assert [step for step, _ in rows] == list(range(1, 9))
    assert [step for step, row in rows if row] == [3, 6, 8]
    every = dict(rows_of(tiny_config(train__steps=8, log__every=1, train__batch_size=16)))
    for step, row in rows:
        if row:
            assert set(row) == {
                "train/loss",
                "train/lr",
                "train/grad_norm",
                "train/images_per_second",
                "train/epoch",
            }
            assert all(type(value) is float and math.isfinite(value) for value in row.values())
            assert row["train/epoch"] == pytest.approx(step * 16 / len(digits().train))
            assert row["train/images_per_second"] > 0
    # Means over the steps since the last row.
    for last, steps in ((3, (1, 2, 3)), (6, (4, 5, 6)), (8, (7, 8))):
        for key in ("train/loss", "train/grad_norm"):
            mean = sum(every[step][key] for step in steps) / len(steps)
            assert dict(rows)[last][key] == pytest.approx(mean, rel=1e-5)


def test_callbacks_see_every_step_in_order_and_share_a_row() -> None:
    calls: list[tuple[str, int, Any]] = []

    def first(state: TrainState, row: dict[str, Any]) -> None:
        row["added"] = state.step
        calls.append(("first", state.step, None))

    def second(state: TrainState, row: dict[str, Any]) -> None:
        calls.append(("second", state.step, row["added"]))

    run(tiny_config(train__steps=3, log__every=2), first, second)
    assert calls == [call for step in (1, 2, 3) for call in (("first", step, None), ("second", step, step))]


def test_is_due() -> None:
    assert [step for step in range(1, 11) if is_due(step, 4, 10)] == [4, 8, 10]
    assert [step for step in range(1, 11) if is_due(step, 0, 10)] == [10]


def test_the_loss_falls_on_real_digits() -> None:
    config = tiny_config(
        train__steps=80, train__batch_size=16, train__lr=1e-2, train__warmup_steps=10, train__lr_schedule="cosine"
    )
    losses = [row["train/loss"] for _, row in rows_of(config)]
    assert losses[0] == pytest.approx(1.0, abs=0.2)  # The untrained network says zero.
    assert sum(losses[-20:]) / 20 < 0.55


# Divergence.


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_training_and_the_earlier_checkpoint_stays(tmp_path: Path, value: float) -> None:
    config = tiny_config(train__steps=10, log__every=2)

    def metadata(state: TrainState) -> dict[str, Any]:
        return {
            "config": flatten(config),
            "image_shape": [1, 8, 8],
            "num_classes": NUM_CLASSES,
            "class_names": list("0123456789"),
            "structure": {},
            "figures": {},
            **state.metadata(),
        }

    def checkpoints(state: TrainState, _row: dict[str, Any]) -> None:
        if state.step == 2:
            write_checkpoint(tmp_path, state.step, metadata(state), state.parts())
        if state.step == 4:
            assert state.network.conv_out.bias is not None
            with torch.no_grad():
                state.network.conv_out.bias.fill_(value)

    with pytest.raises(TrainingDiverged) as caught:
        run(config, checkpoints)
    message = one_line(caught.value)
    assert "step 6" in message
    assert "train.lr" in message
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 2
    TrainState.restore(newest, config.train, config.ema, torch.device("cpu"))


def test_diverged_weights_are_not_saved_even_before_the_loss_is_looked_at(tmp_path: Path) -> None:
    config = tiny_config(train__steps=4, log__every=4)
    state = run(config, until=2)
    with torch.no_grad():
        state.network.conv_in.weight[0] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        write_checkpoint(tmp_path, state.step, {}, state.parts())


# Output.


def test_progress_shows_loss_and_speed_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    run(tiny_config(train__steps=3))
    assert capsys.readouterr() == ("", "")
    run(tiny_config(train__steps=3, log__progress=True))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "training: 3 of 3 steps" in shown.err
    assert ", loss " in shown.err
