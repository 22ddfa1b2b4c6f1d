"""What several tests build on: a network small enough for any processor, and the data to go with it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusion_core.checkpoint import read_checkpoint, write_checkpoint
from diffusion_core.config import CoreConfig, DataConfig, build, flatten
from diffusion_core.data.batches import Batches
from diffusion_core.data.datasets import Dataset, Images, load_data
from diffusion_core.model.structure import structure
from diffusion_core.model.unet import UNet, build_network
from diffusion_core.tracking import NullTracker
from diffusion_core.training.trainer import TrainState

TINY: dict[str, Any] = {
    "data.name": "digits",
    "model.channels": 8,
    "model.channel_multipliers": [1, 2],
    "model.num_res_blocks": 1,
    "model.attention_resolutions": [4],
    "model.norm_groups": 4,
    "model.dropout": 0.0,
    "diffusion.timesteps": 50,
    "diffusion.schedule": "cosine",
    "train.steps": 8,
    "train.batch_size": 8,
    "train.lr": 1e-3,
    "train.warmup_steps": 0,
    "train.precision": "fp32",
    "train.device": "cpu",
    "ema.decay": 0.9,
    "sample.steps": 4,
    "sample.per_class": 1,
    "eval.val_images": 64,
    "log.every": 1,
    "log.progress": False,
}
NUM_CLASSES = 10


def tiny_config(**changes: Any) -> CoreConfig:
    """The tiny configuration with some knobs changed; a dot is written as two underscores: ``train__steps=3``."""
    return build(CoreConfig, TINY, {key.replace("__", "."): value for key, value in changes.items()})


def lively(network: nn.Module, seed: int = 0) -> Any:
    """The network with small random weights everywhere, since the untrained one answers with zeros."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(network.named_parameters()):
            scale = 0.3 if name.startswith("label_embedding") or parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=source) * scale)
    return network


def tiny_network(config: CoreConfig | None = None, num_classes: int = NUM_CLASSES, seed: int = 0) -> UNet:
    """A tiny network with lively weights, in evaluation mode."""
    return lively(build_network(config or tiny_config(), num_classes), seed).eval()


@cache
def digits() -> Dataset:
    return load_data(DataConfig(name="digits"))


def tiny_batches(config: CoreConfig, images: Images | None = None, **changes: Any) -> Batches:
    settings: dict[str, Any] = {
        "batch_size": config.train.batch_size,
        "seed": config.seed,
        "horizontal_flip": config.data.flips,
        "device": torch.device("cpu"),
    }
    return Batches(images or digits().train, **(settings | changes))


def tiny_state(config: CoreConfig) -> TrainState:
    """A training state on the CPU whose network is the configuration's, freshly drawn."""
    return TrainState.start(build_network(config, NUM_CLASSES), config.train, config.ema)


@cache
def cpu() -> Accelerator:
    return Accelerator(cpu=True, mixed_precision="no")


def one_line(error: BaseException) -> str:
    """The message of an error, which must be one line that a person can read."""
    message = str(error)
    assert message.strip()
    assert "\n" not in message
    assert len(message) < 1000
    return message


def assert_same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal names, types, shapes and bits."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


CONFIG = tiny_config()


def metadata(network: UNet, config: CoreConfig = CONFIG) -> dict[str, Any]:
    return {
        "config": flatten(config),
        "image_shape": [network.in_channels, network.image_size, network.image_size],
        "num_classes": network.num_classes,
        "class_names": [str(i) for i in range(10)],
        "structure": structure(network, config.model),
        "figures": {"val/loss": 0.25},
        "best": None,
        "ema_updates": 0,
        "extra": {},
    }


def lively_run(folder: Path, **changes: Any) -> Path:
    """A run's folder, whose averaged weights are made lively so that images differ."""
    from agent.config import build_config
    from agent.trial import run_trial

    settings = TINY | {"train.steps": 2, "checkpoint.upload": False, "sample.every": 0, "eval.num_images": 10}
    config = build_config(settings | {key.replace("__", "."): value for key, value in changes.items()})
    dataset = digits() if config.data.image_size is None else load_data(config.data)
    result = run_trial(config, NullTracker(), dataset=dataset, folder=folder, run_id="run")
    checkpoint = read_checkpoint(result.best_checkpoint)
    parts = {part: checkpoint.tensors(part) for part in checkpoint.parts}
    parts["ema"] = lively(checkpoint.network()).state_dict()
    if "label_embedding.weight" in parts["ema"]:
        parts["ema"]["label_embedding.weight"] *= 20  # So that the label can be seen.
    metadata = {key: value for key, value in checkpoint.metadata.items() if key not in ("format", "step", "files")}
    write_checkpoint(folder / "checkpoints", checkpoint.step, metadata, parts)
    return folder
