"""Depth pruning: what a removed block leaves, which blocks go, and that the rest works like any other network."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same_tensors, cpu, digits, metadata, one_line, tiny_batches, tiny_config, tiny_network
from torch import Tensor

from agent.config import build_config
from diffusion_core.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from diffusion_core.config import ConfigError, CoreConfig
from diffusion_core.model import compilation
from diffusion_core.model.cost import LATENCY_BATCH, count_cost
from diffusion_core.model.depth import removable_blocks, remove_blocks, removed_blocks, residual_blocks, without_block
from diffusion_core.model.structure import structure
from diffusion_core.model.unet import ResidualBlock, UNet
from diffusion_core.training.distillation import Distillation
from diffusion_core.training.trainer import TrainState, train
from pruning.calibration import Calibration
from pruning.channels import removal as channels_removal
from pruning.channels.reach import check_reach, least_share
from pruning.channels.removal import Removal, prune_channels, remove
from pruning.config import PruneConfig, unheard
from pruning.depth import removal as depth_removal
from pruning.depth.choice import cheapest
from pruning.depth.effect import output_losses
from pruning.depth.removal import prune_network
from pruning.masks.mask import held_masks
from pruning.pruner import prune_state, records, resume_pruning

BLOCKS = [
    *("down.0.blocks.0", "down.0.blocks.1", "down.1.blocks.0", "down.1.blocks.1"),
    *("down.1.attentions.0", "down.1.attentions.1", "middle.0", "middle.1", "middle.2"),
    *("up.0.blocks.0", "up.0.blocks.1", "up.0.blocks.2"),
    *("up.0.attentions.0", "up.0.attentions.1", "up.0.attentions.2"),
    *("up.1.blocks.0", "up.1.blocks.1", "up.1.blocks.2"),
]
RESIDUAL = [name for name in BLOCKS if "attention" not in name and name != "middle.1"]


def settings(**changes: Any) -> CoreConfig:
    return tiny_config(**({"model__channels": 16, "model__num_res_blocks": 2, "train__steps": 12} | changes))


def knobs(keep: float = 0.5, **changes: Any) -> PruneConfig:
    return PruneConfig(method="structured", **({"keep": keep, "calibration_batches": 2, "depth": 1.0} | changes))


def calibration(config: CoreConfig) -> Calibration:
    return Calibration.of(digits().train, config, torch.device("cpu"))


def inputs(network: UNet) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    images = torch.randn(3, 1, network.image_size, network.image_size, generator=source)
    return images, torch.tensor([0, 20, 49]), torch.tensor([1, 5, -1])


@torch.no_grad()
def silenced(network: UNet, *names: str) -> UNet:
    """A copy in which the last layers of some blocks are zero, so that only their shortcuts are left."""
    copied = copy.deepcopy(network)
    for name in names:
        block: Any = copied.get_submodule(name)
        last: Any = block.conv2 if isinstance(block, ResidualBlock) else block.out
        last.weight.zero_()
        last.bias.zero_()
    return copied


# What a removed block leaves.


@pytest.mark.parametrize("conditioning", ["bias", "scale_shift"])
def test_a_removed_block_leaves_its_shortcut(conditioning: str) -> None:
    network = tiny_network(settings(model__conditioning=conditioning))
    given = inputs(network)
    assert removable_blocks(network) == BLOCKS
    assert residual_blocks(network) == RESIDUAL
    with torch.no_grad():
        for name in BLOCKS:
            with without_block(network, name):
                torch.testing.assert_close(network(*given), silenced_answer := silenced_of(conditioning, name)(*given))
                assert removed_blocks(network) == [name]
            assert not torch.equal(network(*given), silenced_answer)
            assert not removed_blocks(network)
        gone = [name for name in BLOCKS if name != "up.0.blocks.1"]
        wanted = silenced_of(conditioning, *gone)(*given)
        remove_blocks(network, gone)
        torch.testing.assert_close(network(*given), wanted)
        assert not torch.equal(network(given[0], given[1].roll(1), given[2]), wanted)  # Time still enters.


def silenced_of(conditioning: str, *names: str) -> UNet:
    return silenced(tiny_network(settings(model__conditioning=conditioning)), *names)


def test_a_checkpoint_says_which_blocks_are_gone(tmp_path: Path) -> None:
    config = settings()
    network = tiny_network(config)
    gone = ["down.0.blocks.0", "down.1.blocks.0", "middle.1", "middle.2", "up.0.blocks.1", "up.0.attentions.2"]
    remove_blocks(network, gone)
    assert structure(network, config.model) == {name: {"removed": 1} for name in gone}
    smaller, _ = prune_channels(network, knobs(depth=0.0))
    for name, one in (("shallow", network), ("narrow", smaller)):
        written = write_checkpoint(tmp_path / name, 1, metadata(one, config), {"ema": one.state_dict()})
        read = read_checkpoint(written.path).network()
        assert_same_tensors(dict(read.state_dict()), dict(one.state_dict()))
        with torch.no_grad():
            assert torch.equal(read(*inputs(read)), one(*inputs(one)))
        assert count_cost(read) == count_cost(one)


@pytest.mark.parametrize(
    "damage",
    [
        {"down.7.blocks.0": {"removed": 1}},
        {"conv_in": {"removed": 1}},
        {"middle.0": {"removed": 2}},
        {"middle.0": {"removed": 1}, "middle.0.conv1": {"in_channels": 4, "out_channels": 4}},
        {name: {"removed": 1} for name in RESIDUAL},
        {"": {"removed": 1}},
    ],
    ids=str,
)
def test_damaged_records_are_refused(damage: dict[str, Any], tmp_path: Path) -> None:
    config = settings()
    network = tiny_network(config)
    described = metadata(network, config) | {"structure": damage}
    written = write_checkpoint(tmp_path, 1, described, {"ema": network.state_dict()})
    with pytest.raises(CheckpointError, match="do not fit its network") as refusal:
        read_checkpoint(written.path).network()
    one_line(refusal.value)


def test_costs_of_removed_blocks_add_up() -> None:
    network = tiny_network(settings())
    names = ["down.0.blocks.1", "middle.1", "up.1.blocks.0"]
    whole = count_cost(network)
    saved = dict.fromkeys(("macs", "params", "channels", "macs_with_attention"), 0)
    for name in names:
        with without_block(network, name):
            less = count_cost(network)
        for figure in saved:
            saved[figure] += getattr(whole, figure) - getattr(less, figure)
    remove_blocks(network, names)
    for figure, less_by in saved.items():
        assert less_by > 0
        assert getattr(count_cost(network), figure) == getattr(whole, figure) - less_by
    assert count_cost(network).params == sum(parameter.numel() for parameter in network.parameters())


# Which blocks go.


def test_output_losses_are_those_of_the_definition() -> None:
    """``E |f - f_without|^2``, with the images, noise and timesteps of training, written out."""
    config = settings(train__batch_size=5)
    network, images = tiny_network(config), calibration(config)
    losses = output_losses(network, images, 3, BLOCKS)
    schedule = images._denoiser(network).schedule
    for name in ("down.0.blocks.1", "middle.1", "up.0.blocks.2"):
        changes = []
        for index in range(3):
            drawn = images.draws(index, network)
            alpha, sigma = schedule.at(drawn.t_B, drawn.x0_BCHW)
            noisy = alpha * drawn.x0_BCHW + sigma * drawn.noise_BCHW
            labels = drawn.labels_B
            with torch.no_grad():
                answers = [one(noisy, drawn.t_B, labels) for one in (network, silenced(network, name))]
            changes.append((answers[0] - answers[1]).square().mean())
        assert losses[name] == pytest.approx(float(torch.stack(changes).mean()), rel=1e-4)
    assert not removed_blocks(network)


def test_the_cheapest_set_is_that_of_brute_force() -> None:
    source = torch.Generator().manual_seed(1)
    for case in range(60):
        count = int(torch.randint(1, 9, (1,), generator=source))
        names = [f"block {index}" for index in range(count)]
        losses = dict(zip(names, torch.randint(0, 9, (count,), generator=source).double().tolist(), strict=True))
        saved = dict(zip(names, torch.randint(1, 9, (count,), generator=source).tolist(), strict=True))
        never = names[: case % 4] if case % 4 < count else []
        sets = [
            some
            for size in range(count + 1)
            for some in itertools.combinations(names, size)
            if not never or not set(never) <= set(some)
        ]
        least = float(torch.rand((), generator=source)) * max(sum(saved[name] for name in some) for some in sets)
        best = min(sum(losses[n] for n in some) for some in sets if sum(saved[n] for n in some) >= least)
        found = cheapest(losses, saved, least, never)
        assert sum(losses[name] for name in found) == best
        assert sum(saved[name] for name in found) >= least
        assert tuple(found) in sets
    assert cheapest({"a": 1.0, "b": 2.0}, {"a": 1, "b": 1}, 2.0, ["a", "b"]) == ["a"]  # As much as may be.


@pytest.mark.parametrize("target", ["macs", "params"])
def test_blocks_without_effect_go_first(target: str) -> None:
    config = settings()
    idle = ["down.1.blocks.1", "middle.0", "middle.1", "up.0.blocks.1"]
    network = silenced(tiny_network(config), *idle)
    smaller, removal = prune_network(network, knobs(0.9, target=target), 0, calibration(config))
    assert set(removal.blocks) <= set(idle)
    assert removal.kept == {}
    assert getattr(count_cost(smaller), target) <= 0.9 * getattr(count_cost(network), target)
    with torch.no_grad():
        torch.testing.assert_close(smaller(*inputs(network)), network(*inputs(network)))


# The target.


@pytest.mark.parametrize(
    ("target", "depth"), [("macs", 0.5), ("params", 1.0), ("macs", 1.0), ("channels", 0.5), ("params", "auto")]
)
def test_the_target_is_reached(target: str, depth: Any) -> None:
    config = settings()
    network = tiny_network(config)
    prune = knobs(0.3, target=target, depth=depth)
    smaller, removal = prune_network(network, prune, 0, calibration(config))
    share = getattr(count_cost(smaller), target) / getattr(count_cost(network), target)
    shallow = remove(network, Removal({}, blocks=removal.blocks))
    after_blocks = getattr(count_cost(shallow), target) / getattr(count_cost(network), target)
    if depth == "auto":
        assert removal.blocks == []  # The widths reach it.
    else:
        assert after_blocks <= 0.3**depth
        assert removed_blocks(smaller) == removal.blocks != []
    assert share <= 0.3 if depth == 1.0 else share == pytest.approx(0.3, rel=0.02)
    assert_same_tensors(dict(remove(network, removal).state_dict()), dict(smaller.state_dict()))
    assert not removed_blocks(network)


def test_auto_goes_on_where_widths_end() -> None:
    config = settings()
    network = tiny_network(config)
    alone = least_share(network, knobs(depth=0.0, target="channels", round_to=8))
    keep = alone / 1.5
    with pytest.raises(ConfigError, match=r"at the narrowest widths; prune\.depth=auto removes blocks as well"):
        prune_network(network, knobs(keep, depth=0.0, target="channels", round_to=8))
    check_reach(network, knobs(keep, depth="auto", target="channels", round_to=8))
    smaller, removal = prune_network(
        network, knobs(keep, depth="auto", target="channels", round_to=8), 0, calibration(config)
    )
    assert removal.blocks
    assert count_cost(smaller).channels <= keep * count_cost(network).channels * 1.02


@pytest.mark.parametrize("depth", [0.5, 1.0, "auto"])
def test_what_is_out_of_reach_is_refused_before_the_first_step(depth: Any) -> None:
    network = tiny_network(settings(model__num_res_blocks=1))
    least = least_share(network, knobs(depth=depth, target="params"))
    assert 0.0 < least < 0.3
    with pytest.raises(ConfigError, match=rf"prune.keep = {least / 2:g}: out of reach; at least 0.\d+ of the params"):
        check_reach(network, knobs(least / 2, depth=depth, target="params"))
    with pytest.raises(ConfigError, match="out of reach"):
        prune_network(network, knobs(least / 2, depth=depth, target="params"), 0, calibration(settings()))
    smaller, _ = prune_network(network, knobs(least, depth=depth, target="params"), 0, calibration(settings()))
    assert count_cost(smaller).params <= least * 1.02 * count_cost(network).params


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0, "auto"])
def test_a_time_is_bisected(depth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts: a fixed time for every layer, as on small networks, and one for each MAC."""

    def clock(networks: Any, batch: int, *_: Any, **__: Any) -> list[float]:
        assert batch == LATENCY_BATCH
        layers = [sum(1 for _ in network.modules()) for network in networks]
        return [count_cost(one).macs / 1e6 + 0.02 * number for one, number in zip(networks, layers, strict=True)]

    for module in (depth_removal, channels_removal):
        monkeypatch.setattr(module, "latencies", clock)
    config = settings(model__num_res_blocks=1)
    network = tiny_network(config)
    keep = 0.36 if depth == 1.0 else 0.3  # Blocks alone reach no less.
    prune = knobs(keep, target="latency", depth=depth)
    if depth == 0.0:
        with pytest.raises(ConfigError, match=r"out of reach; at least 0\.3\d+ of the latency"):
            prune_network(network, prune, 0, calibration(config))
        return
    smaller, removal = prune_network(network, prune, 0, calibration(config))
    ours, theirs = clock([smaller, network], LATENCY_BATCH)
    assert 0.15 < ours / theirs <= keep * 1.02
    assert removal.blocks


