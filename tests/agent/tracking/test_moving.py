"""A run that goes on on another machine, whose best checkpoint is not its newest one: both are fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from server import WandbServer
from wandb_client import ROOT, Client

PROGRAM = """
import sys, time
from pathlib import Path
import torch, wandb
sys.path.insert(0, TESTS)
from tiny import TINY
from diffusion_core.training.checkpoints import SaveCheckpoints, log_checkpoint
from agent.config import build_config
from agent.tracking.artifacts import fetch_best, fetch_checkpoint
from diffusion_core.training.resume import find_checkpoint
from agent.tracking.retention import Retention
from agent.tracking.run import start_wandb
from diffusion_core.checkpoint import list_checkpoints, read_checkpoint
from diffusion_core.data.datasets import load_data
from diffusion_core.tracking import MemoryTracker
from agent.tracking.tracker import WandbTracker
from diffusion_core.training.trainer import TrainState
from diffusion_core.model.unet import build_network

config = build_config({"preset": "digits", **TINY, "checkpoint.keep": 1, "checkpoint.best_metric": "val/loss"})
dataset = load_data(config.data)
here, there = Path("here/checkpoints"), Path("there/checkpoints")
run = start_wandb("moved", here.parent, {}, "online")
tracker = WandbTracker(run, keep=1, after_upload=Retention(1, 7))
saver = SaveCheckpoints(config, dataset, tracker, here, "moved", None)
state = TrainState.start(build_network(config, 10), config.train, config.ema)
for step, loss in ((5, 0.5), (10, 0.9), (15, 0.7)):
    state.step = step
    with torch.no_grad():
        state.ema.network.conv_out.bias.fill_(step)
    saver.save(state, loss)
    while tracker.uploads.unsent():
        time.sleep(0.02)
tracker.close(0)
result = {"here": [path.name for path in list_checkpoints(here)]}

run = start_wandb("moved", there.parent, {}, "online")
fetch_checkpoint(run, there)
result["fetched"] = [path.name for path in list_checkpoints(there)]
fetch_best(run, there)
resumed = find_checkpoint(config, there)
result["resumed"] = resumed.step
saver = SaveCheckpoints(config, dataset, WandbTracker(run), there, "moved", resumed)
best = read_checkpoint(saver.best_path)
result["best"] = [best.step, list(best.parts), best.network().conv_out.bias.tolist()]
memory = MemoryTracker()
for path in list_checkpoints(there):
    log_checkpoint(memory, read_checkpoint(path), "moved", is_best=False, history=[], ttl_days=None)
result["sent again"] = [[artifact["type"], artifact["metadata"]["step"]] for artifact in memory.artifacts]
for file in (there / "step-00000015").iterdir():
    file.write_bytes(b"damaged")
try:
    result["damaged"] = find_checkpoint(config, there)
except ValueError as error:
    result["damaged"] = str(error)
run.finish()
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with WandbServer() as server:
        client = Client(server, tmp_path_factory.mktemp("moving"))
        found = client.script(f"TESTS = {str(Path(ROOT) / 'tests')!r}\n{PROGRAM}")
        assert server.errors == []
        return found


def test_the_run_goes_on_from_its_newest_checkpoint(told: dict[str, Any]) -> None:
    assert told["here"] == ["step-00000005", "step-00000015"]
    assert told["fetched"] == ["step-00000015"]
    assert told["resumed"] == 15


def test_its_best_checkpoint_comes_along_for_sampling(told: dict[str, Any]) -> None:
    assert told["best"] == [5, ["ema"], [5.0]]


def test_training_never_goes_on_from_what_is_there_for_sampling_alone(told: dict[str, Any]) -> None:
    assert "step-00000015" in told["damaged"]


def test_what_is_there_for_sampling_alone_is_never_sent_as_a_training_state(told: dict[str, Any]) -> None:
    assert told["sent again"] == [["model", 5], ["model", 15], ["training-state", 15]]
