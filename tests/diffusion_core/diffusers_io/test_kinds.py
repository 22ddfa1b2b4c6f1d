"""Kinds of UNet2DModel and of their files: Diffusers itself is the oracle, by the outputs of its own network."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipelines import WEIGHTS, assert_same_outputs, blocks, convert, edit, plain, refusal, save, theirs
from safetensors.torch import load_file, save_file
from tiny import assert_same_tensors, lively

from diffusion_core.checkpoint import read_checkpoint
from diffusion_core.config import CoreConfig, build, flatten
from diffusion_core.diffusers_io import unet_config
from diffusion_core.diffusers_io.names import from_diffusers, to_diffusers
from diffusion_core.diffusers_io.networks import our_network
from diffusion_core.diffusers_io.unet import unet_knobs
from diffusion_core.model.cost import count_cost

LIBRARY: dict[str, Any] = {"block_out_channels": [16, 32, 48, 64], "norm_num_groups": 8}
"""All of Diffusers' own defaults but the widths, 224 to 896, and with them the groups."""


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Configurations of UNet2DModel, of all keys that we support. What is not drawn has Diffusers' default."""
    groups = draw(st.sampled_from([1, 2, 4]))
    head = draw(st.sampled_from([None, 4, 8]))
    unit = 8 if head else 4
    widths = [unit * draw(st.integers(1, 3)) for _ in range(draw(st.integers(1, 3)))]
    scaled = draw(st.booleans())
    channels = draw(st.sampled_from([1, 3]))
    drawn: dict[str, Any] = {
        "sample_size": draw(st.sampled_from([4, 8, 12])),
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        **blocks(draw(st.lists(st.integers(0, 1), min_size=len(widths), max_size=len(widths)))),
        "layers_per_block": draw(st.integers(1, 2)),
        "attention_head_dim": head,
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups if scaled else draw(st.sampled_from([None, groups])),
        "resnet_time_scale_shift": "scale_shift" if scaled else "default",
    }
    free = {
        "time_embedding_dim": st.sampled_from([12, 40]),
        "freq_shift": st.sampled_from([0, 1, 0.5, -3]),
        "flip_sin_to_cos": st.booleans(),
        "downsample_padding": st.sampled_from([0, 1]),
        "norm_eps": st.sampled_from([1e-6, 1e-5, 1e-3]),
        "act_fn": st.sampled_from(["silu", "swish"]),
        "num_class_embeds": st.integers(1, 4),
    }
    return drawn | {key: draw(values) for key, values in free.items() if draw(st.booleans())}


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(configurations())
def test_any_configuration_gives_the_outputs_of_diffusers_and_comes_back(configuration: dict[str, Any]) -> None:
    original = lively(UNet2DModel(**configuration)).eval()
    config = build(CoreConfig, unet_knobs(dict(original.config)))
    classes = original.config["num_class_embeds"] or 0
    ours = our_network(config, classes, original.state_dict(), has_null_class=False)
    assert_same_outputs(ours, original, classes)

    assert build(CoreConfig, json.loads(json.dumps(flatten(config)))) == config
    back = unet_config(ours, config.model)
    settings = {**dict(original.config), **back, "num_class_embeds": original.config["num_class_embeds"]}
    again = UNet2DModel(**{key: value for key, value in settings.items() if not key.startswith("_")})
    assert plain(again.config) == plain(original.config)
    tensors = {name: tensor for name, tensor in ours.state_dict().items() if name != "label_embedding.weight"}
    expected = {name: tensor for name, tensor in original.state_dict().items() if not name.startswith("class_emb")}
    assert_same_tensors(to_diffusers(tensors), expected)
    assert_same_tensors(from_diffusers(list(tensors), expected), tensors)
    assert count_cost(ours).params - bool(classes) * back_row(original) == sum(p.numel() for p in original.parameters())


def back_row(original: UNet2DModel) -> int:
    """The weights of our additional row for "no class"."""
    return original.class_embedding.weight.shape[1] if original.class_embedding is not None else 0


def test_the_default_of_the_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    original = UNet2DModel(**LIBRARY).eval()
    original.save_pretrained(tmp_path / "theirs")
    said = refusal(capsys, "import", tmp_path / "theirs", tmp_path)
    assert "sample_size = None: expected one number, a multiple of 8; give it with --image-size" in said
    convert("import", tmp_path / "theirs", tmp_path / "ours", "--image-size", "16")
    checkpoint = read_checkpoint(tmp_path / "ours")
    model = checkpoint.config().model
    assert (model.frequency_shift, model.time_order, model.downsample_padding) == (0, "cos_sin", "both")
    assert (model.norm_epsilon, model.head_channels, model.channel_multipliers) == (1e-5, 8, [1, 2, 3, 4])
    convert("export", tmp_path / "ours", tmp_path / "back")
    back = UNet2DModel.from_pretrained(tmp_path / "back" / "unet").eval()
    assert plain(back.config) == plain(original.config) | {"sample_size": 16}
    assert_same_tensors(dict(back.state_dict()), dict(original.state_dict()))
    assert_same_outputs(checkpoint.network(), back)
    edit(tmp_path / "theirs" / "config.json", sample_size=32)
    said = refusal(capsys, "import", tmp_path / "theirs", tmp_path, "--image-size", "16")
    assert "--image-size = 16: the model has sample_size = 32; drop it" in said


