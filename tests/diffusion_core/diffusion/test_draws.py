"""What is random in a training step: the timesteps of EDM, offset noise, and the share that each process takes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import tiny_batches, tiny_config

from diffusion_core.config import CoreConfig
from diffusion_core.diffusion.draws import Draws, draw
from diffusion_core.diffusion.schedule import build_schedule

FIELDS = ("x0_BCHW", "noise_BCHW", "t_B", "labels_B", "shown_B", "given_BCHW")


def drawn(config: CoreConfig, step: int = 3, **place: Any) -> Draws:
    return draw(step, tiny_batches(config, **place), config, build_schedule(config.diffusion))


EVERYTHING = {
    "diffusion__timestep_sampling": "lognormal",
    "diffusion__offset_noise": 0.3,
    "model__self_conditioning": True,
    "train__label_dropout": 0.5,
    "upsample__factor": 2,
}


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_draw_what_one_alone_would(settings: dict[str, Any], processes: int) -> None:
    config = tiny_config(train__batch_size=16, **settings)
    alone = drawn(config)
    parts = [drawn(config, rank=rank, world_size=processes) for rank in range(processes)]
    for name in FIELDS:
        whole = getattr(alone, name)
        if whole is None:
            assert all(getattr(part, name) is None for part in parts)
        else:
            assert torch.equal(whole, torch.cat([getattr(part, name) for part in parts])), name
            assert len(whole) == 16


def test_a_step_is_a_function_of_seed_and_number() -> None:
    config = tiny_config(**EVERYTHING)
    for name in FIELDS:
        assert torch.equal(getattr(drawn(config), name), getattr(drawn(config), name))
    for other in (drawn(config, step=4), drawn(tiny_config(seed=1, **EVERYTHING))):
        assert not torch.equal(drawn(config).noise_BCHW, other.noise_BCHW)
        assert not torch.equal(drawn(config).t_B, other.t_B)


def test_chunks_are_the_draws_in_order() -> None:
    whole = drawn(tiny_config(**EVERYTHING))
    parts = list(whole.chunks(4))
    for name in FIELDS:
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_lognormal_timesteps_have_normal_logarithms_of_the_noise_level() -> None:
    """Karras et al. 2022, table 1: ln(sigma) ~ N(P_mean, P_std^2)."""
    config = tiny_config(
        diffusion__schedule="karras",
        diffusion__prediction="edm",
        diffusion__timestep_sampling="lognormal",
        diffusion__lognormal_mean=-0.7,
        diffusion__lognormal_std=0.9,
        train__batch_size=4000,
    )
    t = drawn(config).t_B
    assert t.dtype == torch.float32
    assert not torch.equal(t, t.round())
    alpha, sigma = build_schedule(config.diffusion).at(t, torch.zeros(1, 1))
    logs = (sigma / alpha).log()
    assert logs.mean().item() == pytest.approx(-0.7, abs=5 * 0.9 / math.sqrt(4000))
    assert logs.std().item() == pytest.approx(0.9, rel=5 / math.sqrt(8000))
    third = ((logs + 0.7) / 0.9).pow(3).mean()
    assert abs(third.item()) < 0.2


def test_lognormal_timesteps_are_whole_where_the_variance_is_learned() -> None:
    settings = {"diffusion__timestep_sampling": "lognormal", "train__batch_size": 500}
    between = drawn(tiny_config(**settings)).t_B
    whole = drawn(tiny_config(**settings, model__learned_variance=True)).t_B
    assert whole.dtype == torch.long
    assert torch.equal(whole, between.double().round().long())
    assert whole.min() >= 0
    assert whole.max() <= 49


def test_uniform_timesteps_are_whole() -> None:
    t = drawn(tiny_config(train__batch_size=1000)).t_B
    assert t.dtype == torch.long
    assert (t.min(), t.max()) == (0, 49)


def test_offset_noise_is_shared_by_the_pixels_of_a_channel() -> None:
    config = tiny_config(diffusion__offset_noise=0.5, train__batch_size=4000)
    plain = drawn(tiny_config(train__batch_size=4000))
    offset = drawn(config)
    added = offset.noise_BCHW - plain.noise_BCHW
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added), rtol=0, atol=1e-6)
    assert added[:, 0, 0, 0].std().item() == pytest.approx(0.5, rel=0.06)
    assert added[:, 0, 0, 0].mean().abs() < 0.04
    for name in ("x0_BCHW", "t_B", "labels_B"):  # Nothing else is drawn differently for it.
        assert torch.equal(getattr(plain, name), getattr(offset, name))
    assert not torch.equal(added[0], added[1])
