"""``train.batch_size=auto``: the largest batch that fits, and the same one when the run is resumed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import TINY, cpu, digits, tiny_batches, tiny_state
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from agent.__main__ import main
from agent.config import TrialConfig, build_config
from diffusion_core.model import compilation
from diffusion_core.model.unet import UNet, build_network
from diffusion_core.training import batch_size
from diffusion_core.training.batch_size import fits, settled, training_memory
from diffusion_core.training.trainer import train

AUTO: dict[str, Any] = TINY | {"preset": "digits", "train.batch_size": "auto"}


def memory_for(config: TrialConfig, batch: int) -> int:
    memory = training_memory(build_network(config, 10), config)
    return memory.fixed + batch * memory.per_image


@pytest.mark.parametrize(("fitting", "expected"), [(1, 1), (2, 2), (63, 32), (64, 64), (10**6, 1024)])
def test_the_largest_power_of_two_that_fits(
    fitting: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build_config(AUTO)
    monkeypatch.setattr(batch_size, "free_memory", lambda _: memory_for(config, fitting))
    chosen = settled(config, cpu(), digits(), tmp_path)
    assert chosen.train.batch_size == expected, "at most the 1,437 training images"
    assert chosen.train.model_copy(update={"batch_size": "auto"}) == config.train


def test_a_batch_size_that_is_given_stays(tmp_path: Path) -> None:
    config = build_config(TINY)
    assert settled(config, cpu(), digits(), tmp_path) is config


def test_a_resumed_run_keeps_its_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Although by then more memory is free."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    words = [f"--{key}={value}" for key, value in AUTO.items()] + [f"--log.dir={tmp_path / 'run'}", "--train.steps=2"]
    monkeypatch.setattr(batch_size, "free_memory", lambda _: memory_for(build_config(AUTO), 16))
    assert main([*words, "--checkpoint.every=1"]) == 0
    assert "16 images per step fit into memory" in capsys.readouterr().err
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train.batch_size"] == 16
    monkeypatch.setattr(batch_size, "free_memory", lambda _: 10**12)
    assert main([*words, "--checkpoint.every=1"]) == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train.batch_size"] == 16


def test_the_rounds_of_a_lottery_keep_their_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    knobs = AUTO | {"prune.method": "lottery", "train.steps": 2, "eval.classifier": "none"}
    words = [f"--{key}={value}" for key, value in knobs.items()] + [f"--log.dir={tmp_path / 'run'}"]
    monkeypatch.setattr(batch_size, "free_memory", lambda _: memory_for(build_config(AUTO), 16))
    assert main([*words, "--checkpoint.best_metric=val/loss", "--prune.rounds=1"]) == 0
    monkeypatch.setattr(batch_size, "free_memory", lambda _: 10**12)
    assert main([*words, "--checkpoint.best_metric=val/loss", "--prune.rounds=2"]) == 0
    for name in ("", "rounds/00", "rounds/02"):
        assert yaml.safe_load((tmp_path / "run" / name / "config.yaml").read_text())["train.batch_size"] == 16


def test_what_does_not_go_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset=digits", "--train.batch_size=auto", "--train.accumulation=2"]) == 2
    assert "train.accumulation = 2: not with train.batch_size=auto" in capsys.readouterr().err
    assert main(["--preset=digits", "--train.batch_size=most"]) == 2
    assert "train.batch_size = 'most': expected an integer >= 1 or one of auto" in capsys.readouterr().err


# What is tried out on a GPU.


@pytest.mark.parametrize(
    "knobs", [{}, {"model.self_conditioning": True, "model.learned_variance": True, "upsample.factor": 2}]
)
def test_what_is_tried_is_the_program_that_trains(knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same operations, in the same types, with equally large results; compiled where training compiles."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    config = build_config(AUTO, knobs, {"train.precision": "bf16", "train.batch_size": 8})
    with Calculations() as training:
        train(tiny_state(config), tiny_batches(config), config, accelerator=cpu(), until=1)
    network = build_network(config, 10)
    with Calculations() as tried:
        assert fits(network, config, 8)
    assert training.convolutions == tried.convolutions
    assert {dtype for dtype, _ in tried.convolutions} == {torch.bfloat16}
    assert tried.optimizer_steps == training.optimizer_steps > 0

    torch._dynamo.reset()
    counters.clear()
    compiled = config.model_copy(update={"train": config.train.model_copy(update={"compile": "network"})})
    assert fits(build_network(compiled, 10), compiled, 8)
    assert counters["stats"]["unique_graphs"] > 0


class Calculations(TorchDispatchMode):
    """Inside this context it is noted what convolutions give, and how often the optimizer steps."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions: Counter[tuple[torch.dtype, tuple[int, ...]]] = Counter()
        self.optimizer_steps = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default):
            output = result if isinstance(result, Tensor) else args[1]
            self.convolutions[output.dtype, tuple(output.shape)] += 1
        self.optimizer_steps += "fused_adamw" in str(function)
        return result


def test_a_batch_that_runs_out_of_memory_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = build_config(AUTO)
    network = build_network(config, 10)

    def train_once(_network: UNet, _config: TrialConfig, batch: int, _processes: int) -> None:
        if batch > 4:
            raise torch.cuda.OutOfMemoryError("out of memory")
        if batch < 2:
            raise ValueError("another error")

    monkeypatch.setattr(batch_size, "train_once", train_once)
    assert [fits(network, config, batch) for batch in (2, 4, 8)] == [True, True, False]
    with pytest.raises(ValueError, match="another error"):
        fits(network, config, 1)
