"""Models of Diffusers that tests convert: small ones, their folders, and how they are compared with ours."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import convert_diffusers
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from diffusion_core.checkpoint import Checkpoint
from diffusion_core.model.unet import UNet
from diffusion_core.sampling import generation

WEIGHTS = "diffusion_pytorch_model.safetensors"


def blocks(attention: list[int]) -> dict[str, Any]:
    """The types of the blocks: one per level, 1 with attention and 0 without."""
    down = [f"{'Attn' * attends}DownBlock2D" for attends in attention]
    return {"down_block_types": down, "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)]}


TINY: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": [8, 16, 16],
    **blocks([0, 1, 0]),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
"""google/ddpm-cifar10-32 made small."""


def theirs(changes: Mapping[str, Any] | None = None, base: Mapping[str, Any] = TINY) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**{**base, **(changes or {})}).eval()


def save(folder: Path, unet: UNet2DModel | None = None, **schedule: Any) -> Path:
    """A pipeline's folder."""
    DDPMPipeline(unet or theirs(), DDPMScheduler(variance_type="fixed_large", **schedule)).save_pretrained(folder)
    return folder


def convert(direction: str, source: Path | str, target: Path, *more: str) -> None:
    assert convert_diffusers.main([direction, str(source), str(target), *more]) == 0


def inputs(network: UNet | UNet2DModel, classes: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    channels, size = (
        (network.in_channels, network.image_size)
        if isinstance(network, UNet)
        else (network.config["in_channels"], network.config["sample_size"])
    )
    size = size if isinstance(size, int) else size[0]
    source = torch.Generator().manual_seed(3)
    x = torch.randn(6, channels, size, size, generator=source)
    t = torch.randint(1000, (6,), generator=source)
    return x, t, torch.randint(classes, (6,), generator=source) if classes else None


@torch.no_grad()
def assert_same_outputs(ours: UNet, other: UNet2DModel, classes: int = 0) -> None:
    x, t, labels = inputs(ours, classes)
    expected, found = other(x, t, labels).sample, ours(x, t, labels)
    assert expected.std() > 0.01
    assert (expected - found).abs().max() <= 1e-5


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says, without who wrote it and in which of several spellings."""
    said = {key: value for key, value in config.items() if not key.startswith("_")}
    if isinstance(size := said.get("sample_size"), list | tuple):
        said["sample_size"] = size[0]
    for key in ("down_block_types", "up_block_types"):
        if key in said:
            said[key] = [kind.removeprefix("UNetRes") for kind in said[key]]
    if "act_fn" in said:
        said["act_fn"] = "silu" if said["act_fn"] == "swish" else said["act_fn"]
        said["attn_norm_num_groups"] = said["attn_norm_num_groups"] or said["norm_num_groups"]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in said.items()}


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(capsys: pytest.CaptureFixture[str], direction: str, source: Path | str, folder: Path, *more: str) -> str:
    """The one line with which a conversion is refused; nothing is written."""
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert convert_diffusers.main([direction, str(source), str(folder / "target"), *more]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert len(said.err) < 1000
    assert sorted(folder.rglob("*")) == before
    return said.err


def tape(shape: tuple[int, ...]) -> Iterator[Tensor]:
    source = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(shape, generator=source)


@torch.no_grad()
def sample(checkpoint: Checkpoint, labels: list[int], steps: int) -> Tensor:
    """Our images in [0, 1]."""
    config = checkpoint.config()
    settings = config.sample.model_copy(update={"sampler": "ddpm", "steps": steps})
    noises = tape((len(labels), *checkpoint.shape_CHW))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "ImageNoise", lambda *_: lambda: next(noises))
        drawing = generation.Generator(checkpoint.network(), config, "fp32")
        x = drawing.batch([generation.Request(label, 0) for label in labels], settings, 0)
    return (x / 2 + 0.5).clamp(0, 1)


def their_images(pipeline: DDPMPipeline, count: int, steps: int) -> Tensor:
    """Diffusers' images in [0, 1], of the noise that ours get."""
    pipeline.set_progress_bar_config(disable=True)
    source = torch.Generator().manual_seed(1)
    return pipeline(count, source, num_inference_steps=steps, output_type="pt").images


def assert_same_images(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.02
    assert ((expected > 0) & (expected < 1)).float().mean() > 0.2  # Where all is black or white, no difference shows.
    assert (found - expected).abs().max() < 1e-4
