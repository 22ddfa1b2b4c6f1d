"""What training takes in memory, and the largest batch that fits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_config, tiny_network
from torch import nn

from diffusion_core.machine.sharing import SHARERS
from diffusion_core.training.batch_size import SHARE, TrainingMemory, free_memory, kept_for_backward, training_memory

CPU = torch.device("cpu")


class OneLayer(nn.Module):
    """Keeps its input (for the weight's gradient), and the sigmoid's output, and nothing else."""

    input_channels, image_size = 3, 8

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)

    def forward(self, x_BCHW: torch.Tensor, _t_B: torch.Tensor) -> torch.Tensor:
        return self.conv(x_BCHW).sigmoid()


def test_what_one_layer_keeps_is_known() -> None:
    kept = kept_for_backward(OneLayer(), tiny_config().train, 7, CPU)  # type: ignore[arg-type]
    assert kept == 7 * 8 * 8 * (3 + 5) * 4


def test_memory_grows_by_the_image() -> None:
    config = tiny_config()
    network = tiny_network(config)
    memory = training_memory(network, config)
    ten, twenty = (kept_for_backward(network, config.train, batch, CPU) for batch in (10, 20))
    assert twenty - ten == pytest.approx(10 * memory.per_image, rel=0.01)
    weights = 4 * sum(parameter.numel() for parameter in network.parameters())
    assert memory.fixed == 5 * weights, "weights, gradients, two moments and an average"
    more = tiny_config(ema__power_widths=[0.1], ema__average_from=1)
    assert training_memory(network, more).fixed == 11 * weights, "two more averages, each in float64 and as a network"
    assert not network.training


def test_half_precision_takes_less() -> None:
    network = tiny_network()
    full, half = (training_memory(network, tiny_config(train__precision=name)) for name in ("fp32", "bf16"))
    assert 0.4 * full.per_image < half.per_image < 0.9 * full.per_image


@given(
    fixed=st.integers(0, 10**12),
    per_image=st.integers(1, 10**9),
    free=st.integers(0, 10**13),
    limit=st.integers(1, 10**5),
)
def test_the_largest_batch_is_the_largest(fixed: int, per_image: int, free: int, limit: int) -> None:
    memory = TrainingMemory(fixed, per_image)
    batch = memory.largest_batch(free, limit)
    fitting = [1] + [2**k for k in range(1, 18) if 2**k <= limit and fixed + 2**k * per_image <= free]
    assert batch == max(fitting)


def test_trials_that_share_a_device_get_equal_parts_whoever_plans_first(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, gib = torch.device("cuda"), 2**30
    for free, total, said, expected in (
        (80, 80, None, 80),
        (80, 80, "2", 40),
        (60, 80, "2", 40),
        (30, 80, "2", 30),
        (80, 80, "no number", 80),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free, total=total: (free * gib, total * gib))
        monkeypatch.delenv(SHARERS, raising=False)
        if said is not None:
            monkeypatch.setenv(SHARERS, said)
        assert free_memory(gpu) == int(SHARE * expected * gib)
