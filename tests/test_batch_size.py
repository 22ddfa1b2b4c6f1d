"""``train.batch_size=auto``: the largest batch that fits, and the same one when the run is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import TINY, cpu, digits

from agent import batch_size
from agent.__main__ import main
from agent.batch_size import settled
from agent.config import TrialConfig, build_config
from diffusion_core.memory import training_memory
from diffusion_core.unet import build_network

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
    assert "16 images a step fit" in capsys.readouterr().err
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train.batch_size"] == 16
    monkeypatch.setattr(batch_size, "free_memory", lambda _: 10**12)
    assert main([*words, "--checkpoint.every=1"]) == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train.batch_size"] == 16


def test_what_does_not_go_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset=digits", "--train.batch_size=auto", "--train.accumulation=2"]) == 2
    assert "train.accumulation = 2: not with train.batch_size=auto" in capsys.readouterr().err
    assert main(["--preset=digits", "--train.batch_size=most"]) == 2
    assert "train.batch_size = 'most': expected an integer >= 1 or one of auto" in capsys.readouterr().err
