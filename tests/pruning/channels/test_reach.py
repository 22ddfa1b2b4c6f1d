"""Targets that no pruning reaches: refused before the first step, by what pruning itself finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import TINY, digits

from agent import trial
from agent.config import TrialConfig, build_config
from agent.sweep.file import check_sweep
from agent.trial import run_trial
from diffusion_core.config import ConfigError
from diffusion_core.model.cost import count_cost
from diffusion_core.model.unet import build_network
from diffusion_core.search.sweep import SweepError
from diffusion_core.tracking import MemoryTracker
from pruning.channels.reach import check_reach, least_share
from pruning.channels.removal import prune_channels
from pruning.channels.search import TOLERANCE

KINDS: list[dict[str, Any]] = [
    {"prune.target": "macs"},
    {"prune.target": "params"},
    {"prune.target": "channels"},
    {"prune.target": "params", "prune.scope": "global"},
    {"prune.target": "channels", "prune.round_to": 4},
    {"prune.target": "macs", "prune.round_to": 8, "model.channels": 16},
    {"prune.target": "macs", "prune.block_keep": [1.0, 0.5, 0.5, 0.5, 1.0]},
    {"prune.target": "params", "model.num_heads": 2, "model.norm_groups": 1},
    {"prune.target": "macs", "prune.widths": "diffusers"},
    {"prune.target": "params", "prune.widths": "diffusers", "prune.round_to": 4, "model.num_heads": 2},
]


def config_of(changes: dict[str, Any], keep: float = 0.5) -> TrialConfig:
    return build_config(TINY, {"prune.method": "structured", "prune.importance": "l1", "prune.keep": keep}, changes)


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_it_is_refused_where_pruning_fails_and_nowhere_else(changes: dict[str, Any]) -> None:
    """Just above the least share, pruning reaches the target; just below it, pruning is out of reach."""
    config = config_of(changes)
    network = build_network(config, 10)
    share = least_share(network, config.prune)
    assert 0.0 < share < 1.0
    below = config_of(changes, share / (1.0 + 2 * TOLERANCE)).prune
    with pytest.raises(ConfigError) as early:
        check_reach(network, below)
    with pytest.raises(ConfigError) as late:
        prune_channels(network, below)
    assert str(early.value) == str(late.value)
    above = config_of(changes, share * 1.001).prune
    check_reach(network, above)
    smaller, _ = prune_channels(network, above)
    if config.prune.target != "channels":
        cost, whole = count_cost(smaller), count_cost(network)
        left = cost.params / whole.params if config.prune.target == "params" else cost.macs / whole.macs
        assert left == pytest.approx(share, rel=0.01)


@pytest.mark.parametrize("depth", [0.0, "auto", 1.0])
@pytest.mark.parametrize("target", ["channels", "latency"])
def test_a_run_is_refused_before_its_first_step(
    target: str, depth: float | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if target == "channels" and depth == 1.0:
        target = "params"

    def steps(*_: object) -> None:
        raise AssertionError("it trains")

    monkeypatch.setattr(trial, "train_and_prune", steps)
    config = config_of({"prune.target": target, "prune.step": 4, "prune.depth": depth}, 0.001)
    with pytest.raises(ConfigError, match=rf"prune\.keep = 0\.001: out of reach; at least 0\.\d+ of the {target}"):
        run_trial(config, MemoryTracker(), dataset=digits(), folder=tmp_path / "run", run_id="r")
    check_reach(build_network(config, 10), config_of({"prune.target": target, "prune.depth": depth}, 0.99).prune)


def test_a_sweep_is_refused_if_one_of_its_trials_is_out_of_reach() -> None:
    """Also one whose values are not the first ones of their parameters, and that the method of the first lacks."""
    parameters: dict[str, Any] = {key: {"value": value} for key, value in TINY.items()}
    parameters |= {
        "prune.method": {"values": ["none", "magnitude", "structured"]},
        "prune.target": {"values": ["macs", "channels"]},
        "prune.keep": {"values": [0.5, 0.05, 0.01]},
    }
    content = {"method": "grid", "command": ["${args}"], "parameters": parameters}
    with pytest.raises(SweepError) as refusal:
        check_sweep(content, "x.yaml", "x")
    assert str(refusal.value).startswith("x.yaml: prune.keep = 0.0")
    assert "with prune.method=structured, prune.target=" in str(refusal.value)
    parameters["prune.keep"] = {"values": [0.5, 0.3]}
    check_sweep(content, "x.yaml", "x")
    parameters["prune.keep"] = {"value": 0.001}
    parameters["init.artifact"] = {"value": "model-x:best"}  # It may be wider than new weights are.
    check_sweep(content, "x.yaml", "x")