# Files of weights.


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "theirs")


VARIANTS = [
    {"variant": "fp16"},
    {"max_shard_size": "100KB"},
    {"max_shard_size": "100KB", "variant": "fp16"},
    {"max_shard_size": "100KB", "safe_serialization": False},
    {"safe_serialization": False, "variant": "bf16"},
]


@pytest.mark.parametrize("how", VARIANTS, ids=str)
def test_files_as_diffusers_writes_them(how: dict[str, Any], tmp_path: Path) -> None:
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(how.get("variant", ""), torch.float32)
    original = theirs().to(kind)
    original.save_pretrained(tmp_path / "theirs", **how)
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert WEIGHTS not in names
    assert (len(names) > 3) == ("max_shard_size" in how)
    convert("import", tmp_path / "theirs", tmp_path / "ours")
    assert_same_outputs(read_checkpoint(tmp_path / "ours").network(), original.float())


def test_old_names_of_variants_and_float32_first(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "unet" / WEIGHTS)
    halves = [dict(list(tensors.items())[i::2]) for i in (0, 1)]
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)]
    for name, half in zip(shards, halves, strict=True):
        save_file({key: (tensor + 1.0).half() for key, tensor in half.items()}, source / "unet" / name)
    places = {key: name for name, half in zip(shards, halves, strict=True) for key in half}
    index = source / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    convert("import", source, tmp_path / "ours")
    plain_bias = read_checkpoint(tmp_path / "ours").tensors("ema")["conv_in.bias"]
    assert torch.equal(plain_bias, tensors["conv_in.bias"])
    (source / "unet" / WEIGHTS).unlink()
    convert("import", source, tmp_path / "half")
    half_bias = read_checkpoint(tmp_path / "half").tensors("ema")["conv_in.bias"]
    assert torch.equal(half_bias, (tensors["conv_in.bias"] + 1.0).half().float())


def test_damaged_shards_are_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs().save_pretrained(source / "unet", max_shard_size="100KB")
    folder = source / "unet"
    (folder / WEIGHTS).unlink(missing_ok=True)
    index = folder / f"{WEIGHTS}.index.json"
    content = json.loads(index.read_text())
    first, *_ = names = sorted(set(content["weight_map"].values()))
    assert len(names) > 1

    def said() -> str:
        return refusal(capsys, "import", source, tmp_path)

    edit(index, weight_map=content["weight_map"] | {"conv_in.bias": "../../model.safetensors"})
    assert "weight_map names '../../model.safetensors'; expected names of .safetensors or .bin files" in said()
    edit(index, weight_map=content["weight_map"] | {"another.bias": first})
    assert "'another.bias' is in no shard (1 are missing)" in said()
    edit(index, weight_map=[])
    assert "expected weight_map" in said()
    index.write_text(json.dumps(content))
    whole = (folder / first).read_bytes()
    (folder / first).write_bytes(whole[:999])
    assert f"'{first}': cannot be read as weights" in said()
    (folder / first).unlink()
    assert f"the shard {first!r} is missing; download it too" in said()
    index.unlink()
    assert f"no weights here (expected {WEIGHTS} or " in said()
    assert f"found {names[1]}" in said()


def test_a_variant_in_shards_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first download that finds weights is the last one, and has patterns for all their files."""
    original = theirs().half()
    DDPMPipeline.from_pretrained(save(tmp_path / "whole")).save_pretrained(tmp_path / "hub")
    for path in (tmp_path / "hub" / "unet").iterdir():
        path.unlink()
    original.save_pretrained(tmp_path / "hub" / "unet", variant="fp16", max_shard_size="100KB")
    asked: list[list[str]] = []

    def download(_name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        folder = tmp_path / f"cache {len(asked)}"
        for path in (tmp_path / "hub").rglob("*"):
            relative = path.relative_to(tmp_path / "hub")
            if path.is_file() and any(fnmatch(str(relative), pattern) for pattern in allow_patterns):
                (folder / relative).parent.mkdir(parents=True, exist_ok=True)
                (folder / relative).write_bytes(path.read_bytes())
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    convert("import", "someone/half", tmp_path / "ours")
    assert len(asked) == 3  # Neither float32 format is there.
    assert_same_outputs(read_checkpoint(tmp_path / "ours").network(), original.float())
