"""Facts for a run's summary: what it runs on, and what its network costs."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from agent.config import TrialConfig
from diffusion_core.checkpoint import METADATA_FILE, SAMPLING_PARTS
from diffusion_core.data import Dataset
from diffusion_core.hardware import pick_precision
from diffusion_core.trainer import TrainState
from pruning.cost import LATENCY_BATCH, count_cost, latencies, peak_memory
from pruning.pruner import records


def costs_of(state: TrainState, checkpoint: Path) -> dict[str, float]:
    """What a network costs (``model/*``), and what pruning took away (``prune/*``).

    Counted are parameters and multiply-accumulates; measured, on this machine in float32, the milliseconds and the most
    bytes of a forward pass of one image and of 16, and the bytes of a checkpoint's parts for sampling.
    """
    network = state.ema.network
    costs: dict[str, float] = {f"model/{name}": value for name, value in asdict(count_cost(state.network)).items()}
    for batch, suffix in ((1, "_single"), (LATENCY_BATCH, "")):
        costs[f"model/latency{suffix}"] = 1000.0 * latencies([network], batch)[0]
        costs[f"model/peak_memory{suffix}"] = peak_memory(network, batch)
    sampled = [checkpoint / METADATA_FILE, *(checkpoint / f"{part}.safetensors" for part in SAMPLING_PARTS)]
    costs["model/checkpoint_bytes"] = sum(file.stat().st_size for file in sampled)
    if pruned := records(state):
        costs["prune/sparsity"] = pruned[-1]["sparsity"]
    return costs


def describe_data(config: TrialConfig, dataset: Dataset) -> dict[str, Any]:
    """Which images a run was trained and judged on, as JSON that is the same for the same images."""
    total = hashlib.sha256()
    for images in (dataset.train, dataset.val):
        total.update(images.images_NCHW.contiguous().numpy().data)
        total.update(images.labels_N.contiguous().numpy().data)
    return {
        "name": config.data.name,
        "image_shape": list(dataset.shape_CHW),
        "class_names": list(dataset.class_names),
        "train_images": len(dataset.train),
        "val_images": len(dataset.val),
        "sha256": total.hexdigest(),
    }


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
