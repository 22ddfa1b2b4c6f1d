"""prune.widths=diffusers: what remains has one width for each resolution, and hits the target with such widths."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tiny import digits, lively, tiny_config, tiny_state
from torch import nn

from diffusion_core.config import ConfigError
from diffusion_core.model.cost import count_cost
from diffusion_core.model.structure import resize, structure
from diffusion_core.model.unet import AttentionBlock, UNet
from pruning.calibration import Calibration
from pruning.channels.groups import channel_groups
from pruning.channels.levels import EMBEDDING, LevelWidths, families
from pruning.channels.removal import Removal, prune_channels, remove
from pruning.config import PruneConfig
from pruning.masks.mask import held_masks
from pruning.pruner import prune_state

NETWORKS: list[dict[str, Any]] = [
    {},
    {"model__channel_multipliers": [1, 1, 2], "model__attention_resolutions": [2], "model__num_res_blocks": 2},
    {"model__num_heads": 4, "model__norm_groups": 8},
    {"model__channel_multipliers": [1, 2, 1], "model__attention_resolutions": [8, 4, 2], "model__head_channels": 8},
    {"model__conditioning": "scale_shift", "model__class_conditional": False},
]


def network(**knobs: Any) -> UNet:
    config = tiny_config(**{"model__channels": 32, **knobs})
    return lively(UNet(config.model, 8, 1, 10 * config.model.class_conditional)).eval()


def pruned(dense: UNet, keep: float, **knobs: Any) -> UNet:
    return prune_channels(dense, PruneConfig(method="structured", keep=keep, widths="diffusers", **knobs))[0]


def level_widths(small: UNet) -> list[set[int]]:
    """The widths of the layers of each resolution, and last those of the embedding, by the order of their names."""
    lowest = len(small.down) - 1
    found: list[set[int]] = [set() for _ in range(lowest + 2)]
    for name, module in small.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and name != "conv_out":
            side, _, rest = name.partition(".")
            index = int(rest.split(".")[0]) if side in ("down", "up") else 0
            level = {"down": index, "up": lowest - index, "middle": lowest, "conv_in": 0, "time_mlp": -1}[side]
            found[level].add(module.out_channels if isinstance(module, nn.Conv2d) else module.out_features)
    if small.label_embedding is not None:
        found[-1].add(small.label_embedding.embedding_dim)
    return found


def assert_uniform(small: UNet) -> list[int]:
    found = level_widths(small)
    assert all(len(widths) == 1 for widths in found), found
    assert len({module.num_groups for module in small.modules() if isinstance(module, nn.GroupNorm)}) == 1
    assert small.time_features == small.conv_in.out_channels
    return [widths.pop() for widths in found]


@pytest.mark.parametrize("target", ["macs", "params", "channels"])
@pytest.mark.parametrize("knobs", NETWORKS, ids=str)
def test_one_width_for_each_resolution_and_the_target(knobs: dict[str, Any], target: str) -> None:
    dense = network(**knobs)
    whole = getattr(count_cost(dense), target)
    coarse = 0.3 if "model__head_channels" in knobs else 0.06  # All widths follow that of a head, 1 to 8.
    for keep, scope in ((0.7, "layer"), (0.4, "global"), (0.2, "layer")):
        small = pruned(dense, keep, target=target, scope=scope, importance="l1")
        widths = assert_uniform(small)
        assert getattr(count_cost(small), target) / whole == pytest.approx(keep, rel=coarse)
        neighbours = list(zip(level_widths(dense)[:-1], widths[:-1], strict=True))
        for (one, narrow), (other, wide) in itertools.pairwise(neighbours):
            assert (one == other) == (narrow == wide)  # A skip has a convolution where widths differ.
        heads = {m.query.out_features / m.heads for m in small.modules() if isinstance(m, AttentionBlock)}
        assert len(heads) == 1 or "model__head_channels" not in knobs


def test_coarse_widths_come_first() -> None:
    """The first unit that meets the target within 2% is taken, so norms keep as many groups as they can."""
    dense = network(model__channels=64, model__norm_groups=16)
    small = pruned(dense, 0.5, importance="l1")
    assert count_cost(small).macs / count_cost(dense).macs == pytest.approx(0.5, rel=0.02)
    groups = next(m.num_groups for m in small.modules() if isinstance(m, nn.GroupNorm))
    coarser = pruned(dense, 0.5, importance="l1", round_to=2 * groups)
    assert count_cost(coarser).macs / count_cost(dense).macs != pytest.approx(0.5, rel=0.02)


def test_neighbours_stay_apart_at_the_narrowest_widths() -> None:
    dense = network(model__channel_multipliers=[1, 2, 3], model__norm_groups=1)
    groups = channel_groups(dense)
    limits = {group.name: group.width for group in groups}
    narrowest = LevelWidths(dense, groups).counts(dict.fromkeys(limits, 0.0), 1, limits, 0.0)
    names = ["conv_in", "down.1.blocks.0.conv1", "down.2.blocks.0.conv1", "time_mlp.0"]
    assert [narrowest[name] for name in names] == [2, 3, 4, 1]
    assert_uniform(pruned(dense, 0.01, importance="l1"))


def test_what_is_pruned_again_and_in_rounds_stays_uniform() -> None:
    dense = network()
    assert_uniform(pruned(dense, 0.4, importance="l1", iterations=3))
    small = pruned(dense, 0.6, importance="l1")
    smaller = pruned(small, 0.6, importance="l1")
    widths = assert_uniform(smaller)
    assert all(after < before for after, before in zip(widths, assert_uniform(small), strict=True))
    x, t = torch.zeros(2, 1, 8, 8), torch.tensor([0, 40])
    assert torch.isfinite(smaller(x, t)).all()
    free, _ = prune_channels(dense, PruneConfig(method="structured", keep=0.6, importance="random"))
    assert_uniform(pruned(free, 0.6, importance="l1"))


def test_widths_that_cannot_differ_are_refused() -> None:
    """A network that was pruned before, whose resolutions have become equally narrow."""
    config = tiny_config(model__channels=8, model__channel_multipliers=[1, 2], model__norm_groups=1)
    dense = UNet(config.model, 8, 1, 0)
    groups = channel_groups(dense)
    two = remove(dense, Removal({group.name: "1" * 2 + "0" * (group.width - 2) for group in groups}))
    with pytest.raises(ConfigError, match="resolutions 0 and 1, which were pruned before"):
        pruned(two, 0.9, importance="l1")


def test_the_record_repeats_it_and_the_structure_holds_it() -> None:
    config = tiny_config(model__channels=32)
    dense = network()
    prune = PruneConfig(method="structured", keep=0.3, widths="diffusers", importance="l1")
    small, removal = prune_channels(dense, prune)
    again, restored = remove(dense, removal), UNet(config.model, 8, 1, 10)
    resize(restored, structure(small, config.model))
    restored.load_state_dict(small.state_dict())
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 40])
    with torch.no_grad():
        for other in (again, restored.eval()):
            assert torch.equal(other(x, t), small(x, t))


def test_the_weights_of_features_that_remain_are_kept() -> None:
    dense = network()
    small = pruned(dense, 0.3, importance="l1")
    kept = small.time_features // 2
    first, second = (dict(one.named_parameters())["time_mlp.0.weight"] for one in (dense, small))
    stride = (16 - 1) // (kept - 1)
    frequencies = [i * stride for i in range(kept)]
    rows = first[:, [*frequencies, *(16 + i for i in frequencies)]]
    assert all(any(torch.equal(row, other) for other in rows) for row in second)


def test_classes_and_families() -> None:
    dense = network(**NETWORKS[3])
    known = families(dense, channel_groups(dense))
    levels = [[one.levels for one in family] for family in known]
    assert levels == [[(EMBEDDING,)], [(0,), (1,), (2,)]]
    assert [one.heads for one in known[1]] == [4, 8, 4]
    assert sum(len(one.groups) for family in known for one in family) == len(channel_groups(dense))


def test_masks_and_training_go_on() -> None:
    """A masked state is narrowed: what stays keeps its mask."""
    config = tiny_config(model__channels=16)
    state = tiny_state(config)
    lively(state.network)
    calibration = Calibration.of(digits().train, config, torch.device("cpu"))
    prune_state(state, config, PruneConfig(method="random", keep=0.5), calibration)
    prune_state(state, config, PruneConfig(method="structured", keep=0.5, widths="diffusers", importance="l1"))
    assert_uniform(state.network)
    masks = held_masks(state)
    assert masks is not None
    weight = dict(state.network.named_parameters())["time_mlp.0.weight"]
    assert masks["time_mlp.0.weight"].shape == weight.shape
    assert torch.equal(weight != 0, masks["time_mlp.0.weight"])
