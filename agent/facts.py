"""Facts for a run's summary: what it runs on, and what its network costs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from accelerate import Accelerator

from agent.config import TrialConfig
from diffusion_core.data import Dataset
from diffusion_core.hardware import pick_precision
from diffusion_core.trainer import TrainState
from pruning.cost import count_cost
from pruning.pruner import records


def costs_of(state: TrainState) -> dict[str, float]:
    """What a network costs (``model/*``), and what pruning took away (``prune/*``)."""
    costs: dict[str, float] = {f"model/{name}": value for name, value in asdict(count_cost(state.network)).items()}
    if pruned := records(state):
        costs["prune/sparsity"] = pruned[-1]["sparsity"]
    return costs


def system_facts(config: TrialConfig, accelerator: Accelerator, dataset: Dataset) -> dict[str, Any]:
    """Where a trial runs, and on how many images (``system/*``, ``data/*``)."""
    return {
        "system/device": str(accelerator.device),
        "system/precision": pick_precision(config.train, accelerator.device),
        "system/processes": accelerator.num_processes,
        "data/train_images": len(dataset.train),
        "data/val_images": len(dataset.val),
        "data/num_classes": dataset.num_classes,
    }
