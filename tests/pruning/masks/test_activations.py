"""Wanda, against the formula of the paper on patches that are cut out one by one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tiny import digits, tiny_config, tiny_network
from torch import Tensor, nn

from diffusion_core.model.structure import maskable
from pruning.calibration import Calibration
from pruning.config import PruneConfig
from pruning.masks.build import choose_masks
from pruning.masks.mask import sparsity

CONFIG = tiny_config(train__batch_size=3)
BATCHES = 2


def calibration() -> Calibration:
    return Calibration.of(digits().train, CONFIG, torch.device("cpu"))


def rows(module: nn.Module, x: Tensor) -> Tensor:
    """X of a layer: what each application of its weights is multiplied with, one row each, in float64."""
    x = x.detach().double()
    if isinstance(module, nn.Linear):
        return x.flatten(0, -2)
    assert isinstance(module, nn.Conv2d)
    assert not isinstance(module.padding, str)
    size, step, pad = module.kernel_size[0], module.stride[0], module.padding[0]
    padded = F.pad(x, (pad,) * 4)
    ends = range(0, padded.shape[2] - size + 1, step)
    return torch.stack([one[:, i : i + size, j : j + size].flatten() for one in padded for i in ends for j in ends])


def inputs_of_layers() -> dict[str, Tensor]:
    """X of every layer, from noisy images made by the formula."""
    network, sample = tiny_network(CONFIG), calibration()
    seen: dict[str, list[Tensor]] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(
                lambda layer, given, _, name=name: seen.setdefault(f"{name}.weight", []).append(rows(layer, given[0]))
            )
    schedule = sample._denoiser(network).schedule
    for index in range(BATCHES):
        drawn = sample.draws(index, network)
        alpha, sigma = schedule.at(drawn.t_B, drawn.x0_BCHW)
        network(alpha * drawn.x0_BCHW + sigma * drawn.noise_BCHW, drawn.t_B, drawn.labels_B)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_each_output_keeps_the_weights_that_the_paper_keeps() -> None:
    """``metric = |W| * ||X||_2``, sorted within each output (Sun et al. 2023, algorithm 1)."""
    network = tiny_network(CONFIG)
    prune = PruneConfig(method="wanda", keep=0.5, calibration_batches=BATCHES)
    masks = choose_masks(network, None, 0, prune, calibration())
    weights, inputs = maskable(network), inputs_of_layers()
    assert masks.keys() == weights.keys() == inputs.keys()
    for name, weight in weights.items():
        metric = weight.flatten(1).double().abs() * inputs[name].norm(p=2, dim=0)
        for row, score in enumerate(metric):
            mask = masks[name][row].flatten()
            assert int(mask.sum()) in (len(score) // 2, (len(score) + 1) // 2), name
            if (~mask).any():
                assert float(score[mask].min()) >= float(score[~mask].max()) * (1 - 1e-6), (name, row)
    pure = {name: weight.abs() for name, weight in weights.items()}
    assert any(float(pure[name][masks[name]].min()) < float(pure[name][~masks[name]].max()) for name in masks)


def test_masks_are_exact_and_grow() -> None:
    network, masks = tiny_network(CONFIG), None
    total = sum(weight.numel() for weight in maskable(network).values())
    for keep in (0.73, 0.31, 0.05):
        prune = PruneConfig(method="wanda", keep=keep, calibration_batches=1)
        before, masks = masks, choose_masks(network, masks, 0, prune, calibration())
        assert sum(int((~mask).sum()) for mask in masks.values()) == round((1 - keep) * total)
        assert before is None or not any((masks[name] & ~before[name]).any() for name in masks)
        again = choose_masks(network, before, 0, prune, calibration())
        assert all(torch.equal(again[name], masks[name]) for name in masks)
    assert masks is not None
    assert sparsity(masks) > 0.94