def test_blocks_are_named_or_spared() -> None:
    config = settings()
    network, images = tiny_network(config), calibration(config)
    _, removal = prune_network(network, knobs(0.6, blocks=["up.1.blocks.1", "middle.1"], depth=0.0))
    assert removal.blocks == ["up.1.blocks.1", "middle.1"]
    assert any("0" in marks for marks in removal.kept.values())
    _, removal = prune_network(network, knobs(0.99, blocks=["up.1.blocks.1"], depth=0.0))
    assert (removal.blocks, removal.kept) == (["up.1.blocks.1"], {})
    _, removal = prune_network(network, knobs(0.6, blocks=["up.1.blocks.1"]), 0, images)
    assert removal.blocks[0] == "up.1.blocks.1"
    assert len(removal.blocks) > 1
    for spared, keep in (("middle", [0.5, 0.5, 1, 0.5, 0.5]), ("up.1", [0.5, 0.5, 0.5, 0.5, 1])):
        _, removal = prune_network(network, knobs(0.5, block_keep=keep), 0, images)
        assert removal.blocks
        assert not any(name.startswith(spared) for name in removal.blocks)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (["conv_in"], "'conv_in' is no block that can be removed; expected residual or attention blocks: down.0.bl"),
        (["middle.3"], "'middle.3' is no block"),
        (["middle.1", "middle.1"], "names a block twice"),
        (RESIDUAL, "would remove all residual blocks"),
    ],
)
@pytest.mark.parametrize("target", ["macs", "latency"])
def test_blocks_that_cannot_go_are_refused(blocks: list[str], target: str, message: str) -> None:
    network, prune = tiny_network(settings()), knobs(target=target, blocks=blocks, depth=0.0)
    for refuse in (check_reach, prune_network):
        with pytest.raises(ConfigError) as refusal:
            refuse(network, prune)
        assert message in one_line(refusal.value)
        assert str(refusal.value).startswith("prune.blocks = [")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"depth": 0.5, "calibration_batches": 3}, None),
        ({"calibration_batches": 3}, "with prune.importance=l2 and prune.depth=0.0; drop it or use prune.importance="),
        ({"depth": 1.0, "importance": "l1"}, "has no effect with prune.depth=1.0; drop it or use prune.depth=auto, or"),
        ({"method": "magnitude", "depth": 0.5}, "has no effect with prune.method=magnitude; drop it or use structured"),
    ],
)
def test_knobs_without_effect_are_named(changes: dict[str, Any], problem: str | None) -> None:
    problems = list(unheard(PruneConfig.model_validate({"method": "structured"} | changes)))
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


