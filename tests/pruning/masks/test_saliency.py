"""SNIP and SynFlow, against brute force: what the loss, or the flow, loses with each connection."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import NUM_CLASSES, digits, lively, tiny_config, tiny_network
from torch import Tensor, nn

from diffusion_core.config import CoreConfig, build
from diffusion_core.config.presets import PRESETS
from diffusion_core.model.structure import maskable
from diffusion_core.model.unet import UNet, build_network
from pruning.blocks import is_conditioning
from pruning.calibration import Calibration
from pruning.config import PruneConfig, unheard
from pruning.masks.build import choose_masks
from pruning.masks.mask import apply_masks, empty_layers, masked, sparsity
from pruning.masks.saliency import snip_scores, stand_in, synflow_masks, synflow_scores
from pruning.registries import MASK_STRATEGIES
from pruning.training import warn_of_empty_layers

CONFIG = tiny_config(
    model__channels=4, model__channel_multipliers=[1], model__norm_groups=2, model__attention_resolutions=[8]
)


def calibration(config: CoreConfig) -> Calibration:
    return Calibration.of(digits().train, config, torch.device("cpu"))


def some(weights: dict[str, Tensor]) -> list[tuple[str, int]]:
    """A weight of every layer, and the last one."""
    return [(name, i) for name, weight in weights.items() for i in {weight.numel() // 2, weight.numel() - 1}]


def test_snip_is_how_much_the_loss_feels_a_connection() -> None:
    """The derivative by a gate on each connection (Lee et al. 2019, eq. 3), by finite differences in float64."""
    network = tiny_network(CONFIG).double()
    sample = calibration(CONFIG)

    @torch.no_grad()
    def loss() -> float:
        """Of two batches, in float64 throughout."""
        total = 0.0
        for index in range(2):
            drawn = sample.draws(index, network)
            x_BCHW = sample._denoiser(network).schedule.add_noise(drawn.x0_BCHW, drawn.noise_BCHW, drawn.t_B).double()
            labels_B = drawn.labels_B
            total += float((network(x_BCHW, drawn.t_B, labels_B) - drawn.noise_BCHW).square().mean())
        return total

    weights = maskable(network)
    single = tiny_network(CONFIG)
    scores = snip_scores(maskable(single), sample.gradients(single, 2))
    assert scores.keys() == weights.keys()
    scale = max(float(score.max()) for score in scores.values())
    for name, i in some(weights):
        flat = weights[name].view(-1)
        before, losses = flat[i].clone(), []
        for gate in (1.0 - 1e-4, 1.0 + 1e-4):
            flat[i] = before * gate
            losses.append(loss())
        flat[i] = before
        expected = abs(losses[1] - losses[0]) / 2e-4
        assert float(scores[name].view(-1)[i]) == pytest.approx(expected, rel=1e-2, abs=1e-5 * scale), name


def test_the_flow_through_a_weight_is_what_is_lost_without_it() -> None:
    """R is linear in each weight, so a score is R minus R with that weight at zero.

    Of the image alone, or of what the timestep adds to it.
    """
    network = tiny_network(CONFIG)
    scores = synflow_scores(network)

    def totals(net: UNet) -> tuple[float, float]:
        """R from the scores: paths of the image all leave through conv_out, those of time enter through its network."""
        found = synflow_scores(net)
        return float(found["conv_out.weight"].sum()), float(found["time_mlp.0.weight"].sum())

    weights = maskable(network)
    before_any = totals(network)
    for name, i in some(weights):
        flat = weights[name].view(-1)
        before = flat[i].clone()
        flat[i] = 0.0
        way = int(is_conditioning(name))
        whole = before_any[way]
        expected = whole - totals(network)[way]
        flat[i] = before
        assert float(scores[name].view(-1)[i]) == pytest.approx(expected, rel=1e-6, abs=1e-9 * whole), name


def test_flow_is_conserved_and_passes_no_layer_that_is_zero() -> None:
    """With the skips as the only way through, what flows into the network flows out of it."""
    network = tiny_network(CONFIG)
    with torch.no_grad():
        for name, weight in maskable(network).items():
            if name.split(".")[0] not in ("conv_in", "conv_out") and not name.endswith("skip.weight"):
                weight.zero_()
    scores = synflow_scores(network)
    flows = {name: float(score.sum()) for name, score in scores.items()}
    assert flows["conv_in.weight"] == pytest.approx(flows["conv_out.weight"])  # Conserved from layer to layer.
    assert all(flow == 0.0 for name, flow in flows.items() if "conv1" in name or "query" in name)


def test_networks_at_initialisation_are_ranked_by_stand_ins_for_layers_that_start_at_zero() -> None:
    network = build_network(CONFIG, NUM_CLASSES)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    ready = stand_in(network, 0)
    zero = [name for name, weight in maskable(network).items() if not weight.any()]
    assert "conv_out.weight" in zero
    assert len(zero) > 3
    for name, weight in maskable(ready).items():
        assert weight.any()
        assert (name in zero) or torch.equal(weight, before[name])
    for method in ("snip", "synflow"):
        masks = choose_masks(
            network, None, CONFIG.seed, PruneConfig(method=method, keep=0.2, calibration_batches=2), calibration(CONFIG)
        )
        count = sum(mask.numel() for mask in masks.values())
        assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.8 * count)
        assert "conv_out" not in empty_layers(masks)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_snip_does_not_depend_on_dropout() -> None:
    """Whatever the process drew before, the masks are the same, and the network stays in training mode."""
    network = build_network(tiny_config(model__dropout=0.5), NUM_CLASSES).train()
    prune, sample = PruneConfig(method="snip", keep=0.2, calibration_batches=1), calibration(tiny_config())
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(choose_masks(network, None, 0, prune, sample))
    without = choose_masks(copy.deepcopy(network).eval(), None, 0, prune, sample)
    for name, mask in without.items():
        assert torch.equal(found[0][name], mask)
        assert torch.equal(found[1][name], mask)
    assert network.training


def test_time_and_label_do_not_change_the_flow_of_the_image() -> None:
    """However wide their paths are."""
    network = tiny_network(CONFIG)
    before = synflow_scores(network)
    with torch.no_grad():
        for name, weight in maskable(network).items():
            if is_conditioning(name):
                weight.mul_(1000.0)
    after = synflow_scores(network)
    for name, score in before.items():
        if is_conditioning(name):
            assert float(after[name].sum()) > 100.0 * float(score.sum()) > 0.0
        else:
            assert torch.equal(after[name], score), name


PRESET_NETWORKS = {
    "digits": build(CoreConfig, PRESETS["digits"]),
    "digits, scale and shift": build(CoreConfig, PRESETS["digits"] | {"model.conditioning": "scale_shift"}),
    # The layers of the CIFAR-10 network, an eighth as wide, at 8 x 8 pixels.
    "cifar10": build(
        CoreConfig,
        {"model.channels": 16, "model.norm_groups": 4, "data.image_size": 8, "model.attention_resolutions": [4]},
    ),
}


@pytest.mark.parametrize(("name", "keep"), list(zip(PRESET_NETWORKS, [0.5, 0.05, 0.05], strict=True)))
def test_synflow_leaves_weights_in_every_layer(name: str, keep: float) -> None:
    """Tanaka et al. 2020: no layer collapses. The image enters through the first layer, and leaves through the last."""
    network = stand_in(build_network(PRESET_NETWORKS[name], NUM_CLASSES), 0)
    masks = synflow_masks(network, None, 1.0 - keep, iterations=5)
    left = {layer: int(mask.sum()) / mask.numel() for layer, mask in masks.items()}
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == total - round((1.0 - keep) * total)
    assert min(left.values()) >= 0.1 * keep
    assert min(left["conv_in.weight"], left["conv_out.weight"]) > 0.7
    assert all(share == pytest.approx(keep, abs=0.01) for layer, share in left.items() if is_conditioning(layer))
    apply_masks(network, masks)
    assert all(float(score.sum()) > 0.0 for score in synflow_scores(network).values())


def test_the_remedy_for_empty_layers_is_one_that_the_method_takes(capsys: pytest.CaptureFixture[str]) -> None:
    for method in MASK_STRATEGIES:
        warn_of_empty_layers(["conv_in"], method)
        advised = "prune.scope=layer" in capsys.readouterr().err
        refused = list(unheard(PruneConfig(method=method, scope="layer")))
        assert advised != bool(refused), method


def test_synflow_in_many_steps_keeps_more_flow_than_in_one() -> None:
    network = lively(build_network(CONFIG, NUM_CLASSES))
    at_once, slowly = (synflow_masks(network, None, 0.9, iterations=count) for count in (1, 40))
    assert sparsity(at_once) == sparsity(slowly) == pytest.approx(0.9, abs=1e-3)

    def flow(masks: dict[str, Tensor]) -> float:
        with masked(network, masks):
            return float(synflow_scores(network)["conv_out.weight"].sum())

    assert flow(slowly) > 1.1 * flow(at_once) > 0.0
    again = synflow_masks(network, slowly, 0.95, iterations=5)
    assert all(not (again[name] & ~slowly[name]).any() for name in slowly)


def test_saliency_leaves_modules_as_they_were() -> None:
    network = tiny_network(CONFIG)
    x_BCHW = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t_B = torch.tensor([3, 20])
    with torch.no_grad():
        before = network(x_BCHW, t_B)
        synflow_scores(network)
        assert torch.equal(network(x_BCHW, t_B), before)
    assert not any(isinstance(module, nn.Module) and module._forward_pre_hooks for module in network.modules())
