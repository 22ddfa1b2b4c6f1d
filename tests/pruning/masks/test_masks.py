"""Pruning by masks: the exact share, of weights alone, for good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import CUDA, fake_tensors
from tiny import NUM_CLASSES, cpu, metadata, one_line, tiny_batches, tiny_config, tiny_network
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_core.checkpoint import read_checkpoint, write_checkpoint
from diffusion_core.config import CoreConfig
from diffusion_core.model.cost import count_cost
from diffusion_core.model.structure import maskable
from diffusion_core.model.unet import UNet, build_network
from diffusion_core.training.ema import Ema
from diffusion_core.training.trainer import TrainState, build_optimizer, train
from pruning.config import PruneConfig
from pruning.masks.mask import MASKS_PART, WeightMasks, apply_masks, attach_masks, held_masks, hold_masks
from pruning.masks.strategies import global_magnitude
from pruning.pruner import inherit, is_pruned, prune_state, resume_pruning

CONFIG = tiny_config(
    train__weight_decay=0.1, train__lr=3e-3, train__steps=200, ema__power_widths=[0.1], ema__average_from=10
)


def lively_state() -> TrainState:
    """Whose weights are of similar size in all layers, so that no layer is pruned whole."""
    return TrainState.start(tiny_network(CONFIG), CONFIG.train, CONFIG.ema)


def run(state: TrainState, until: int, config: CoreConfig = CONFIG) -> TrainState:
    return train(state, tiny_batches(config), config, accelerator=cpu(), until=until)


# Which weights.


def test_only_weights_of_convolutions_and_linear_layers_may_go() -> None:
    network = tiny_network()
    names = set(maskable(network))
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert f"{name}.weight" in names
            assert f"{name}.bias" not in names
        elif isinstance(module, nn.GroupNorm | nn.Embedding):
            assert f"{name}.weight" not in names
    assert "label_embedding.weight" not in names
    assert not any(".norm" in name or name.startswith("norm") for name in names)
    assert all(dict(network.named_parameters())[name].ndim >= 2 for name in names)


def test_masks_zero_weights_and_nothing_else() -> None:
    network = tiny_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    masks = global_magnitude(maskable(network), None, 0.6)
    apply_masks(network, masks)
    for name, tensor in network.state_dict().items():
        expected = before[name] * masks[name] if name in masks else before[name]
        assert torch.equal(tensor, expected), name


# For good.


def assert_held(state: TrainState, masks: WeightMasks, fraction: float) -> None:
    total = sum(mask.numel() for mask in masks.values())
    assert len(state.ema.networks) == 3  # Exponential, power function, plain.
    for network in (state.network, *state.ema.networks.values()):
        found = maskable(network)
        for name, mask in masks.items():
            assert not found[name][~mask].any(), name
        assert sum(int((weight == 0).sum()) for weight in found.values()) == round(fraction * total)


def test_sparsity_is_exact_after_200_steps_with_momentum_and_weight_decay() -> None:
    fraction = 0.7
    state = run(lively_state(), 20)  # Moments of every weight, to be revived by.
    report = prune_state(state, CONFIG, PruneConfig(method="magnitude", keep=1 - fraction))
    masks = {name: mask.clone() for name, mask in state.extra_parts[MASKS_PART].items()}
    assert report.sparsity == pytest.approx(fraction, abs=1e-4)
    assert_held(state, masks, fraction)
    before = {name: weight.clone() for name, weight in maskable(state.network).items()}
    run(state, 200)
    assert_held(state, masks, fraction)
    for name, mask in masks.items():  # The others go on learning.
        assert (maskable(state.network)[name][mask] != before[name][mask]).float().mean() > 0.95, name
    for parameter, name in ((p, n) for n, p in state.network.named_parameters() if n in masks):
        for key in ("exp_avg", "exp_avg_sq"):
            assert not state.optimizer.state[parameter][key][~masks[name]].any()


def test_gradients_of_pruned_weights_are_zero_and_do_not_count_in_the_norm() -> None:
    """The reported norm is that of the gradient of a network in which the pruned weights do not exist."""
    state = run(lively_state(), 3)
    prune_state(state, CONFIG, PruneConfig(method="magnitude", keep=0.5))
    masks = state.extra_parts[MASKS_PART]
    gradients: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        gradients.update({n: p.grad.clone() for n, p in state.network.named_parameters() if p.grad is not None})

    rows: list[dict[str, Any]] = []
    config = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"grad_clip": None})})
    state.optimizer.register_step_pre_hook(keep)
    train(state, tiny_batches(config), config, [lambda _, row: rows.append(row)], accelerator=cpu(), until=4)
    for name, mask in masks.items():
        assert not gradients[name][~mask].any(), name
    assert any(gradients[name][masks[name]].any() for name in masks)
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
    assert rows[0]["train/grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_a_momentum_that_should_not_be_there_revives_nothing() -> None:
    state = run(lively_state(), 3)
    prune_state(state, CONFIG, PruneConfig(method="magnitude", keep=0.5))
    masks = {name: mask.clone() for name, mask in state.extra_parts[MASKS_PART].items()}
    for moments in state.optimizer.state.values():
        moments["exp_avg"].fill_(1.0)
    run(state, 5)
    assert_held(state, masks, 0.5)


def test_attaching_prunes_the_moments_too() -> None:
    state = run(lively_state(), 3)
    masks = global_magnitude(maskable(state.network), None, 0.5)
    attach_masks(state, masks)
    parameters = dict(state.network.named_parameters())
    for name, mask in masks.items():
        moments = state.optimizer.state[parameters[name]]
        assert moments["step"] == 3
        for key in ("exp_avg", "exp_avg_sq"):
            assert not moments[key][~mask].any()
    assert any(state.optimizer.state[parameters[name]]["exp_avg"].any() for name in masks)


def test_masks_that_were_attached_give_way_to_others() -> None:
    state = run(lively_state(), 3)
    for fraction in (0.3, 0.6):
        masks = global_magnitude(maskable(state.network), None, fraction)
        attach_masks(state, masks)
        run(state, state.step + 3)
    assert_held(state, masks, 0.6)
    parameters = dict(state.network.named_parameters())
    assert all(len(parameters[name]._backward_hooks or {}) == 1 for name in masks)
    assert len(state.optimizer._optimizer_step_post_hooks) == 1


@pytest.mark.parametrize("change", ["shape", "missing", "additional"])
def test_masks_of_another_network_are_refused(change: str) -> None:
    state = lively_state()
    masks = global_magnitude(maskable(state.network), None, 0.5)
    if change == "shape":
        masks["conv_in.weight"] = masks["conv_in.weight"][:, :, :1]
    elif change == "missing":
        del masks["conv_in.weight"]
    else:
        masks["norm_out.weight"] = torch.ones(8, dtype=torch.bool)
    before = state.network.conv_out.weight.clone()
    with pytest.raises(ValueError, match="not those of this network") as caught:
        attach_masks(state, masks)
    one_line(caught.value)
    assert torch.equal(before, state.network.conv_out.weight)


def round_trip(state: TrainState, folder: Path) -> TrainState:
    write_checkpoint(folder, state.step, metadata(state.network, CONFIG) | state.metadata(), state.parts())
    restored = TrainState.restore(read_checkpoint(folder), CONFIG.train, CONFIG.ema, torch.device("cpu"))
    resume_pruning(restored)
    return restored


def test_sparsity_is_exact_after_resuming(tmp_path: Path) -> None:
    fraction = 0.6
    state = run(lively_state(), 5)
    assert not is_pruned(state)
    assert not is_pruned(round_trip(state, tmp_path / "dense"))
    prune_state(state, CONFIG, PruneConfig(method="magnitude", keep=1 - fraction))
    run(state, 10)
    restored = round_trip(state, tmp_path / "pruned")
    assert is_pruned(restored)
    assert restored.extra_metadata == state.extra_metadata
    masks = restored.extra_parts[MASKS_PART]
    assert all(mask.dtype == torch.bool for mask in masks.values())
    assert_held(restored, masks, fraction)
    run(restored, 40)
    assert_held(restored, masks, fraction)
    run(state, 40)  # And it is the same training.
    for part, tensors in state.parts().items():
        assert all(torch.equal(tensor, restored.parts()[part][name]) for name, tensor in tensors.items())


def test_the_report_says_what_happened() -> None:
    state = run(lively_state(), 4)
    dense = count_cost(state.network)
    report = prune_state(state, CONFIG, PruneConfig(method="magnitude", keep=0.5))
    count = sum(weight.numel() for weight in maskable(state.network).values())
    assert (report.method, report.step) == ("magnitude", 4)
    assert report.before == dense
    assert dense.nonzero_params == dense.params
    assert report.after.params == dense.params  # Masked weights are still there,
    assert report.after.macs == dense.macs  # and still multiplied with.
    assert report.after.nonzero_params == dense.params - round(0.5 * count)
    assert state.extra_metadata["pruning"][-1]["after"]["nonzero_params"] == report.after.nonzero_params


# Where masks lie.


class Products(TorchDispatchMode):
    """Inside this context the pairs of tensors that are multiplied are noted."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._foreach_mul_.List:
            self.pairs += zip(*args, strict=True)
        elif function is torch.ops.aten.mul.Tensor and isinstance(args[1], Tensor) and args[0].shape == args[1].shape:
            self.pairs.append((args[0], args[1]))
        return function(*args, **(kwargs or {}))


