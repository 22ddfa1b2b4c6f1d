"""Two processes that would remove other channels and blocks remove those of the first one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forks import Forks
from forks.ranks import run_ranks

PRUNING = """
import json
from dataclasses import asdict
import torch
from accelerate import PartialState
from tiny import tiny_config, tiny_network
from diffusion_core.files import sha256
from diffusion_core.training.trainer import TrainState
from pruning import pruner
from pruning.config import PruneConfig

rank = PartialState(cpu=True).process_index
real = pruner.prune_network
def otherwise(network, prune, seed, *more):  # Another GPU ranks channels otherwise, and measures other latencies.
    return real(network, prune.model_copy(update={"blocks": ["up.0.blocks.1"] if rank else []}), seed + rank, *more)
pruner.prune_network = otherwise
config = tiny_config()
prune = PruneConfig(method="structured", importance="random", keep=0.5)
network = tiny_network()
alone, removal = real(network, prune, config.seed)
state = TrainState.start(network, config.train, config.ema)
report = pruner.prune_state(state, config, prune)

def digest(network):
    return sha256(*(part for entry in sorted(network.state_dict().items()) for part in entry))

told = {"weights": digest(state.network), "alone": digest(alone), "details": report.details}
print("told " + json.dumps(told | {"first": asdict(removal), "sparsity": report.sparsity}))
"""


@pytest.mark.slow
def test_structured_pruning_is_the_first_ones(tmp_path: Path, forks: Forks) -> None:
    (tmp_path / "pruning_apart.py").write_text(PRUNING)
    ended = run_ranks(forks, tmp_path, ["pruning_apart.py"])
    assert [status for status, _, _ in ended] == [0, 0], ended
    first, second = (json.loads(out.partition("told ")[2]) for _, out, _ in ended)
    assert first == second
    assert first["weights"] == first["alone"]
    assert first["details"] == first["first"]
