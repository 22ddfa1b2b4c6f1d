"""Which weights go: exact to one weight, for good, and by the rule that each strategy is named for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config, tiny_network
from torch import Tensor

from diffusion_core.model.structure import maskable
from pruning.blocks import block_of, block_shares, shared_blocks
from pruning.config import PruneConfig
from pruning.masks.budgets import allot, erdos_renyi_kernel, uniform
from pruning.masks.build import choose_masks
from pruning.masks.mask import WeightMasks, block_sparsity, counts, empty_layers, sparsity
from pruning.masks.strategies import MaskStrategy, global_magnitude, layer_magnitude, n_of_m, random_weights

STRATEGIES: dict[str, MaskStrategy] = {
    "global": global_magnitude,
    "uniform": layer_magnitude(uniform),
    "erk": layer_magnitude(erdos_renyi_kernel),
    "random": random_weights(3),
    "random by layer": random_weights(3, erdos_renyi_kernel),
}


@st.composite
def weights(draw: Any) -> dict[str, Tensor]:
    """A few layers; few different values, so that there are ties, zeros among them."""
    shapes = draw(st.lists(st.lists(st.integers(1, 6), min_size=2, max_size=4), min_size=1, max_size=4))
    levels = draw(st.sampled_from([1, 2, 1000]))
    source = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return {
        f"layer{i}": torch.randint(-levels + 1, levels, shape, generator=source) / levels
        for i, shape in enumerate(shapes)
    }


fractions = st.floats(0.0, 1.0, exclude_max=True)


def pruned_count(masks: WeightMasks) -> int:
    return sum(int((~mask).sum()) for mask in masks.values())


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@settings(max_examples=40, deadline=None)
@given(given_weights=weights(), one=fractions, two=fractions, seed=st.integers(0, 100))
def test_exact_to_one_weight_and_what_is_pruned_stays_pruned(
    strategy: MaskStrategy, given_weights: dict[str, Tensor], one: float, two: float, seed: int
) -> None:
    """Also when the weights have changed since, and when less is asked for."""
    total = sum(weight.numel() for weight in given_weights.values())
    before = {name: weight.clone() for name, weight in given_weights.items()}
    first = strategy(given_weights, None, one)
    assert pruned_count(first) == round(one * total)
    assert {name: (mask.shape, mask.dtype) for name, mask in first.items()} == {
        name: (weight.shape, torch.bool) for name, weight in given_weights.items()
    }
    kept = {name: mask.clone() for name, mask in first.items()}
    source = torch.Generator().manual_seed(seed)
    changed = {name: torch.randn(weight.shape, generator=source) for name, weight in given_weights.items()}
    second = strategy(changed, first, two)
    assert pruned_count(second) == max(round(one * total), round(two * total))
    assert all(not (second[name] & ~first[name]).any() for name in first)
    assert all(torch.equal(first[name], kept[name]) for name in first)  # Arguments are left alone.
    assert all(torch.equal(given_weights[name], before[name]) for name in before)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


@given(first=weights(), one=fractions, two=fractions, seed=st.integers(0, 100))
def test_globally_the_smallest_go(first: dict[str, Tensor], one: float, two: float, seed: int) -> None:
    """Of all weights, and then of those that are left, although their values have changed since."""
    before = global_magnitude(first, None, one)
    again = global_magnitude(first, None, one)
    assert all(torch.equal(before[name], again[name]) for name in before)
    total = sum(weight.numel() for weight in first.values())
    assert sparsity(before) == pytest.approx(round(one * total) / total)
    values, keep = flat(first).abs(), flat(before)
    if keep.any() and not keep.all():
        assert values[~keep].max() <= values[keep].min()
    source = torch.Generator().manual_seed(seed)
    changed = {name: torch.randn(weight.shape, generator=source) for name, weight in first.items()}
    after = flat(global_magnitude(changed, before, two))
    newly = keep & ~after
    if newly.any() and after.any():
        assert flat(changed).abs()[newly].max() <= flat(changed).abs()[after].min()


@settings(max_examples=60, deadline=None)
@given(given_weights=weights(), fraction=fractions)
def test_by_layer_the_smallest_of_each_go(given_weights: dict[str, Tensor], fraction: float) -> None:
    masks = layer_magnitude(uniform)(given_weights, None, fraction)
    for name, weight in given_weights.items():
        assert abs(pruned_count({name: masks[name]}) - fraction * weight.numel()) <= 1.0
        if masks[name].any() and not masks[name].all():
            assert weight.abs()[~masks[name]].max() <= weight.abs()[masks[name]].min()


@settings(max_examples=200, deadline=None)
@given(
    layers=st.lists(st.tuples(st.floats(0.0, 100.0), st.integers(0, 40)), min_size=1, max_size=6), part=st.floats(0, 1)
)
def test_a_budget_is_split_in_proportion_and_adds_up(layers: list[tuple[float, int]], part: float) -> None:
    shares = {str(i): share for i, (share, _) in enumerate(layers)}
    most = {str(i): size for i, (_, size) in enumerate(layers)}
    total = round(part * sum(most.values()))
    kept = allot(total, shares, most)
    assert sum(kept.values()) == total
    assert all(0 <= kept[name] <= most[name] for name in shares)
    open_layers = [name for name in shares if kept[name] < most[name] and shares[name] > 1e-3]
    for one in open_layers:  # Those that are not full stand in proportion, up to the weight that rounding moves.
        for two in open_layers:
            assert kept[one] / shares[one] <= (kept[two] + 1) / shares[two] + 1.0 / shares[one] + 1e-6


def test_erdos_renyi_kernel_is_that_of_the_paper() -> None:
    """Densities proportional to (n_in + n_out + height + width) / size, by the formula and a scale found by hand."""
    shapes = {"a": (64, 32, 3, 3), "b": (128, 64, 3, 3), "c": (128, 128), "d": (4, 4)}
    given_weights = {name: torch.rand(shape) for name, shape in shapes.items()}
    masks = layer_magnitude(erdos_renyi_kernel)(given_weights, None, 0.9)
    density = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    total = sum(math.prod(shape) for shape in shapes.values())
    # d is full; the others share what is left.
    epsilon = (0.1 * total - 16) / sum(sum(shapes[name]) for name in "abc")
    assert counts(masks)["d"] == 16
    for name in "abc":
        assert counts(masks)[name] == pytest.approx(epsilon * density[name] * math.prod(shapes[name]), abs=1.0)


def test_shares_by_block_are_kept_in_every_layer_of_the_block() -> None:
    network = tiny_network()
    prune = PruneConfig(
        method="magnitude", scope="layer", profile="blocks", keep=0.5, block_keep=[0.25, 0.5, 1.0, 0.5, 0.5]
    )
    masks = choose_masks(network, None, tiny_config().seed, prune)
    for name, mask in masks.items():
        share = {"down.0": 0.25, "middle": 1.0}.get(block_of(name), 0.5)
        assert abs(int(mask.sum()) - share * mask.numel()) <= 1.0, name
    assert block_sparsity(masks)["middle"] == 0.0
    # On the way there (gradual pruning), the same in proportion.
    halfway = choose_masks(network, None, tiny_config().seed, prune, progress=0.5)
    assert block_sparsity(halfway)["down.0"] == pytest.approx(0.375, abs=0.01)
    assert block_sparsity(halfway)["middle"] == 0.0


def test_blocks_are_those_of_the_network() -> None:
    named = {block_of(name) for name in maskable(tiny_network())}
    assert named == {"time_mlp", "conv_in", *shared_blocks(2), "conv_out"}
    shares = block_shares([0.1, 0.2, 0.3, 0.4, 0.5], 2)
    assert shares == {"down.0": 0.1, "down.1": 0.2, "middle": 0.3, "up.0": 0.4, "up.1": 0.5}


def brute_force(weight: Tensor, n: int, m: int) -> Tensor:
    """N:M by loops, over the input channels of each output channel and position of the kernel."""
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    flat = weight.reshape(*weight.shape[:2], -1)
    for out in range(flat.shape[0]):
        for position in range(flat.shape[2]):
            for start in range(0, flat.shape[1], m):
                group = sorted(range(start, start + m), key=lambda i: -abs(float(flat[out, i, position])))
                for i in group[:n]:
                    mask.view(flat.shape)[out, i, position] = True
    return mask


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (4, 8)])
def test_n_of_m_neighbours_stay(n: int, m: int) -> None:
    source = torch.Generator().manual_seed(n)
    given_weights = {
        "conv": torch.randn(3, 8, 3, 3, generator=source),
        "linear": torch.randn(5, 16, generator=source),
        "first": torch.randn(4, 3, 3, 3, generator=source),
    }
    masks = n_of_m(n, m)(given_weights, None, 0.0)
    for name in ("conv", "linear"):
        assert torch.equal(masks[name], brute_force(given_weights[name], n, m))
    assert masks["first"].all()
    # What is pruned already stays so.
    held = {name: torch.rand(weight.shape, generator=source) < 0.5 for name, weight in given_weights.items()}
    again = n_of_m(n, m)(given_weights, held, 0.0)
    assert all(not (again[name] & ~held[name]).any() for name in held)
    groups = again["linear"].view(5, -1, m).sum(dim=2)
    assert torch.equal(groups, held["linear"].view(5, -1, m).sum(dim=2).clamp(max=n))


@pytest.mark.parametrize("method", ["random", "n_of_m", "magnitude"])
def test_the_same_knobs_choose_the_same_masks(method: str) -> None:
    network = tiny_network()

    def choose(seed: int) -> WeightMasks:
        return choose_masks(network, None, seed, PruneConfig(method=method, keep=0.3))

    one, two, other = choose(0), choose(0), choose(1)
    assert all(torch.equal(one[name], two[name]) for name in one)
    differs = any(not torch.equal(one[name], other[name]) for name in one)
    assert differs == (method == "random")
    assert sparsity(one) == pytest.approx(0.7 if method != "n_of_m" else 0.5, abs=0.01)


@pytest.mark.parametrize(("scope", "empty"), [("global", True), ("layer", False)])
def test_layers_that_start_at_zero_go_whole_unless_each_is_ranked_by_itself(scope: Any, empty: bool) -> None:
    from diffusion_core.model.unet import build_network

    network = build_network(tiny_config(), 10)
    masks = choose_masks(network, None, tiny_config().seed, PruneConfig(method="magnitude", keep=0.3, scope=scope))
    assert bool(empty_layers(masks)) == empty
    assert ("conv_out" in empty_layers(masks)) == empty
