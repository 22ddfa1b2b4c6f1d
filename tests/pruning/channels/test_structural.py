"""Structured pruning: it hits its target, and what is left works, trains, survives the disk and is pruned again."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    assert_same_tensors,
    cpu,
    digits,
    lively,
    metadata,
    one_line,
    tiny_batches,
    tiny_config,
    tiny_network,
    tiny_state,
)
from torch import Tensor, nn

from diffusion_core.checkpoint import read_checkpoint, write_checkpoint
from diffusion_core.config import ConfigError, CoreConfig
from diffusion_core.data.datasets import Images
from diffusion_core.model.cost import Cost, count_cost
from diffusion_core.model.structure import maskable
from diffusion_core.model.unet import AttentionBlock, UNet
from diffusion_core.training.trainer import TrainState, train
from pruning.blocks import shared_blocks
from pruning.calibration import Calibration
from pruning.channels import removal as removal_module
from pruning.channels.groups import channel_groups
from pruning.channels.removal import Removal, prune_channels, remove
from pruning.config import PruneConfig
from pruning.masks.mask import MASKS_PART
from pruning.pruner import is_pruned, prune_state, records
from pruning.registries import IMPORTANCES


def config(heads: int = 1, labels: bool = True, size: int = 8, **changes: Any) -> CoreConfig:
    """Of digits, or of larger pictures in colour."""
    pictures = {} if size == 8 else {"data__name": "cifar10", "data__image_size": size}
    settings = {
        "model__channels": 16 if size < 64 else 8,
        "model__num_heads": heads,
        "model__class_conditional": labels,
        "model__attention_resolutions": [size // 2],
        "train__steps": 12,
    }
    return tiny_config(**(settings | pictures | changes))


def pictures(settings: CoreConfig) -> Images:
    """Digits, or noise of the configured shape."""
    if settings.data.name == "digits":
        return digits().train
    source = torch.Generator().manual_seed(3)
    shape = (8, *settings.data.image_shape)
    return Images(torch.randint(0, 256, shape, generator=source, dtype=torch.uint8), torch.arange(8))


def knobs(keep: float = 0.5, **changes: Any) -> PruneConfig:
    return PruneConfig(method="structured", **({"keep": keep, "calibration_batches": 2} | changes))


def smaller_one(network: UNet, keep: float = 0.5, **changes: Any) -> UNet:
    return prune_channels(network, knobs(keep, **changes))[0]


def share(smaller: UNet, network: UNet, of: str) -> float:
    after, before = (count_cost(one) for one in (smaller, network))
    return getattr(after, of) / getattr(before, of)


def inputs(network: UNet) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    images = torch.randn(3, network.in_channels, network.image_size, network.image_size, generator=source)
    return images, torch.tensor([0, 20, 49]), torch.tensor([1, 5, -1])


# Every importance, from 5% to 90%, with and without labels, one head or several, small and large pictures.

SPREAD = list(
    zip(
        IMPORTANCES,
        [0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.3, 0.6],
        itertools.cycle([1, 2, 4]),
        itertools.cycle([True, False]),
        [8, 32, 8, 8, 64, 8, 8, 8, 8],
        itertools.cycle(["layer", "global"]),
        strict=False,
    )
)


@pytest.mark.parametrize(("importance", "keep", "heads", "labels", "size", "scope"), SPREAD)
def test_what_is_left_works_trains_survives_the_disk_and_is_pruned_again(
    importance: str, keep: float, heads: int, labels: bool, size: int, scope: str, tmp_path: Path
) -> None:
    settings = config(heads, labels, size, train__batch_size=4)
    images = pictures(settings)
    batches = tiny_batches(settings, images)
    state = TrainState.start(
        lively(UNet(settings.model, size, images.images_NCHW.shape[1], 10 * labels)), settings.train, settings.ema
    )
    train(state, batches, settings, accelerator=cpu(), until=2)
    dense = state.network
    calibration = Calibration.of(images, settings, torch.device("cpu"))
    report = prune_state(state, settings, knobs(keep, importance=importance, scope=scope), calibration)
    small = state.network

    assert report.before == count_cost(dense)
    assert report.after == count_cost(small)
    assert report.after.macs / report.before.macs == pytest.approx(keep, rel=0.02)
    assert (report.method, report.step, state.step) == ("structured", 2, 2)
    assert is_pruned(state)
    assert small.num_classes == dense.num_classes
    x, t, classes = inputs(small)
    with torch.no_grad():
        answer = small.eval()(x, t, classes)
        assert answer.shape == x.shape
        assert torch.isfinite(answer).all()
        if importance != "reinit":  # Which starts from a last layer of zeros.
            assert answer.std() > 0
            assert not torch.equal(answer, small(x, t.roll(1), classes))
            assert labels == (not torch.equal(answer, small(x, t, classes.roll(1))))

    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    train(state, batches, settings, accelerator=cpu(), until=4)
    changed = [name for name, tensor in small.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(changed) > (0 if importance == "reinit" else 0.8 * len(before))  # The optimizer holds the new weights.
    assert state.ema.updates == 2

    write_checkpoint(tmp_path, state.step, metadata(state.network, settings) | state.metadata(), state.parts())
    restored = TrainState.restore(read_checkpoint(tmp_path), settings.train, settings.ema, torch.device("cpu"))
    assert is_pruned(restored)
    for one in (state, restored):
        train(one, batches, settings, accelerator=cpu(), until=5)
    for part, tensors in state.parts().items():
        assert_same_tensors(tensors, restored.parts()[part])

    prune_state(restored, settings, knobs(0.7, importance=importance, target="params"), calibration)
    assert restored.network.conv_out.out_channels == dense.conv_out.out_channels
    assert [record["method"] for record in records(restored)] == ["structured"] * 2
    assert records(restored)[1]["before"]["params"] == report.after.params


# The target.


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("target", ["channels", "params", "macs"])
def test_the_target_is_hit_within_two_percent(target: str, scope: str) -> None:
    network = tiny_network(config(heads=2))
    last = 0.0
    for keep in (0.1, 0.56, 0.9):
        reached = share(smaller_one(network, keep, target=target, scope=scope), network, target)
        assert reached == pytest.approx(keep, rel=0.02)
        assert last < reached
        last = reached


def test_the_published_architecture_hits_the_published_points() -> None:
    """35.7 M parameters and 6.06 G multiply-accumulates; all 51 group norms keep their 32 groups."""
    settings = CoreConfig()
    dense = UNet(settings.model, 32, 3, 0)
    published = {"macs": 3.39e9 / 6.06e9, "params": 19.85e6 / 35.75e6}
    cost = count_cost(dense)
    assert cost.params == 35_746_307
    assert cost.macs == pytest.approx(6.06e9, rel=0.005)
    for target, keep in published.items():
        smaller = smaller_one(dense, keep, target=target)
        assert share(smaller, dense, target) == pytest.approx(keep, rel=0.02)
        assert norm_groups(smaller) == [32] * 51


def norm_groups(network: UNet) -> list[int]:
    return [module.num_groups for module in network.modules() if isinstance(module, nn.GroupNorm)]


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.1])
def test_automatic_widths_are_the_coarsest_that_hit_the_target(keep: float) -> None:
    """Multiples of the number of groups, then of its divisors, each of which is tried by itself here."""
    network = tiny_network(config(model__channels=12, model__norm_groups=6))
    found = smaller_one(network, keep)
    for unit in (6, 3, 2, 1):
        try:
            tried = smaller_one(network, keep, round_to=unit)
        except ConfigError:  # Even one multiple in each group costs more.
            continue
        if share(tried, network, "macs") == pytest.approx(keep, rel=0.02):
            assert_same_tensors(dict(found.state_dict()), dict(tried.state_dict()))
            assert min(norm_groups(found)) >= unit
            return
    raise AssertionError(f"no width hits {keep}")


def test_latency_is_measured_and_falls() -> None:
    """No more than that: what a clock says of a tiny network on a busy machine is not to be relied on."""
    network = tiny_network(config())
    assert share(smaller_one(network, 0.9, target="latency"), network, "macs") <= 1.0


def test_a_target_out_of_reach_is_refused() -> None:
    network = tiny_network(config(heads=4))
    with pytest.raises(ConfigError) as caught:
        smaller_one(network, 0.001)
    message = one_line(caught.value)
    assert message.startswith("prune.keep = 0.001: out of reach; at least 0.0")
    assert "of the macs stays" in message
    least = float(message.split("at least ")[1].split()[0])
    assert 0.001 < share(smaller_one(network, least + 0.0005), network, "macs") < least + 0.001
    with pytest.raises(ConfigError, match="out of reach"):
        smaller_one(network, 0.2, round_to=16)


def test_widths_are_multiples_as_asked() -> None:
    network = tiny_network(config(heads=2))
    for name, module in smaller_one(network, 0.5, round_to=4).named_modules():
        for size in ("out_channels", "out_features", "num_channels", "embedding_dim"):
            if hasattr(module, size) and name != "conv_out":
                assert getattr(module, size) % 4 == 0, name


def test_group_norms_take_fewer_groups_and_attention_keeps_its_heads() -> None:
    network = tiny_network(config(heads=4))
    smaller = smaller_one(network, 0.41, scope="global", round_to=1)
    dense = dict(network.named_modules())
    fewer = 0
    for name, module in smaller.named_modules():
        if isinstance(module, nn.GroupNorm):
            assert module.num_groups == math.gcd(module.num_channels, dense[name].num_groups)
            fewer += module.num_groups < dense[name].num_groups
        if isinstance(module, AttentionBlock):
            assert module.heads == 4
            assert module.query.out_features == module.key.out_features == module.value.out_features
            assert module.query.out_features % 4 == 0
    assert fewer


def block(network: UNet, name: str) -> Any:
    """A block by its name; Any, as its layers' types are known to the block alone."""
    return network.get_submodule(name)


