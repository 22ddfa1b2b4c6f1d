"""What a run's summary says besides figures: where it runs, on which data, what its network costs."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from agent.config import TrialConfig
from diffusion_core.checkpoint import METADATA_FILE, SAMPLING_PARTS
from diffusion_core.data.datasets import Dataset
from diffusion_core.files import sha256
from diffusion_core.hardware import pick_precision
from diffusion_core.model.cost import LATENCY_BATCH, count_cost, latencies, peak_memory
from diffusion_core.training.trainer import TrainState
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
    return {
        "name": config.data.name,
        "image_shape": list(dataset.shape_CHW),
        "class_names": list(dataset.class_names),
        "train_images": len(dataset.train),
        "val_images": len(dataset.val),
        "sha256": dataset_sha256(dataset),
    }


def system_facts(config: TrialConfig, accelerator: Accelerator, dataset: Dataset) -> dict[str, Any]:
    """Where a trial runs, by which code, and on which images (``system/*``, ``data/*``)."""
    device = accelerator.device
    return {
        "system/device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "system/python": platform.python_version(),
        **{f"system/{package}": version(package) for package in ("torch", "accelerate", "wandb")},
        "system/commit": commit(),
        "data/sha256": dataset_sha256(dataset),
        "system/precision": pick_precision(config.train, accelerator.device),
        "system/processes": accelerator.num_processes,
        "data/train_images": len(dataset.train),
        "data/val_images": len(dataset.val),
        "data/num_classes": dataset.num_classes,
    }


def commit() -> str | None:
    """The git commit of this code, marked where files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        folder = Path(__file__).parent
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def dataset_sha256(dataset: Dataset) -> str:
    """Return the SHA-256 of all images, labels and class names: equal for equal data, wherever it was read from."""
    parts: list[str | Tensor] = [repr((dataset.shape_CHW, dataset.class_names))]
    for split in (dataset.train, dataset.val):
        parts += [repr(len(split)), split.images_NCHW, split.labels_N]
    return sha256(*parts)
