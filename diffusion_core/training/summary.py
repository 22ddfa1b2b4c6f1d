"""What a run's summary holds besides figures: the machine, the code, the images, and the cost of the network."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion_core.checkpoint import METADATA_FILE, SAMPLING_PARTS
from diffusion_core.config import TrainConfig
from diffusion_core.data.datasets import Dataset
from diffusion_core.hardware import pick_precision
from diffusion_core.machine.job import cluster_facts
from diffusion_core.machine.sharing import usable_cores
from diffusion_core.model.cost import LATENCY_BATCH, count_cost, latencies, peak_memory
from diffusion_core.model.unet import UNet

COMMIT = "DIFFUSION_SWEEPS_COMMIT"
"""Environment variable: the git commit of the code, where there is no repository, such as in a container."""


def costs_of(
    network: UNet, averaged: UNet, checkpoint: Path, masks: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Return what a network costs, as figures ``model/*``.

    Parameters and multiply-accumulates are counted. Measured on this machine, in float32: milliseconds and peak bytes
    of a forward pass of one image and of 16, and the bytes of the files that sampling needs.

    Args:
        network: the network in training, whose cost is counted.
        averaged: the averaged network, which is measured.
        checkpoint: folder of a checkpoint of it.
        masks: the masks that hold weights at zero; None: there are none.
    """
    costs: dict[str, float] = {f"model/{name}": value for name, value in asdict(count_cost(network, masks)).items()}
    for batch, suffix in ((1, "_single"), (LATENCY_BATCH, "")):
        costs[f"model/latency{suffix}"] = 1000.0 * latencies([averaged], batch)[0]
        costs[f"model/peak_memory{suffix}"] = peak_memory(averaged, batch)
    sampled = [checkpoint / METADATA_FILE, *(checkpoint / f"{part}.safetensors" for part in SAMPLING_PARTS)]
    costs["model/checkpoint_bytes"] = sum(file.stat().st_size for file in sampled)
    return costs


def system_facts(
    train: TrainConfig, accelerator: Accelerator, dataset: Dataset, packages: Sequence[str] = ("torch", "accelerate")
) -> dict[str, Any]:
    """Describe the machine, its cluster, the code and the images of a trial (``system/*``, ``slurm/*``, ``data/*``).

    Args:
        train: device and precision.
        accelerator: processes and devices.
        dataset: the images.
        packages: names of the packages whose versions are recorded.
    """
    device = accelerator.device
    return {
        "system/device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "system/python": platform.python_version(),
        **{f"system/{package}": version(package) for package in packages},
        "system/commit": commit(),
        "data/sha256": dataset.sha256,
        "system/precision": pick_precision(train, device),
        "system/processes": accelerator.num_processes,
        "system/threads": torch.get_num_threads(),
        "system/cores": usable_cores(),
        "data/train_images": len(dataset.train),
        "data/val_images": len(dataset.val),
        "data/num_classes": dataset.num_classes,
        **cluster_facts(),
    }


def commit() -> str | None:
    """Return the git commit of this code, with ``-dirty`` if files were changed.

    Outside a repository it is that of :data:`COMMIT`, or None.
    """
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        folder = Path(__file__).parent
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=False)
        found = done.stdout.strip() if done.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        found = ""
    return found or os.environ.get(COMMIT) or None