def test_blocks_lose_as_they_were_told_to() -> None:
    network = tiny_network(config())
    names = shared_blocks(len(network.down))
    assert names == ["down.0", "down.1", "middle", "up.0", "up.1"]
    smaller = smaller_one(network, 0.7, target="params", round_to=1, block_keep=[1.0, 0.75, 0.5, 0.75, 1.0])
    assert share(smaller, network, "params") == pytest.approx(0.7, rel=0.02)
    kept = {
        name: block(smaller, name).conv1.out_channels / block(network, name).conv1.out_channels
        for name in ("down.0.blocks.0", "down.1.blocks.0", "middle.0", "up.0.blocks.0", "up.1.blocks.0")
    }
    assert kept["down.0.blocks.0"] == kept["up.1.blocks.0"] == 1.0
    assert kept["middle.0"] < kept["down.1.blocks.0"] < 1.0
    assert 1 - kept["middle.0"] == pytest.approx(2 * (1 - kept["down.1.blocks.0"]), abs=0.1)
    with pytest.raises(ConfigError, match=r"expected 5 shares, for down\.0, down\.1, middle"):
        smaller_one(network, block_keep=[0.5])


def test_iterations_come_to_the_same_size_by_other_choices() -> None:
    network = tiny_network(config())
    images = Calibration.of(digits().train, config(), torch.device("cpu"))
    once, often = (
        prune_channels(network, knobs(0.4, importance="taylor", iterations=count), 0, images) for count in (1, 3)
    )
    assert share(often[0], network, "macs") == pytest.approx(0.4, rel=0.02)
    assert once[1].kept != often[1].kept
    assert_same_tensors(dict(remove(network, often[1]).state_dict()), dict(often[0].state_dict()))


