"""What an image costs: evaluations counted while a real network samples."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_network

from diffusion_core.evaluation import generated
from diffusion_core.evaluation.generated import costs_of_images, estimate_seconds
from diffusion_core.model.cost import count_cost
from diffusion_core.registries import SAMPLERS
from diffusion_core.sampling.cost import network_evaluations
from diffusion_core.sampling.generation import Generator, Request

SETTINGS: list[dict[str, Any]] = [
    {},
    {"sample__guidance": 3.0},
    {"sample__guidance": 0.0},
    {"sample__guidance": 3.0, "sample__guidance_interval": [0.1, 1.0]},
    {"sample__start_level": 3.0, "sample__guidance": 2.0},
]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_evaluations_are_those_of_sampling(sampler: str, settings: dict[str, Any]) -> None:
    config = tiny_config(sample__sampler=sampler, sample__steps=5, sample__spacing="trailing", **settings)
    network = tiny_network(config)
    seen: list[int] = []
    network.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    Generator(network, config, "fp32").batch([Request(3, 0), Request(5, 0)], config.sample, 0)
    assert network_evaluations(config.sample, config.diffusion, config.model) == sum(seen) / 2


@pytest.mark.parametrize(
    "changes",
    [{"model__learned_variance": True, "sample__sampler": "ddpm", "sample__variance": "learned"},
     {"model__self_conditioning": True, "sample__guidance": 2.0},
     {"model__class_conditional": False}],
)  # fmt: skip
def test_every_kind_of_network_is_counted(changes: dict[str, Any]) -> None:
    config = tiny_config(sample__steps=3, **changes)
    evaluations = network_evaluations(config.sample, config.diffusion, config.model)
    assert evaluations == (6 if config.sample.guidance != 1.0 else 3)


def test_the_costs_of_an_image() -> None:
    config = tiny_config(sample__sampler="heun", sample__steps=3, sample__guidance=2.0)
    network = tiny_network(config)
    found = costs_of_images(Generator(network, config, "fp32"), config.sample)
    assert found["sample/evaluations"] == 2 * network_evaluations(
        config.sample.model_copy(update={"guidance": 1.0}), config.diffusion, config.model
    )
    assert found["sample/macs"] == found["sample/evaluations"] * count_cost(network).macs
    assert 0.0 < found["sample/seconds"] < 10.0
    assert torch.is_grad_enabled()


INTERVAL = {"sample__guidance_interval": [0.1, 1.0]}
TIMED: list[dict[str, Any]] = [
    *SETTINGS,
    {"sample__guidance": 0.0, **INTERVAL},
    {"sample__guidance": 3.0, **INTERVAL, "sample__sampler": "heun"},
    {"sample__guidance": 3.0, "sample__guidance_interval": [1e-6, 1e-5]},
    {"sample__sampler": "consistency", "sample__steps": 2, "sample__start_level": 10.0},
]


@pytest.mark.parametrize("autoguidance", [False, True])
@pytest.mark.parametrize("settings", TIMED)
def test_seconds_count_what_sampling_evaluates(
    settings: dict[str, Any], autoguidance: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only networks move: by a second an image, and a quarter in the weaker model of autoguidance."""
    now = 0.0

    def moved(seconds: float) -> Any:
        def move(_module: Any, inputs: Any) -> None:
            nonlocal now
            now += seconds * len(inputs[0])

        return move

    config = tiny_config(**{"sample__sampler": "ddim", "sample__steps": 5, "sample__spacing": "trailing"} | settings)
    network, weaker = tiny_network(config), tiny_network(config)
    network.register_forward_pre_hook(moved(1.0))
    weaker.register_forward_pre_hook(moved(0.25))
    reference = Generator(weaker, config, "fp32") if autoguidance else None
    generator = Generator(network, config, "fp32", reference)
    generator.batch([Request(3, 0), Request(5, 0)], config.sample, 0)
    an_image, now = now / 2, 0.0
    monkeypatch.setattr(generated, "time", SimpleNamespace(perf_counter=lambda: now))
    assert costs_of_images(generator, config.sample)["sample/seconds"] == pytest.approx(an_image)
    assert estimate_seconds(generator, 20, config.sample, []) == pytest.approx(20 * an_image)
