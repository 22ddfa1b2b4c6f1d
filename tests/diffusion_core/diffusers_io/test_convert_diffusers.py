"""Models to and from Diffusers: equal outputs, equal weights to the bit, equal images; what cannot be is refused."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import convert_diffusers
import huggingface_hub
import pytest
import sample_images
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from forks import Forks
from pipelines import (
    TINY,
    WEIGHTS,
    assert_same_images,
    assert_same_outputs,
    blocks,
    convert,
    edit,
    inputs,
    plain,
    refusal,
    sample,
    save,
    their_images,
    theirs,
)
from safetensors.torch import load_file, save_file
from tiny import NUM_CLASSES, assert_same_tensors, lively, metadata, tiny_config, tiny_network

from diffusion_core.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from diffusion_core.config import ConfigError, CoreConfig
from diffusion_core.diffusers_io import diffusers_name, exporter, importer
from diffusion_core.diffusers_io import networks as diffusers_networks
from diffusion_core.diffusers_io.names import OLD_ATTENTION
from diffusion_core.model.structure import resize
from diffusion_core.model.unet import NO_LABEL

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "convert_diffusers.py"


GOOGLE = TINY | {
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    **blocks([0, 1, 0, 0]),
    "layers_per_block": 2,
    "norm_num_groups": 32,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grey": {"sample_size": [28, 28], "in_channels": 1, "out_channels": 1, "layers_per_block": 2},
    "heads": {"attention_head_dim": 4, "attn_norm_num_groups": 4, "dropout": 0.1, "act_fn": "swish"},
    "no attention but in the middle": {
        "block_out_channels": [12, 36],
        "down_block_types": ["UNetResDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
    },
    "attention at several widths": {
        "block_out_channels": [8, 16, 24],
        **blocks([1, 1, 1]),
    },
    "one level": {"block_out_channels": [8], **blocks([1])},
    "classes": {"num_class_embeds": 5},
}


def assert_round_trip(source: Path, original: UNet2DModel, folder: Path) -> None:
    """Import and export: outputs as they were on the way, weights to the bit and configurations in the end."""
    ours, back = folder / "ours", folder / "back"
    convert("import", source, ours)
    checkpoint = read_checkpoint(ours)
    assert_same_tensors(checkpoint.tensors("ema"), checkpoint.tensors("model"))
    assert_same_outputs(checkpoint.network(), original, checkpoint.metadata["num_classes"])

    convert("export", ours, back)
    assert_same_tensors(load_file(back / "unet" / WEIGHTS), dict(original.state_dict()))
    assert plain(UNet2DModel.from_pretrained(back / "unet").config) == plain(original.config)
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("name", VARIANTS)
def test_import_and_export(name: str, tmp_path: Path) -> None:
    original = theirs(VARIANTS[name])
    assert_round_trip(save(tmp_path / "theirs", original), original, tmp_path)


def test_import_and_export_at_full_size(tmp_path: Path) -> None:
    original = theirs(base=GOOGLE)
    assert sum(parameter.numel() for parameter in original.parameters()) == 35_746_307
    assert_round_trip(save(tmp_path / "theirs", original), original, tmp_path)
    shutil.rmtree(tmp_path)  # Half a gigabyte.


def rename(name: str) -> str:
    for old, new in OLD_ATTENTION.items():
        for kind in ("weight", "bias"):
            if ".attentions." in name and name.endswith(f".{new}.{kind}"):
                return f"{name.removesuffix(f'{new}.{kind}')}{old}.{kind}"
    return name


@pytest.mark.parametrize("convolutions", [False, True])
@pytest.mark.parametrize("binary", [False, True])
def test_import_of_an_old_checkpoint(binary: bool, convolutions: bool, tmp_path: Path) -> None:
    """As google/ddpm-cifar10-32 is published: all in one folder, attention under its old names."""
    original = theirs()
    source = save(tmp_path / "theirs", original, num_train_timesteps=500)
    for file in ("scheduler/scheduler_config.json", "unet/config.json"):
        (source / file).rename(source / Path(file).name)
    tensors = {rename(name): tensor for name, tensor in original.state_dict().items()}
    assert any(name.endswith("proj_attn.weight") for name in tensors)
    if convolutions:
        old = tuple(f".{layer}.weight" for layer in OLD_ATTENTION)
        tensors = {name: t[:, :, None, None] if name.endswith(old) else t for name, t in tensors.items()}
    shutil.rmtree(source / "unet")
    shutil.rmtree(source / "scheduler")
    if binary:
        torch.save(tensors, source / "diffusion_pytorch_model.bin")
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, source / WEIGHTS)
    if not convolutions:  # What Diffusers reads itself.
        assert_same_tensors(dict(DDPMPipeline.from_pretrained(source).unet.state_dict()), dict(original.state_dict()))
    assert_round_trip(source, original, tmp_path)
    assert read_checkpoint(tmp_path / "ours").config().diffusion.timesteps == 500


def test_import_of_a_network_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = theirs()
    original.half().save_pretrained(tmp_path / "theirs")
    edit(tmp_path / "theirs" / "config.json", unheard_of=1)
    convert("import", tmp_path / "theirs", tmp_path / "ours")
    said = capsys.readouterr().out
    assert "note: no scheduler_config.json" in said
    assert "ignored: unheard_of" in said
    assert "torch.float16 become torch.float32" in said
    checkpoint = read_checkpoint(tmp_path / "ours")
    assert_same_outputs(checkpoint.network(), original.float())
    assert checkpoint.config().diffusion == CoreConfig().diffusion
    assert checkpoint.config().sample.variance == "fixed_large"


SCHEDULES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"schedule": "linear", "timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}),
    (
        {"num_train_timesteps": 250, "beta_start": 4e-4, "beta_end": 0.06},
        {"schedule": "linear", "timesteps": 250, "beta_start": 1e-4, "beta_end": 0.015},
    ),
    (
        {"num_train_timesteps": 70, "beta_schedule": "squaredcos_cap_v2"},
        {"schedule": "cosine", "timesteps": 70},
    ),
    (
        {"trained_betas": torch.linspace(1e-3, 0.1, 200).tolist()},
        {"schedule": "linear", "timesteps": 200, "beta_start": 2e-4, "beta_end": 0.02},
    ),
    (
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"schedule": "linear", "timesteps": 1000, "zero_terminal_snr": True, "prediction": "v"},
    ),
    ({"prediction_type": "sample"}, {"timesteps": 1000, "zero_terminal_snr": False, "prediction": "x0"}),
    (
        {"trained_betas": DDPMScheduler(30, beta_schedule="squaredcos_cap_v2").betas.tolist()},
        {"schedule": "cosine", "timesteps": 30},
    ),
]


@pytest.mark.parametrize(("given", "expected"), SCHEDULES)
def test_schedules_there_and_back(given: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    more = {"clip_sample": False, "timestep_spacing": "trailing", "steps_offset": 1}
    convert("import", save(tmp_path / "theirs", **given, **more), tmp_path / "ours")
    config = read_checkpoint(tmp_path / "ours").config()
    found = config.diffusion.model_dump()
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert (config.sample.sampler, config.sample.steps) == ("ddpm", expected["timesteps"])
    assert not config.sample.clip_x0

    convert("export", tmp_path / "ours", tmp_path / "back")
    one, other = (DDPMScheduler.from_pretrained(tmp_path / name / "scheduler") for name in ("theirs", "back"))
    torch.testing.assert_close(other.betas, one.betas, rtol=1e-5, atol=1e-7)
    if "trained_betas" not in given:
        for key, value in plain(one.config).items():
            assert other.config[key] == (pytest.approx(value) if isinstance(value, float) else value), key


def test_import_takes_the_sampler_along(tmp_path: Path) -> None:
    source = save(tmp_path / "theirs")
    DDIMScheduler().save_pretrained(source / "scheduler")
    convert("import", source, tmp_path / "ours")
    sample = read_checkpoint(tmp_path / "ours").config().sample
    assert (sample.sampler, sample.steps, sample.eta) == ("ddim", 50, 0.0)
    source = save(tmp_path / "again")
    edit(source / "scheduler" / "scheduler_config.json", variance_type="fixed_small_log")
    convert("import", source, tmp_path / "ours2")
    assert read_checkpoint(tmp_path / "ours2").config().sample.variance == "fixed_small"


def test_a_layer_without_a_counterpart_is_named() -> None:
    with pytest.raises(ConfigError, match=r"down\.0\.gate\.weight"):
        diffusers_name("down.0.gate.weight")


# Checkpoints of ours.

NAMES = [f"digit {i}" for i in range(NUM_CLASSES)]


def own(folder: Path, *, classes: int = NUM_CLASSES, structure: Any = None, **changes: Any) -> Checkpoint:
    """A checkpoint of a tiny network, as training writes it; its weights as trained are others than the average."""
    config = tiny_config(**{"model__class_conditional": classes > 0, **changes})
    networks = [tiny_network(config, classes, seed) for seed in (0, 1)]
    for network in networks:
        resize(network, structure or {})
        lively(network, 5) if structure else None
    described = metadata(networks[0], config) | {"class_names": NAMES, "ema_updates": 3}
    parts = {part: dict(network.state_dict()) for part, network in zip(("ema", "model"), networks, strict=True)}
    return write_checkpoint(folder, 3, described, parts)


UNCLIPPED = {
    "sample__variance": "fixed_small",
    "sample__clip_x0": False,
    "diffusion__schedule": "linear",
    "diffusion__beta_end": 0.002,
}


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"sample__variance": "fixed_large"}, 50),
        (UNCLIPPED, 50),
        ({"diffusion__schedule": "linear", "diffusion__timesteps": 40, "diffusion__beta_end": 0.01}, 40),
        ({"diffusion__schedule": "linear", "diffusion__timesteps": 12}, 12),  # Capped variances, listed in full.
        ({}, 7),
        ({"model__num_heads": 2, "model__norm_groups": 8}, 7),
        ({"model__channel_multipliers": [1, 1], "model__norm_groups": 24}, 7),  # In fact 8 groups everywhere.
        ({"diffusion__prediction": "x0"}, 20),
        ({"diffusion__prediction": "v", "sample__variance": "fixed_small", "sample__spacing": "trailing"}, 20),
        ({"diffusion__prediction": "v", "diffusion__schedule": "linear", "diffusion__zero_terminal_snr": True}, 20),
        ({"diffusion__schedule": "sigmoid", "diffusion__logsnr_shift": -1.0}, 30),
    ],
)
def test_an_exported_pipeline_draws_our_images(
    changes: dict[str, Any], steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = own(tmp_path / "ours", classes=0, **changes)
    convert("export", checkpoint.path, tmp_path / "theirs")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "theirs")
    timesteps = checkpoint.config().diffusion.timesteps
    assert f"pipeline(num_inference_steps={timesteps})" in capsys.readouterr().out
    assert_same_images(their_images(pipeline, 4, steps), sample(checkpoint, [NO_LABEL] * 4, steps))


def test_the_images_of_an_imported_pipeline(tmp_path: Path) -> None:
    source = save(tmp_path / "theirs", num_train_timesteps=30, beta_start=3e-3, beta_end=0.3)
    convert("import", source, tmp_path / "ours")
    expected = their_images(DDPMPipeline.from_pretrained(source), 3, 30)
    assert_same_images(sample(read_checkpoint(tmp_path / "ours"), [NO_LABEL] * 3, 30), expected)


def test_export_of_weights_as_trained_and_of_masks(tmp_path: Path) -> None:
    checkpoint = own(tmp_path / "ours", classes=0)
    tensors = checkpoint.tensors("model")
    tensors["conv_in.weight"][::2] = 0.0
    tensors["middle.0.conv1.weight"][:, 1] = -0.0
    again = write_checkpoint(tmp_path / "masked", 4, checkpoint.metadata, {"ema": tensors, "model": tensors})
    convert("export", again.path, tmp_path / "zeros")
    convert("export", checkpoint.path, tmp_path / "trained", "--weights", "model")
    for folder, expected in (("zeros", tensors), ("trained", checkpoint.tensors("model"))):
        found = load_file(tmp_path / folder / "unet" / WEIGHTS)
        assert_same_tensors(found, {diffusers_name(name): tensor for name, tensor in expected.items()})
    assert (load_file(tmp_path / "zeros" / "unet" / WEIGHTS)["conv_in.weight"][::2] == 0).all()


def test_classes_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = own(tmp_path / "ours")
    convert("export", checkpoint.path, tmp_path / "theirs")
    assert 'class_labels of 0 to 10 (10 is "no class")' in capsys.readouterr().out
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "theirs")
    assert pipeline.unet.config["num_class_embeds"] == NUM_CLASSES + 1
    assert_same_outputs(checkpoint.network(), pipeline.unet, NUM_CLASSES + 1)
    x, t, _ = inputs(checkpoint.network())
    with torch.no_grad():
        without = pipeline.unet(x, t, torch.full((len(x),), NUM_CLASSES)).sample
        assert (without - checkpoint.network()(x, t, None)).abs().max() <= 1e-5

    with pytest.raises(ValueError, match="class_labels"):
        pipeline(num_inference_steps=2)
    labels = [0, 3, 9, NUM_CLASSES]  # As --help says.
    pipeline.unet.forward = functools.partial(pipeline.unet.forward, class_labels=torch.tensor(labels))
    assert_same_images(their_images(pipeline, 4, 9), sample(checkpoint, [0, 3, 9, NO_LABEL], 9))

    convert("import", tmp_path / "theirs", tmp_path / "back")
    back = read_checkpoint(tmp_path / "back")
    assert_same_tensors(back.tensors("ema"), checkpoint.tensors("ema"))
    assert (back.metadata["num_classes"], back.class_names) == (NUM_CLASSES, tuple(NAMES))
    assert back.config().train.label_dropout > 0

    (tmp_path / "theirs" / "classes.json").unlink()
    convert("import", tmp_path / "theirs", tmp_path / "nameless", "--null-class")
    nameless = read_checkpoint(tmp_path / "nameless")
    assert_same_tensors(nameless.tensors("ema"), checkpoint.tensors("ema"))
    assert nameless.class_names == tuple(map(str, range(NUM_CLASSES)))


def test_a_no_class_that_was_never_trained_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = own(tmp_path / "ours", train__label_dropout=0.0)
    convert("export", checkpoint.path, tmp_path / "theirs")
    assert "of 0 to 9:" in capsys.readouterr().out
    assert UNet2DModel.from_pretrained(tmp_path / "theirs" / "unet").config["num_class_embeds"] == NUM_CLASSES
    convert("import", tmp_path / "theirs", tmp_path / "back")
    assert "needs train.label_dropout above 0" in capsys.readouterr().out
    back, expected = read_checkpoint(tmp_path / "back").tensors("ema"), checkpoint.tensors("ema")
    assert not back["label_embedding.weight"][-1].any()
    expected["label_embedding.weight"][-1] = 0.0
    assert_same_tensors(back, expected)


@pytest.mark.parametrize(("word", "label"), [("none", NO_LABEL), ("3", 3), ("digit 7", 7)])
def test_export_of_a_single_class(word: str, label: int, tmp_path: Path) -> None:
    checkpoint = own(tmp_path / "ours")
    convert("export", checkpoint.path, tmp_path / "theirs", "--label", word)
    assert not (tmp_path / "theirs" / "classes.json").exists()
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "theirs")
    assert_same_images(their_images(pipeline, 3, 9), sample(checkpoint, [label] * 3, 9))


@pytest.mark.slow
def test_as_a_process(tmp_path: Path, forks: Forks) -> None:
    """Import as a user calls it, and images of what was imported."""
    original = theirs()
    source = save(tmp_path / "theirs", original)
    command = [str(forks.interpreter), str(SCRIPT), "import", str(source), "ours"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ours: 71,323 weights, no classes, images of 3 x 16^2; differs from ")
    assert done.stderr == ""
    convert("export", tmp_path / "ours", tmp_path / "back")
    assert_same_tensors(load_file(tmp_path / "back" / "unet" / WEIGHTS), dict(original.state_dict()))
    assert {path.name for path in tmp_path.iterdir()} == {"theirs", "ours", "back"}
    words = ["--checkpoint", str(tmp_path / "ours"), "--steps", "2", "--out", str(tmp_path / "samples")]
    assert sample_images.main(words) == 0
    assert (tmp_path / "samples" / "none-7.png").is_file()


# What is refused.


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("saved") / "theirs")


@pytest.fixture
def source(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "theirs"))


WRONG_NETWORKS: list[tuple[str, Any, str]] = [
    ("_class_name", "UNet2DConditionModel", "'UNet2DModel'"),
    ("center_input_sample", True, "False"),
    ("time_embedding_type", "fourier", "'positional'"),
    ("freq_shift", 4, "a number >= -4096 and < 4, half of the first width"),
    ("freq_shift", "much", "a number >= -4096 and < 4"),
    ("flip_sin_to_cos", "maybe", "False or True"),
    ("mid_block_type", None, "'UNetMidBlock2D'"),
    ("mid_block_scale_factor", 1.4, "1"),
    ("downsample_padding", 2, "0 or 1"),
    ("downsample_type", "resnet", "'conv'"),
    ("upsample_type", "resnet", "'conv'"),
    ("act_fn", "gelu", "'silu' or 'swish'"),
    ("norm_eps", 0.0, "a number > 0 and <= 0.1"),
    ("resnet_time_scale_shift", "spatial", "'default' or 'scale_shift'"),
    ("add_attention", False, "True"),
    ("class_embed_type", "timestep", "None"),
    ("block_out_channels", "8,16,16", "a list of widths"),
    ("sample_size", None, "one number, a multiple of 4; give it with --image-size"),
    ("sample_size", [16, 32], "one number, a multiple of 4"),
    ("sample_size", 18, "one number, a multiple of 4"),
    ("out_channels", 6, "as many as in_channels, 3"),
    ("layers_per_block", [1, 2, 1], "one integer >= 1"),
    ("time_embedding_dim", 0.5, "None or an integer >= 1"),
    ("norm_num_groups", 16, "a divisor of every width in [8, 16, 16]"),
    ("attn_norm_num_groups", 8, "None or norm_num_groups, 4"),
    ("attention_head_dim", 6, "None or a divisor of the widths with attention, [16]"),
    ("num_class_embeds", 0, "None or an integer >= 1"),
    ("num_class_embeds", 10**13, "None or an integer >= 1"),
]
"""Keys with a value that is refused, and what the message says is expected."""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(({key: value}, f"{key} = {value!r}: expected {expected}") for key, value, expected in WRONG_NETWORKS),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D", "DownBlock2D"]}, "expected 3 of DownBlock2D and Attn"),
        ({"down_block_types": ["DownBlock2D"]}, "expected 3 of DownBlock2D and AttnDownBlock2D"),
        (
            {"up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D"]},
            "expected the mirror image of down_block_types",
        ),
        ({"in_channels": 4, "out_channels": 4}, "in_channels = 4: expected 1 or 3"),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups = None: expected norm_num_groups, 4"),
        ({"attention_head_dim": 16, **blocks([1, 1, 1])}, "None or a divisor of the widths with attention, [8, 16]"),
        ({"dropout": "much"}, "model.dropout = 'much': expected a number"),
        ({"num_class_embeds": 3}, "'class_embedding.weight': this weight of the UNet2DModel is missing (1 are)"),
        ({"layers_per_block": 2}, "this weight of the UNet2DModel is missing"),
    ],
)
def test_networks_that_are_not_ours(
    changes: dict[str, Any], said: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(source / "unet" / "config.json", **changes)
    assert said in refusal(capsys, "import", source, tmp_path)


def test_all_that_does_not_fit_is_said_at_once(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"norm_eps": 1, "freq_shift": 9, "class_embed_type": "identity", "downsample_padding": 3}
    edit(source / "unet" / "config.json", **wrong)
    said = refusal(capsys, "import", source, tmp_path)
    assert all(key in said for key in (*wrong, "unet/config"))


WRONG_SCHEDULES: list[tuple[str, Any, str]] = [
    ("_class_name", "PNDMScheduler", "one of DDPMScheduler, DDIMScheduler"),
    ("beta_schedule", "scaled_linear", "one of linear, squaredcos_cap_v2"),
    ("variance_type", "learned_range", "one of fixed_small"),
    ("prediction_type", "flow", "one of epsilon"),
    ("predict_epsilon", False, "True"),
    ("thresholding", True, "False"),
    ("clip_sample_range", 2.0, "1.0"),
    ("num_train_timesteps", 1, "an integer >= 2"),
    ("beta_end", 1.5, "a number > 0 and <= 0.999"),
]
"""Keys with a value that is refused, and what the message says is expected."""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(({key: value}, f"{key} = {value!r}: expected {expected}") for key, value, expected in WRONG_SCHEDULES),
        ({"rescale_betas_zero_snr": True}, "diffusion.zero_terminal_snr needs x0 or v"),
        ({"num_train_timesteps": 200_000}, "beta_end = 0.02 at last: expected less than 0.005 for 200000 timesteps"),
        ({"beta_start": 0.5}, "diffusion.beta_start = 0.5: expected at most diffusion.beta_end = 0.02"),
        (
            {"trained_betas": [0.1, 0.3, 0.2]},
            "trained_betas = [0.1, 0.3, 0.2, ..]: expected those of a linear or cosine",
        ),
        ({"trained_betas": "many"}, "trained_betas: expected a list of numbers"),
    ],
)
def test_schedules_that_are_not_ours(
    changes: dict[str, Any], said: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(source / "scheduler" / "scheduler_config.json", **changes)
    assert said in refusal(capsys, "import", source, tmp_path)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def test_folders_that_hold_something_else(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*more: str) -> str:
        return refusal(capsys, "import", source, tmp_path, *more)

    unet, weights = source / "unet" / "config.json", source / "unet" / WEIGHTS
    assert "--null-class: the model has num_class_embeds = 0" in said("--null-class")

    whole = weights.read_bytes()
    tensors = load_file(weights)
    save_file(tensors | {"conv_in.bias": torch.full((8,), torch.nan)}, weights)
    assert "'conv_in.bias' holds values that are not finite" in said()
    save_file(tensors | {"conv_in.bias": torch.zeros(9)}, weights)
    assert "'conv_in.bias': has the shape [9]; expected [8] by config.json" in said()
    save_file(tensors | {"conv_in.bias": torch.zeros(8, dtype=torch.int64)}, weights)
    assert "'conv_in.bias': is of type torch.int64" in said()
    twice = "mid_block.attentions.0.query.bias"
    save_file(tensors | {twice: torch.zeros(16)}, weights)
    assert "occurs twice" in said()
    weights.write_bytes(whole[:1000])
    assert "cannot be read as weights" in said()
    weights.unlink()
    assert "no weights here (expected diffusion_pytorch_model.safetensors or " in said()
    torch.save({"conv_in.bias": Payload(tmp_path / "ran")}, weights.with_suffix(".bin"))
    assert "cannot be read as weights" in said()
    weights.with_suffix(".bin").unlink()
    weights.write_bytes(whole)

    for text in ("{", "[]"):
        (source / "scheduler" / "scheduler_config.json").write_text(text)
        assert "cannot be read as a JSON object" in said()
    edit(source / "model_index.json", vqvae=["diffusers", "VQModel"])
    assert "a pipeline of scheduler, unet, vqvae; expected unet and scheduler" in said()
    unet.unlink()
    (source / "model_index.json").unlink()
    assert "no Diffusers model here" in said()


def test_class_names_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "theirs", theirs({"num_class_embeds": 3}))
    for content in ({}, {"classes": ["a", "b"], "null_class": False}, {"classes": [1, 2], "null_class": True}):
        (source / "classes.json").write_text(json.dumps(content))
        assert "classes.json" in refusal(capsys, "import", source, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.channel_multipliers", [2, 2], "UNet2DModel's first convolution"),
        ("model.self_conditioning", True, "UNet2DModel has no counterpart"),
        ("model.learned_variance", True, "UNet2DModel has no counterpart"),
        ("diffusion.prediction", "edm", "DDPMScheduler does not know it; expected one"),
        ("model.norm_groups", 16, "UNet2DModel has one number of groups; here they are 8, 16"),
        ("model.num_heads", 2, "UNet2DModel has heads of one width; here they would be 4, 8 wide"),
    ],
)
def test_own_networks_that_are_not_theirs(
    key: str, value: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more: dict[str, Any] = {"model__attention_resolutions": [8, 4]} if key == "model.num_heads" else {}
    checkpoint = own(tmp_path / "ours", **{key.replace(".", "__"): value}, **more)
    assert f"{key} = {value!r}: {said}" in refusal(capsys, "export", checkpoint.path, tmp_path)


def test_own_checkpoints_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    narrow = {
        "down.0.blocks.0.conv1": {"in_channels": 8, "out_channels": 4},
        "down.0.blocks.0.embed": {"in_features": 32, "out_features": 4},
        "down.0.blocks.0.norm2": {"num_channels": 4, "num_groups": 4},
        "down.0.blocks.0.conv2": {"in_channels": 4, "out_channels": 8},
    }
    pruned = own(tmp_path / "pruned", structure=narrow)
    said = refusal(capsys, "export", pruned.path, tmp_path)
    assert "down.0.blocks.0.conv1: its weight is 4 x 8 x 3 x 3" in said
    assert "prune with prune.widths=diffusers" in said
    labelled, unlabelled = own(tmp_path / "labelled").path, own(tmp_path / "unlabelled", classes=0).path
    undropped = own(tmp_path / "undropped", train__label_dropout=0.0).path
    assert "the model has no classes" in refusal(capsys, "export", unlabelled, tmp_path, "--label", "none")
    assert "trained with train.label_dropout = 0" in refusal(capsys, "export", undropped, tmp_path, "--label", "none")
    assert "--label = '10': expected none, or one of 0 to 9" in refusal(
        capsys, "export", labelled, tmp_path, "--label", "10"
    )
    (labelled / "model.safetensors").unlink()
    assert refusal(capsys, "export", labelled, tmp_path, "--weights", "model").endswith(" holds ema\n")
    assert "no checkpoint here" in refusal(capsys, "export", tmp_path / "nowhere", tmp_path)


def test_a_target_that_is_there_is_left_alone(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").touch()
    assert "exists already" in refusal(capsys, "import", source, tmp_path)
    shutil.rmtree(tmp_path / "target")
    (tmp_path / "target").write_text("mine")
    assert "exists already" in refusal(capsys, "import", source, tmp_path)
    (tmp_path / "target").unlink()
    (tmp_path / "target").mkdir()  # An empty folder is taken.
    convert("import", source, tmp_path / "target")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_nothing_is_half_written(
    error: BaseException,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*places: Any) -> None:
        folder = next(place for place in places if isinstance(place, Path))
        folder.mkdir(exist_ok=True)
        (folder / "some").touch()
        raise error

    checkpoint = own(tmp_path / "ours").path
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(importer, "write_checkpoint", fail)
    monkeypatch.setattr(DDPMPipeline, "save_pretrained", fail)
    for direction, place in (("import", source), ("export", checkpoint)):
        status = convert_diffusers.main([direction, str(place), str(tmp_path / "target")])
        assert status == (130 if isinstance(error, KeyboardInterrupt) else 2)
        assert sorted(tmp_path.rglob("*")) == before
        assert capsys.readouterr().err.count("\n") == 1


def test_without_diffusers(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    said = refusal(capsys, "import", source, tmp_path)
    assert said == 'error: Diffusers is needed: pip install "diffusion-sweeps[diffusers]"\n'


def test_from_the_hub(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        if name != "google/ddpm-cifar10-32":
            raise OSError(f"404 Client Error\n\nRepository {name} not found")
        if "unet/diffusion_pytorch_model.bin" in allow_patterns:
            torch.save(load_file(weights), weights.with_suffix(".bin"))
            weights.unlink()
        return str(source if len(asked) > 1 else tmp_path)

    weights = source / "unet" / WEIGHTS
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    convert("import", "google/ddpm-cifar10-32", tmp_path / "ours")
    assert len(asked) == 2  # Nothing is in safetensors there.
    assert all({"model_index.json", "unet/config.json", "scheduler/scheduler_config.json"} <= set(a) for a in asked)
    said = refusal(capsys, "import", "google/nothing", tmp_path)
    assert "the download from the hub failed: 404 Client Error Repository google/nothing not found" in said
    assert "expected a folder, or a hub name" in refusal(capsys, "import", "nowhere", tmp_path)


@pytest.mark.parametrize(
    ("module", "what"),
    [(diffusers_networks, "build_schedule"), (exporter, "unet_config"), (importer, "our_network")],
)
def test_a_knob_that_the_conversion_has_not_heard_of(
    module: Any,
    what: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both sides are compared before anything is written."""
    checkpoint = own(tmp_path / "ours", classes=0).path
    original = getattr(module, what)

    def other(*words: Any, **more: Any) -> Any:
        found = original(*words, **more)
        if what == "build_schedule":
            return type(found)(found.alphas.roll(1), found.sigmas.roll(1))
        if what == "unet_config":
            return found | {"flip_sin_to_cos": True}
        found.conv_in.bias = torch.nn.Parameter(found.conv_in.bias + 1.0)
        return found

    monkeypatch.setattr(module, what, other)
    if what != "unet_config":
        assert "disagree" in refusal(capsys, "import", source, tmp_path)
    if what != "our_network":
        assert "disagree" in refusal(capsys, "export", checkpoint, tmp_path)


def test_what_counts_as_equal() -> None:
    ours = tiny_network(num_classes=0)
    unet = theirs(
        {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16], **blocks([0, 1])}
    )
    unet.load_state_dict({diffusers_name(name): tensor for name, tensor in ours.state_dict().items()})
    assert diffusers_networks.compare(ours, unet, []) < 1e-5
    with torch.no_grad():
        unet.mid_block.resnets[1].conv2.bias += 0.01
    with pytest.raises(ConfigError, match="disagree"):
        diffusers_networks.compare(ours, unet, [])
    config = tiny_config(diffusion__schedule="linear", diffusion__timesteps=1000)
    diffusers_networks.compare_schedules(config, {})
    with pytest.raises(ConfigError, match="disagree"):
        diffusers_networks.compare_schedules(config, {"beta_end": 0.021})