@pytest.mark.parametrize("round_to", [None, 1, 2, 3])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_channels_that_are_removed_stay_removed(
    scope: str, round_to: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[Mapping[str, Tensor]] = []
    choose = removal_module.choose_all

    def noted(*words: Any) -> Mapping[str, Tensor]:
        chosen.append(choose(*words))
        return chosen[-1]

    monkeypatch.setattr(removal_module, "choose_all", noted)
    network = tiny_network(config(heads=2))
    prune_channels(network, knobs(0.2, importance="random", scope=scope, iterations=5, round_to=round_to))
    assert len(chosen) == 5
    for earlier, later in itertools.pairwise(chosen):
        for name, stays in later.items():
            assert not (stays & ~earlier[name]).any(), name


# The record.


@pytest.mark.parametrize("importance", ["random", "l1", "reinit"])
def test_a_record_is_enough_to_prune_again(importance: str) -> None:
    network = tiny_network(config(heads=2))
    state = TrainState.start(copy.deepcopy(network), config(heads=2).train, config(heads=2).ema)
    prune_state(state, config(heads=2), knobs(0.3, importance=importance))
    (record,) = records(state)
    again = remove(network, Removal(**record["details"]))
    assert_same_tensors(dict(again.state_dict()), dict(state.network.state_dict()))
    assert record["knobs"]["importance"] == importance
    with pytest.raises(ValueError, match="another network"):
        remove(again, Removal(**record["details"]))


def test_what_stays_is_a_part_of_what_there_was() -> None:
    """The record says which part: checked by hand on a layer between two groups."""
    network = tiny_network(config())
    smaller, removal = prune_channels(network, knobs(0.4))
    marks = {name: torch.tensor([mark == "1" for mark in text]) for name, text in removal.kept.items()}
    dense, small = block(network, "down.0.blocks.0"), block(smaller, "down.0.blocks.0")
    rows, columns = marks["down.0.blocks.0.conv1"], marks["conv_in"]
    assert torch.equal(small.conv1.weight, dense.conv1.weight[rows][:, columns])
    assert torch.equal(small.conv1.bias, dense.conv1.bias[rows])
    assert torch.equal(small.norm2.weight, dense.norm2.weight[rows])
    assert torch.equal(small.conv2.weight, dense.conv2.weight[columns][:, rows])
    embedding = marks["time_mlp.2"]
    assert torch.equal(small.embed.weight, dense.embed.weight[rows][:, embedding])
    assert network.label_embedding is not None
    assert smaller.label_embedding is not None
    assert torch.equal(smaller.label_embedding.weight, network.label_embedding.weight[:, embedding])


def test_every_layer_belongs_to_groups_that_cover_it() -> None:
    """Also the residual streams around attention, and a skip connection to the end of its own stream."""
    network = tiny_network(config(heads=2, model__attention_resolutions=[8, 4]))
    places: dict[tuple[str, str], list[int]] = {}
    for group in channel_groups(network):
        for member in group.members:
            places.setdefault((member.layer, member.side), []).extend(member.places)
    fixed = {("conv_in", "in"), ("conv_out", "out"), ("time_mlp.0", "in")}  # Image and timestep.
    for name, module in network.named_modules():
        for size, side in (
            ("in_channels", "in"),
            ("in_features", "in"),
            ("out_channels", "out"),
            ("out_features", "out"),
            ("num_channels", "out"),
            ("embedding_dim", "out"),
        ):
            if hasattr(module, size) and not isinstance(module, UNet) and (name, side) not in fixed:
                assert sorted(places.pop((name, side))) == list(range(getattr(module, size))), (name, side)
    assert not places


def test_channels_of_attention_that_do_nothing_leave_no_trace() -> None:
    """The root of a head's width, which attention divides by, is made up for."""
    network = tiny_network(config(heads=2))
    attention = block(network, "middle.1")
    idle = torch.arange(32) % 4 == 3
    with torch.no_grad():
        for layer in (attention.query, attention.key, attention.value):
            layer.weight[idle] = 0.0
            layer.bias[idle] = 0.0
    groups = channel_groups(network)
    kept = {group.name: "1" * group.width for group in groups} | {"middle.1.query": "1110" * 8}
    smaller = remove(network, Removal(kept))
    assert block(smaller, "middle.1").query.out_features == 24
    with torch.no_grad():
        torch.testing.assert_close(smaller(*inputs(network)), network(*inputs(network)))


# What goes.


def test_the_weakest_channels_go() -> None:
    network = tiny_network(config(model__norm_groups=1))
    first = block(network, "middle.0")
    weak = torch.randperm(32, generator=torch.Generator().manual_seed(5)) % 2 == 1
    with torch.no_grad():
        for tensor in (first.conv1.weight, first.embed.weight):
            tensor[weak] *= 1e-3
        first.conv2.weight[:, weak] *= 1e-3
    for scope in ("layer", "global"):
        _, removal = prune_channels(network, knobs(0.97 if scope == "global" else 0.25, scope=scope))
        stays = torch.tensor([mark == "1" for mark in removal.kept["middle.0.conv1"]])
        assert not (stays & weak).any() or (stays | weak).all()
        assert (~stays).any()


def test_the_dense_network_is_left_as_it_was() -> None:
    network = tiny_network(config()).train()
    network.conv_in.weight.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    images = Calibration.of(digits().train, config(), torch.device("cpu"))
    smaller, _ = prune_channels(network, knobs(importance="taylor"), 0, images)
    assert_same_tensors(dict(network.state_dict()), dict(before))
    assert network.training
    assert smaller.training
    assert not network.conv_in.weight.requires_grad
    assert not smaller.conv_in.weight.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
    ours = {id(parameter) for parameter in network.parameters()}
    assert not any(id(parameter) in ours for parameter in smaller.parameters())


def test_masks_go_along() -> None:
    """A network pruned by masks, then by channels: what is masked of the rest stays masked, whatever happens."""
    settings = config(train__weight_decay=0.1)
    state = TrainState.start(tiny_network(settings), settings.train, settings.ema)
    prune_state(state, settings, PruneConfig(method="magnitude", keep=0.5))
    prune_state(state, settings, knobs(0.5))
    masks = {name: mask.clone() for name, mask in state.extra_parts[MASKS_PART].items()}
    assert (
        0.2 < 1 - sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values()) < 0.8
    )
    train(state, tiny_batches(settings), settings, accelerator=cpu(), until=4)
    for network in (state.network, state.ema.network):
        for name, weight in maskable(network).items():
            assert not weight[~masks[name]].any(), name
    assert [record["method"] for record in records(state)] == ["magnitude", "structured"]


def test_an_untrained_network_can_be_pruned() -> None:
    """Whose last layers are zero, and with them almost every gradient: nobody divides by them."""
    settings = config()
    images = Calibration.of(digits().train, settings, torch.device("cpu"))
    for importance, scope in (("l2", "global"), ("taylor", "global"), ("diff_pruning", "layer")):
        state = tiny_state(settings)
        prune_state(state, settings, knobs(importance=importance, scope=scope), images)
        assert all(torch.isfinite(parameter).all() for parameter in state.network.parameters())


def test_an_importance_that_needs_images_says_so() -> None:
    with pytest.raises(ValueError, match=r"prune.importance = 'fisher': needs images"):
        smaller_one(tiny_network(config()), importance="fisher")


def test_the_report_is_plain() -> None:
    state = tiny_state(config())
    report = prune_state(state, config(), knobs(0.5))
    assert isinstance(report.after, Cost)
    assert records(state)[0]["after"]["params"] == report.after.params
    assert report.sparsity == pytest.approx(1 - report.after.params / report.before.params)
