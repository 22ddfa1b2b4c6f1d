"""The network: against diffusers' implementation of the same paper, the published sizes, and what labels may do."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import UNet2DModel
from tiny import NUM_CLASSES, lively, tiny_config, tiny_network
from torch import nn

from diffusion_core.config import CoreConfig, ModelConfig
from diffusion_core.diffusers_io import diffusers_name
from diffusion_core.model.cost import count_cost
from diffusion_core.model.timesteps import sinusoidal_embedding
from diffusion_core.model.unet import NO_LABEL, UNet, build_network

PUBLISHED_PARAMS = 35_746_307
"""google/ddpm-cifar10-32; Ho et al. 2020 say 35.7 M."""

PUBLISHED_MACS = 6.06e9
"""Fang et al. 2023 (Diff-Pruning), table 1."""


def diffusers_network(width: int) -> UNet2DModel:
    """The architecture of google/ddpm-cifar10-32, at a width of choice."""
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(width, 2 * width, 2 * width, 2 * width),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_eps=1e-6,
        norm_num_groups=32,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        act_fn="silu",
    )


def test_equals_diffusers() -> None:
    """At a small width; tests/diffusion_core/diffusers_io/test_convert_diffusers.py compares the published one."""
    width = 32
    ours = UNet(ModelConfig(channels=width), 32, 3, 0)
    lively(ours).eval()
    theirs = diffusers_network(width).eval()
    theirs.load_state_dict({diffusers_name(name): tensor for name, tensor in ours.state_dict().items()}, strict=True)

    source = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 32, 32, generator=source)
    t = torch.tensor([0, 999, 1, 500])
    with torch.no_grad():
        expected, found = theirs(x, t).sample, ours(x, t)
    assert expected.std() > 0.1  # Neither is trivially zero.
    assert (expected - found).abs().max() < 1e-5


def test_cifar10_preset_has_the_published_size_and_cost() -> None:
    config = CoreConfig(model=ModelConfig(class_conditional=False))
    network = build_network(config, NUM_CLASSES)
    assert sum(parameter.numel() for parameter in network.parameters()) == PUBLISHED_PARAMS
    cost = count_cost(network)
    assert cost.params == PUBLISHED_PARAMS
    assert abs(cost.macs - PUBLISHED_MACS) < 0.005e9


def test_labels_cost_one_embedding_row_a_class_and_one_for_none() -> None:
    with torch.device("meta"):
        conditional = UNet(ModelConfig(), 32, 3, 10)
    assert sum(p.numel() for p in conditional.parameters()) == PUBLISHED_PARAMS + 11 * 512


def test_time_embedding_is_the_formula_of_the_paper() -> None:
    width, half = 10, 5
    found = sinusoidal_embedding(torch.tensor([0, 3, 999]), width)
    for row, t in zip(found, (0, 3, 999), strict=True):
        frequencies = [10_000 ** (-i / (half - 1)) for i in range(half)]
        expected = [math.sin(t * f) for f in frequencies] + [math.cos(t * f) for f in frequencies]
        torch.testing.assert_close(row, torch.tensor(expected), atol=1e-4, rtol=0)
    assert sinusoidal_embedding(torch.tensor([1]), 7).shape == (1, 7)


def inputs(size: int = 8, channels: int = 1, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(5)
    return torch.randn(batch, channels, size, size, generator=source), torch.tensor([0, 20, 49])[:batch]


@torch.no_grad()
def test_labels_enter() -> None:
    network = tiny_network()
    x, t = inputs()
    answers = [network(x, t, torch.full((3,), label)) for label in (NO_LABEL, *range(NUM_CLASSES))]
    for i, one in enumerate(answers):
        for other in answers[:i]:
            assert ((one - other).abs().amax(dim=(1, 2, 3)) > 1e-3).all()


@torch.no_grad()
def test_the_label_of_an_image_concerns_that_image_alone() -> None:
    network = tiny_network()
    x, t = inputs()
    one, other = network(x, t, torch.tensor([1, 2, 3])), network(x, t, torch.tensor([1, 7, 3]))
    assert torch.equal(one[[0, 2]], other[[0, 2]])
    assert not torch.allclose(one[1], other[1])


@torch.no_grad()
def test_no_label_and_none_agree_and_have_an_embedding_of_their_own() -> None:
    network = tiny_network()
    x, t = inputs()
    without = network(x, t, None)
    assert torch.equal(without, network(x, t, torch.full((3,), NO_LABEL)))
    # Every real class is overwritten: an answer without a label must not notice.
    assert network.label_embedding is not None
    network.label_embedding.weight[:NUM_CLASSES] += 1.0
    assert torch.equal(without, network(x, t))
    network.label_embedding.weight[NUM_CLASSES] += 1.0
    assert not torch.allclose(without, network(x, t))


@torch.no_grad()
def test_a_network_without_labels_ignores_them() -> None:
    config = tiny_config(model__class_conditional=False)
    network = tiny_network(config)
    assert network.label_embedding is None
    assert network.num_classes == 0
    x, t = inputs()
    assert torch.equal(network(x, t), network(x, t, torch.tensor([1, 2, 3])))


@torch.no_grad()
def test_the_timestep_enters() -> None:
    network = tiny_network()
    x, _ = inputs()
    x = x[:1].repeat(3, 1, 1, 1)
    answers = network(x, torch.tensor([0, 1, 49]))
    assert (answers[0] - answers[1]).abs().max() > 1e-4
    assert (answers[1] - answers[2]).abs().max() > 1e-4


@torch.no_grad()
def test_dropout_acts_in_training_alone() -> None:
    network = tiny_network(tiny_config(model__dropout=0.5))
    x, t = inputs()
    assert torch.equal(network(x, t), network(x, t))
    assert torch.equal(network(x, t), tiny_network(tiny_config(model__dropout=0.0))(x, t))
    network.train()
    assert not torch.allclose(network(x, t), network(x, t))


@pytest.mark.parametrize(
    ("size", "channels", "multipliers", "attention", "heads", "blocks"),
    [
        (8, 1, [1, 2], [4], 1, 1),
        (8, 1, [1], [8], 2, 1),
        (28, 1, [1, 2, 2], [7], 4, 1),
        (28, 1, [2, 1, 3], [28, 7], 2, 2),
        (32, 3, [1, 3, 2, 4], [16, 4], 2, 1),
        (32, 3, [1, 2], [], 1, 3),
        (6, 3, [3, 5], [3], 1, 1),
    ],
)
def test_shapes_and_gradients(
    size: int, channels: int, multipliers: list[int | float], attention: list[int], heads: int, blocks: int
) -> None:
    model = ModelConfig(
        channels=8,
        channel_multipliers=multipliers,
        attention_resolutions=attention,
        num_heads=heads,
        num_res_blocks=blocks,
        norm_groups=4,
        dropout=0.0,
    )
    network = lively(UNet(model, size, channels, 5))
    x, t = inputs(size, channels)
    answer = network(x, t, torch.tensor([0, 4, NO_LABEL]))
    assert answer.shape == x.shape
    answer.square().mean().backward()
    for name, parameter in network.named_parameters():
        # A key's bias shifts all scores of a query alike, which softmax takes out again.
        if not name.endswith("key.bias"):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, f"{name} does nothing"


@torch.no_grad()
def test_heads_split_attention() -> None:
    x, t = inputs()
    one, two = (tiny_network(tiny_config(model__num_heads=heads)) for heads in (1, 2))
    assert not torch.allclose(one(x, t), two(x, t))  # Same weights, other computation.


def test_attention_stands_where_it_is_asked_for() -> None:
    def places(attention: list[int]) -> list[int]:
        network = build_network(tiny_config(model__attention_resolutions=attention), NUM_CLASSES)
        return [len(level.attentions) for level in [*network.down, *network.up]]

    assert places([]) == [0, 0, 0, 0]
    assert places([4]) == [0, 1, 2, 0]
    assert places([8]) == [1, 0, 0, 2]
    assert places([8, 4]) == [1, 1, 2, 2]


@torch.no_grad()
def test_initialisation_is_that_of_the_paper() -> None:
    network = build_network(tiny_config(), NUM_CLASSES)
    x, t = inputs()
    assert torch.equal(network(x, t), torch.zeros_like(x))  # The last convolution starts at zero.
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.bias is not None
            assert not module.bias.any()
            if name.endswith(("conv2", ".out", "conv_out")):
                assert not module.weight.any(), name
            else:
                fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(module.weight)
                bound = math.sqrt(6 / (fan_in + fan_out))
                assert 0.8 * bound < module.weight.abs().max() <= bound, name


def test_weights_depend_on_the_seed_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        return torch.cat(
            [p.detach().flatten() for p in build_network(tiny_config(seed=seed), NUM_CLASSES).parameters()]
        )

    first = weights(0)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(first, weights(0))
    assert torch.equal(state, torch.get_rng_state())  # Nor does building one disturb anybody else's draws.
    assert not torch.equal(first, weights(1))