def test_masks_lie_in_memory_as_their_weights() -> None:
    """Else no fused product is used; the weights of convolutions lie channels last."""
    state = lively_state()
    weights = maskable(state.network)
    assert any(not weight.is_contiguous() for weight in weights.values())
    with Products() as pruning:
        hold_masks(state, global_magnitude(weights, None, 0.5))
    with Products() as training:
        run(state, 1)
    assert len(pruning.pairs) >= 2 * len(weights)  # Of the network and its averages.
    for products in (pruning, training):
        held = [(one, two) for one, two in products.pairs if one.shape in {w.shape for w in weights.values()}]
        assert len(held) >= 2 * len(weights)
        assert all(one.stride() == two.stride() and one.dtype == two.dtype for one, two in held)


def test_masks_of_a_checkpoint_move_to_the_network() -> None:
    """Which lies on a GPU."""
    read = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in maskable(tiny_network(CONFIG)).items()}
    with fake_tensors():
        with CUDA:
            network = build_network(CONFIG, NUM_CLASSES)
        record = {"method": "magnitude"}
        masks = {name: torch.empty(mask.shape, dtype=torch.bool, device="cpu") for name, mask in read.items()}
        apply_masks(network, masks)
        inherited = state_of(network)
        inherit(inherited, [record], masks)
        resumed = state_of(network)
        resumed.extra_parts[MASKS_PART] = masks
        resume_pruning(resumed)
        for state in (inherited, resumed):
            held = held_masks(state)
            assert held is not None
            assert {mask.device for mask in held.values()} == {CUDA}
            assert {mask.dtype for mask in held.values()} == {torch.bool}


def state_of(network: UNet) -> TrainState:
    return TrainState(network, Ema(network, CONFIG.ema), build_optimizer(network, CONFIG.train))
