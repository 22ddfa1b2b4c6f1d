"""When networks are compiled, and that compiled ones compute the same; one slow test tries the compiler proper."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_network
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import cache_dir

from diffusion_core.cache import VARIABLE
from diffusion_core.config import SampleConfig, TrainConfig
from diffusion_core.model import compilation
from diffusion_core.model.compilation import (
    BACKWARD_COST,
    CACHE_VARIABLE,
    EAGER_FLOPS,
    LIMIT,
    break_even_seconds,
    compile_network,
    forward_flops,
    keep_compiled,
    pick_compilation,
    pick_sampling_compilation,
    raise_limit,
)
from diffusion_core.model.unet import ResidualBlock, UNet
from diffusion_core.sampling.generation import Generator, requests

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    """How many graphs were compiled since the test began."""
    return counters["stats"]["unique_graphs"]


def test_flops_of_a_network_are_those_of_its_products() -> None:
    network: Any = torch.nn.Conv2d(3, 8, 3, padding=1)
    network.image_size, network.input_channels = 16, 3
    network.forward = lambda x, t: torch.nn.functional.conv2d(x, network.weight, network.bias, padding=1)
    assert forward_flops(network) == 2 * 8 * 3 * 9 * 16 * 16


@pytest.mark.parametrize("what", ["training", "sampling"])
def test_auto_compiles_on_a_gpu_from_the_break_even_on(what: str) -> None:
    network = tiny_network()
    per_image = forward_flops(network) / EAGER_FLOPS
    if what == "training":
        count = int(break_even_seconds() / (per_image * 16 * (1.0 + BACKWARD_COST)))

        def pick(count: int, device: torch.device, wanted: str = "auto") -> str:
            config = TrainConfig.model_validate({"steps": count, "batch_size": 16, "compile": wanted})
            return pick_compilation(config, network, device)
    else:
        count = int(break_even_seconds() / (per_image * 10))

        def pick(count: int, device: torch.device, wanted: str = "auto") -> str:
            config = SampleConfig.model_validate({"steps": 10, "compile": wanted})
            return pick_sampling_compilation(config, network, device, count)

    assert pick(count - 1, GPU) == "none"
    assert pick(count + 1, GPU) == "network"
    assert pick(100 * count, CPU) == "none"
    assert pick(1, CPU, "network") == "network"
    assert pick(100 * count, GPU, "none") == "none"


def test_a_network_is_compiled_once_however_often_it_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    network = tiny_network()
    for _ in range(2):
        compile_network(network, "network")
        network(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    assert graphs() == 1


@pytest.mark.parametrize("name", ["recompile_limit", "cache_size_limit"])
def test_more_shapes_than_usual_may_be_compiled_whatever_torch_calls_that(name: str) -> None:
    settings = SimpleNamespace(**{name: 8})
    raise_limit(settings)
    assert vars(settings) == {name: LIMIT}
    setattr(settings, name, 2 * LIMIT)
    raise_limit(settings)
    assert vars(settings) == {name: 2 * LIMIT}


def test_the_compiler_follows_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """More sizes of batches than it would compile by itself."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    network = tiny_network()
    compile_network(network, "blocks")
    block = next(module for module in network.modules() if isinstance(module, ResidualBlock))
    sizes = range(1, 12)
    for batch in sizes:
        block(torch.zeros(batch, block.conv1.in_channels, 8, 8), torch.zeros(batch, block.embed.in_features))
    assert graphs() == len(sizes)


@pytest.mark.parametrize("how", ["network", "blocks", "sampling"])
def test_compiled_code_is_kept_in_the_cache(how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "own"))
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    network = tiny_network()
    compile_network(network, "none")
    assert CACHE_VARIABLE not in os.environ
    if how == "sampling":
        compilation.compiled(network)
    else:
        compile_network(network, how)
    folder = Path(os.environ[CACHE_VARIABLE])
    assert folder.is_relative_to(tmp_path / "own")
    assert Path(cache_dir()) == folder  # PyTorch takes it.
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "chosen"))
    compile_network(tiny_network(), "network")
    assert os.environ[CACHE_VARIABLE] == str(tmp_path / "chosen")


def test_a_cache_that_cannot_be_written_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    keep_compiled()
    assert CACHE_VARIABLE not in os.environ


def draw(network: UNet, how: str, count: int) -> torch.Tensor:
    config = tiny_config(sample__compile=how, sample__batch_size=8, sample__steps=3, sample__guidance=2.0)
    return Generator(network, config, "fp32").images(requests(range(count), 2), config.sample, 0)


def test_full_batches_are_drawn_by_the_compiled_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    network = tiny_network()
    plain = draw(network, "none", 9)
    assert graphs() == 0
    assert torch.equal(draw(network, "network", 3), plain[:6])  # Less than a batch.
    assert graphs() == 0
    assert torch.equal(draw(network, "network", 9), plain)  # Two batches and a smaller one.
    assert graphs() == 1
    assert torch.equal(draw(network, "network", 9), plain)
    assert graphs() == 1  # At the next evaluation it is there already.
    network(torch.zeros(3, 1, 8, 8), torch.zeros(3, dtype=torch.long))
    assert graphs() == 1  # The network itself is not compiled.


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_the_compiler_proper_draws_the_same_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    network = tiny_network()
    images, plain = draw(network, "network", 8), draw(network, "none", 8)
    assert graphs() == 1
    assert (images.int() - plain.int()).abs().max() <= 1  # But for rounding.
    assert counters["inductor"]["fxgraph_cache_miss"] == 1
    torch._dynamo.reset()  # What the next process starts with.
    counters.clear()
    assert torch.equal(draw(network, "network", 8), images)
    assert (counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]) == (1, 0)


def test_the_compilers_advice_to_use_tf32_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compilation.CACHE_VARIABLE, "anywhere")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        compilation.prepare_compiler()
        warnings.warn("TensorFloat32 tensor cores for float32 matrix multiplication available", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(one.message) for one in shown] == ["something else"]
