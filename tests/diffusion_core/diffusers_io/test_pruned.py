"""Models with channels removed leave as plain pipelines, which draw our images without this project."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from diffusers.models.embeddings import Timesteps
from pipelines import assert_same_images, assert_same_outputs, convert, plain, refusal, sample, their_images
from safetensors.torch import load_file
from tiny import NUM_CLASSES, lively, metadata, tiny_config

from diffusion_core.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from diffusion_core.model.depth import remove_blocks
from diffusion_core.model.timesteps import kept_frequencies, sinusoidal_embedding
from diffusion_core.model.unet import NO_LABEL, UNet
from pruning.channels.removal import prune_channels
from pruning.config import PruneConfig

KINDS: list[dict[str, Any]] = [
    {},
    {"model__num_heads": 2, "model__num_res_blocks": 2, "model__norm_groups": 1},
    {"model__channel_multipliers": [1, 1, 2], "model__attention_resolutions": [2]},
    {
        "model__channel_multipliers": [1, 1.5],
        "model__head_channels": 8,
        "model__attention_resolutions": [8, 4],
        "model__conditioning": "scale_shift",
        "model__frequency_shift": 0.0,
        "model__time_order": "cos_sin",
        "model__downsample_padding": "both",
        "model__norm_epsilon": 1e-5,
        "model__embedding_channels": 24,
    },
]


def pruned(
    folder: Path, keep: float, widths: Any = "diffusers", classes: int = NUM_CLASSES, **knobs: Any
) -> Checkpoint:
    """A checkpoint of a network whose channels were removed."""
    config = tiny_config(**{"model__channels": 16, "model__class_conditional": classes > 0, **knobs})
    dense = lively(UNet(config.model, 8, 1, classes)).eval()
    prune = PruneConfig(method="structured", keep=keep, widths=widths, importance="l1")
    network, _ = prune_channels(dense, prune)
    tensors = dict(network.state_dict())
    return write_checkpoint(folder, 1, metadata(network, config), {"ema": tensors, "model": tensors})


@pytest.mark.parametrize("keep", [0.6, 0.2])
@pytest.mark.parametrize("knobs", KINDS, ids=str)
def test_a_pruned_network_there_and_back(knobs: dict[str, Any], keep: float, tmp_path: Path) -> None:
    checkpoint = pruned(tmp_path / "ours", keep, **knobs)
    network = checkpoint.network()
    assert checkpoint.metadata["structure"]
    convert("export", checkpoint.path, tmp_path / "theirs")
    unet = UNet2DModel.from_pretrained(tmp_path / "theirs" / "unet").eval()
    assert_same_outputs(network, unet, NUM_CLASSES + 1)
    assert sum(p.numel() for p in unet.parameters()) == sum(p.numel() for p in network.parameters())

    convert("import", tmp_path / "theirs", tmp_path / "back")
    back = read_checkpoint(tmp_path / "back")
    assert back.metadata["structure"] == {}  # Its knobs describe it without one.
    assert_same_outputs(back.network(), unet, NUM_CLASSES + 1)
    convert("export", tmp_path / "back", tmp_path / "again")
    again = UNet2DModel.from_pretrained(tmp_path / "again" / "unet")
    assert plain(again.config) == plain(unet.config)


ALONE = """
import sys, numpy, torch
from diffusers import DDPMPipeline
pipeline = DDPMPipeline.from_pretrained("theirs")
pipeline.set_progress_bar_config(disable=True)
source = torch.Generator().manual_seed(1)
images = pipeline(4, source, num_inference_steps=20, output_type="np").images
assert not {"diffusion_core", "pruning", "agent"} & set(sys.modules)
numpy.save("images.npy", (images * 255).round().astype("uint8"))
"""


@pytest.mark.slow
def test_a_process_without_this_project_draws_the_same_images(tmp_path: Path) -> None:
    checkpoint = pruned(tmp_path / "ours", 0.4)
    convert("export", checkpoint.path, tmp_path / "theirs", "--label", "3")
    command = [sys.executable, "-I", "-c", ALONE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    expected = (sample(checkpoint, [3] * 4, 20).permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    found = np.load(tmp_path / "images.npy")
    assert len({image.tobytes() for image in found}) == 4
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 2


def test_a_single_process_draws_the_same_images_without_classes(tmp_path: Path) -> None:
    checkpoint = pruned(tmp_path / "ours", 0.3, classes=0)
    convert("export", checkpoint.path, tmp_path / "theirs")
    found = their_images(DDPMPipeline.from_pretrained(tmp_path / "theirs"), 4, 7)
    assert_same_images(found, sample(checkpoint, [NO_LABEL] * 4, 7))


def test_a_layer_that_does_not_fit_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = pruned(tmp_path / "ours", 0.5, widths="free")
    said = refusal(capsys, "export", checkpoint.path, tmp_path)
    layer = said.partition("step-00000001': ")[2].partition(":")[0]
    assert layer in dict(checkpoint.network().named_modules())
    assert "prune with prune.widths=diffusers" in said
    heads = pruned(tmp_path / "heads", 0.5, widths="free", model__num_heads=2, model__norm_groups=1)
    assert "heads of one width; prune with" in refusal(capsys, "export", heads.path, tmp_path)
    groups = pruned(tmp_path / "groups", 0.3, widths="free", model__norm_groups=16)
    assert "UNet2DModel has one number of groups" in refusal(capsys, "export", groups.path, tmp_path)


def test_a_network_without_a_block_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config()
    network = lively(UNet(config.model, 8, 1, NUM_CLASSES)).eval()
    remove_blocks(network, ["middle.0"])
    tensors = dict(network.state_dict())
    write_checkpoint(tmp_path / "ours", 1, metadata(network, config), {"ema": tensors, "model": tensors})
    assert "middle.0: was removed as a whole" in refusal(capsys, "export", tmp_path / "ours", tmp_path)


@pytest.mark.parametrize("shift", [1.0, 0.0, 0.5, -3.0])
@pytest.mark.parametrize("cosine_first", [False, True])
def test_features_of_timesteps_that_remain_are_those_of_a_narrower_network(shift: float, cosine_first: bool) -> None:
    """Diffusers computes the same with fewer features and the shift that an export states."""
    t = torch.tensor([0, 3, 999])
    dense = sinusoidal_embedding(t, 32, shift=shift, cosine_first=cosine_first)
    for kept in range(2, 33, 2):
        found = sinusoidal_embedding(t, 32, kept=kept, shift=shift, cosine_first=cosine_first)
        chosen = list(kept_frequencies(32, kept))
        assert len(chosen) == kept // 2
        assert torch.equal(found, dense[:, [*chosen, *(16 + i for i in chosen)]])
        stated = kept / 2 - (16 - shift) / kept_frequencies(32, kept).step
        theirs = Timesteps(kept, cosine_first, stated)(t)
        torch.testing.assert_close(found, theirs, atol=2e-4, rtol=0)  # A rounded frequency times 999.


def test_weights_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = pruned(tmp_path / "ours", 0.5, classes=0)
    convert("export", checkpoint.path, tmp_path / "theirs")
    found = load_file(tmp_path / "theirs" / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(found["conv_in.weight"], checkpoint.tensors("ema")["conv_in.weight"])
    assert torch.equal(found["time_embedding.linear_1.weight"], checkpoint.tensors("ema")["time_mlp.0.weight"])