def test_depth_is_a_share_or_auto() -> None:
    for wrong in ("-0.1", "1.5", "deep"):
        with pytest.raises(ConfigError, match=r"prune\.depth"):
            build_config({"preset": "digits", "prune.method": "structured", "prune.depth": wrong})
    assert build_config({"preset": "digits", "prune.depth": "auto"}).prune.depth == "auto"


# What is left is a network like any other.


@pytest.mark.parametrize("depth", [1.0, 0.5])
def test_what_is_left_trains_resumes_and_is_pruned_again(depth: float, tmp_path: Path) -> None:
    config = settings(train__weight_decay=0.1)
    images, batches = calibration(config), tiny_batches(config)
    state = TrainState.start(tiny_network(config), config.train, config.ema)
    prune_state(state, config, PruneConfig(method="magnitude", keep=0.5))
    dense = state.network
    report = prune_state(state, config, knobs(depth=depth), images)
    assert report.details["blocks"]
    assert set(held_masks(state) or {}) == {f"{name}.weight" for name, module in state.network.named_modules()
                                            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)}  # fmt: skip
    distillation = Distillation(dense, state.network, 1.0, 1.0)
    train(state, batches, config, accelerator=cpu(), until=3, distillation=distillation)
    distillation.close()
    described = metadata(state.network, config) | state.metadata()
    write_checkpoint(tmp_path, state.step, described, state.parts())
    restored = TrainState.restore(read_checkpoint(tmp_path), config.train, config.ema, torch.device("cpu"))
    resume_pruning(restored)
    for one in (state, restored):
        train(one, batches, config, accelerator=cpu(), until=5)
    for part, tensors in state.parts().items():
        ours = restored.parts()[part]
        assert_same_tensors({name: tensor.float() for name, tensor in tensors.items()},
                            {name: tensor.float() for name, tensor in ours.items()})  # fmt: skip
    before = set(removed_blocks(restored.network))
    prune_state(restored, config, knobs(0.8, depth=1.0), images)
    assert before < set(removed_blocks(restored.network))
    assert [record["method"] for record in records(restored)] == ["magnitude", "structured", "structured"]


def test_channels_of_any_shallow_network_can_be_removed() -> None:
    """Groups of channels are traced anew: what is left of blocks joins streams that were apart."""
    source = torch.Generator().manual_seed(2)
    config = settings(model__channels=8, model__num_heads=2)
    for _ in range(6):
        network = tiny_network(config)
        gone = [name for name in BLOCKS if name != "up.1.blocks.2" and torch.rand((), generator=source) < 0.5]
        remove_blocks(network, gone)
        smaller, _ = prune_channels(network, knobs(depth=0.0))
        assert count_cost(smaller).macs / count_cost(network).macs == pytest.approx(0.5, rel=0.02)
        with torch.no_grad():
            assert torch.isfinite(smaller(*inputs(network))).all()


@pytest.mark.slow
def test_what_is_left_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    network = tiny_network()
    remove_blocks(network, ["down.0.blocks.0", "middle.0", "middle.1", "up.0.blocks.1"])
    with torch.no_grad():
        plain = network(*inputs(network))
        compilation.compile_network(network, "network")
        torch.testing.assert_close(network(*inputs(network)), plain)
