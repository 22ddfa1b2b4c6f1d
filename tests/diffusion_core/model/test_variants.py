"""The kinds of network that knobs make: each answers, learns, is pruned, survives the disk and draws images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import NUM_CLASSES, assert_same_tensors, cpu, lively, metadata, tiny_batches, tiny_config, tiny_network
from torch import Tensor

from diffusion_core.checkpoint import read_checkpoint, write_checkpoint
from diffusion_core.config import CoreConfig, ModelConfig
from diffusion_core.model.cost import count_cost
from diffusion_core.model.unet import ResidualBlock, build_network
from diffusion_core.sampling.generation import Generator, all_labels, requests
from diffusion_core.training.trainer import TrainState, train
from pruning.channels.removal import prune_channels
from pruning.config import PruneConfig

VARIANTS: dict[str, dict[str, Any]] = {
    "scale_shift": {"model__conditioning": "scale_shift"},
    "unconditional": {"model__class_conditional": False},
    "self_conditioned": {"model__self_conditioning": True},
    "learned_variance": {"model__learned_variance": True, "sample__sampler": "ddpm", "sample__variance": "learned"},
    "edm": {"diffusion__schedule": "karras", "diffusion__prediction": "edm", "diffusion__weighting": "edm"},
    "all": {
        "model__conditioning": "scale_shift",
        "model__class_conditional": False,
        "model__self_conditioning": True,
        "model__learned_variance": True,
        "diffusion__prediction": "v",
        "diffusion__zero_terminal_snr": True,
        "diffusion__timestep_sampling": "lognormal",
        "diffusion__offset_noise": 0.1,
        "sample__sampler": "ddpm",
        "sample__variance": "learned",
        "sample__spacing": "trailing",
    },
}


def settings(name: str) -> CoreConfig:
    return tiny_config(model__channels=16, train__steps=3, **VARIANTS[name])


def asked(config: CoreConfig) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    channels = 2 if config.model.self_conditioning else 1
    return torch.randn(3, channels, 8, 8, generator=source), torch.tensor([0, 20, 49]), torch.tensor([1, 5, -1])


@pytest.mark.parametrize("name", VARIANTS)
def test_it_answers_and_every_weight_has_a_say(name: str) -> None:
    config = settings(name)
    network = tiny_network(config)
    x, t, labels = asked(config)
    assert network.input_channels == x.shape[1]
    assert (network.in_channels, network.image_size) == (1, 8)
    answer = network(x, t, labels)
    assert answer.shape == (3, 2 if config.model.learned_variance else 1, 8, 8)
    answer.square().mean().backward()
    for parameter_name, parameter in network.named_parameters():
        if not parameter_name.endswith("key.bias"):  # Which softmax takes out again.
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.abs().max() > 0, f"{parameter_name} does nothing"
    with torch.no_grad():
        for channel in range(x.shape[1]):
            other = x.clone()
            other[:, channel] += 0.5
            assert (network(other, t, labels) - answer).abs().max() > 1e-3


@pytest.mark.parametrize("name", VARIANTS)
def test_it_learns_is_pruned_survives_the_disk_and_draws(name: str, tmp_path: Path) -> None:
    config = settings(name)
    dense = TrainState.start(lively(build_network(config, NUM_CLASSES)), config.train, config.ema)
    before = [parameter.detach().clone() for parameter in dense.network.parameters()]
    train(dense, tiny_batches(config), config, accelerator=cpu())
    assert all(torch.isfinite(parameter).all() for parameter in dense.network.parameters())
    moved = [not torch.equal(old, new) for old, new in zip(before, dense.network.parameters(), strict=True)]
    assert sum(moved) >= len(moved) - 3

    for state in (
        dense,
        TrainState.start(prune_channels(dense.network, PruneConfig(keep=0.3))[0], config.train, config.ema, step=3),
    ):
        if state is not dense:
            train(state, tiny_batches(config), config, accelerator=cpu(), until=5)
            ratio = count_cost(state.network).params / count_cost(dense.network).params
            assert ratio == pytest.approx(0.3, abs=0.04)
            assert state.network.in_channels == 1
        folder = tmp_path / f"{state.step}"
        write_checkpoint(folder, state.step, metadata(state.network, config) | state.metadata(), state.parts())
        checkpoint = read_checkpoint(folder)
        assert checkpoint.config() == config
        loaded = checkpoint.network("ema")
        assert_same_tensors(dict(loaded.state_dict()), dict(state.ema.network.state_dict()))
        restored = TrainState.restore(checkpoint, config.train, config.ema, torch.device("cpu"))
        for part, tensors in state.parts().items():
            assert_same_tensors(tensors, restored.parts()[part])

        images = Generator(loaded, config, "fp32").images(requests(all_labels(loaded), 1), config.sample, 0)
        assert images.shape == (len(all_labels(loaded)), 1, 8, 8)
        assert torch.equal(
            images,
            Generator(state.ema.network, config, "fp32").images(requests(all_labels(loaded), 1), config.sample, 0),
        )


@torch.no_grad()
def test_scale_shift_is_the_formula_of_the_paper() -> None:
    """Dhariwal & Nichol 2021, section 3.1: AdaGN(h, y) = y_s GroupNorm(h) + y_b, here with y_s = 1 + scale."""
    block = lively(ResidualBlock(8, 8, 12, ModelConfig(conditioning="scale_shift", norm_groups=4, dropout=0.0))).eval()
    source = torch.Generator().manual_seed(0)
    x, embedding = torch.randn(2, 8, 4, 4, generator=source), torch.randn(2, 12, generator=source)
    silu = torch.nn.functional.silu
    h = block.norm2(block.conv1(silu(block.norm1(x))))
    h = h * (1 + block.embed_scale(embedding)[..., None, None]) + block.embed(embedding)[..., None, None]
    torch.testing.assert_close(block(x, embedding), x + block.conv2(silu(h)))


def test_bias_has_no_scale() -> None:
    assert ResidualBlock(8, 8, 12, ModelConfig(norm_groups=4)).embed_scale is None
