"""Layers of values, the words that `wandb agent` passes, and files: each becomes the configuration that it spells."""

from __future__ import annotations

import math
import subprocess
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from forks import shared_forks
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from agent.__main__ import main
from agent.config import TrialConfig, build_config, config_from_words
from diffusion_core.config import (
    NONE_WORDS,
    PRESETS,
    ConfigError,
    UpsampleConfig,
    flatten,
    help_text,
    list_knobs,
    split_argv,
    to_yaml,
)
from diffusion_core.registries import DATASETS, METRICS
from diffusion_core.registry import Choice

ROOT = Path(__file__).parents[2]
KNOBS = dict(list_knobs(TrialConfig))
SECTIONS = sorted({key.partition(".")[0] for key in KNOBS if "." in key})


def parse(*words: str) -> TrialConfig:
    return config_from_words(split_argv(list(words)))


def value(config: TrialConfig, key: str) -> Any:
    return flatten(config)[key]


def config_file(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return f"--config={path}"


# Layers


def test_the_defaults_are_the_cifar10_model_of_ho_et_al() -> None:
    config = parse()
    assert config == TrialConfig()
    assert (config.data.name, config.model.channels, config.model.channel_multipliers) == ("cifar10", 128, [1, 2, 2, 2])
    assert (config.train.steps, config.train.lr, config.diffusion.timesteps) == (800_000, 2e-4, 1000)


def test_a_preset_is_overridden_by_the_file_and_the_file_by_the_command_line(tmp_path: Path) -> None:
    file = config_file(tmp_path, "preset: digits\ntrain.lr: 0.5\ntrain.steps: 7\n")
    config = parse(file, "--train.steps=9")
    assert config.train.steps == 9, "the command line"
    assert config.train.lr == 0.5, "the file"
    assert config.train.batch_size == 64, "the preset"
    assert config.train.beta2 == 0.999, "the default"
    # The order of the words does not matter: the file comes first.
    assert parse("--train.steps=9", file) == config


def test_the_preset_of_the_command_line_replaces_that_of_the_file(tmp_path: Path) -> None:
    file = config_file(tmp_path, "preset: digits\ntrain.lr: 0.5\n")
    config = parse(file, "--preset=mnist")
    assert (config.preset, config.data.name, config.train.lr) == ("mnist", "mnist", 0.5)
    assert config.train.batch_size == 128, "nothing of the other preset remains"


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_is_a_configuration_and_changes_only_what_it_says(preset: str) -> None:
    config, default = flatten(parse(f"--preset={preset}")), flatten(TrialConfig())
    assert config == default | PRESETS[preset] | {"preset": preset}


def test_of_a_word_given_twice_the_last_counts() -> None:
    assert parse("--train.lr=0.1", "--train.lr=0.2").train.lr == 0.2


def test_of_a_section_and_its_knob_the_last_counts() -> None:
    knob, section = "--train.lr=0.1", "--train={'lr': 0.2}"
    assert parse(knob, section).train.lr == 0.2
    assert parse(section, knob).train.lr == 0.1
    assert parse(knob, section, knob).train.lr == 0.1


def test_several_files_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    first = config_file(tmp_path, "preset: digits\ntrain.lr: 0.5\ntrain.steps: 7\n")
    second = config_file(tmp_path / "more", "train: {lr: 0.25}\n")
    config = parse(first, "--seed=3", second)
    assert (config.preset, config.train.lr, config.train.steps, config.seed) == ("digits", 0.25, 7, 3)
    assert parse(second, first).train.lr == 0.5


def test_yaml_keys_may_be_dotted_nested_or_both(tmp_path: Path) -> None:
    dotted = parse(config_file(tmp_path, "preset: digits\ntrain.lr: 0.5\nmodel.num_heads: 2\n"))
    nested = parse(config_file(tmp_path, "preset: digits\ntrain: {lr: 0.5}\nmodel:\n  num_heads: 2\n"))
    mixed = parse(config_file(tmp_path, "preset: digits\ntrain: {lr: 0.5}\nmodel.num_heads: 2\n"))
    assert dotted == nested == mixed
    assert (dotted.train.lr, dotted.model.num_heads) == (0.5, 2)


@pytest.mark.parametrize("text", ["", "# a comment\n", "train: {}\n", "---\n"])
def test_a_file_without_values_changes_nothing(text: str, tmp_path: Path) -> None:
    assert parse(config_file(tmp_path, text)) == TrialConfig()


def test_yaml_may_merge_anchors_and_override_what_is_merged(tmp_path: Path) -> None:
    text = "sample: &often {every: 5}\neval:\n  <<: *often\ncheckpoint:\n  <<: *often\n  every: 7\n"
    config = parse(config_file(tmp_path, text))
    assert (config.sample.every, config.eval.every, config.checkpoint.every) == (5, 5, 7)


# What `wandb agent` passes

SPELLINGS: list[tuple[str, str, Any]] = [
    ("train.lr", "0.1", 0.1),
    ("train.lr", "1e-05", 1e-5),
    ("train.lr", "1e-3", 1e-3),
    ("train.lr", "1", 1.0),
    ("train.lr", " 0.1 ", 0.1),
    ("train.steps", "64", 64),
    ("train.steps", "64.0", 64),
    ("train.steps", "1_000", 1000),
    ("train.steps", "1e3", 1000),
    ("ema.warmup", "True", True),
    ("ema.warmup", "true", True),
    ("ema.warmup", "1", True),
    ("ema.warmup", "False", False),
    ("ema.warmup", "false", False),
    ("ema.warmup", "0", False),
    ("data.horizontal_flip", "None", None),
    ("data.horizontal_flip", "False", False),
    ("data.horizontal_flip", "0", False),
    ("train.grad_clip", "None", None),
    ("train.grad_clip", "null", None),
    ("train.grad_clip", "none", None),
    ("train.grad_clip", "~", None),
    ("train.grad_clip", "0.5", 0.5),
    ("data.image_size", "None", None),
    ("data.image_size", "64", 64),
    ("prune.step", "12.0", 12),
    ("prune.method", "none", "none"),
    ("prune.method", "structured", "structured"),
    ("eval.classifier", "none", "none"),
    ("data.path", "None", None),
    ("data.path", "/my images/1, 2", "/my images/1, 2"),
    ("data.path", "123", "123"),
    ("data.path", "True", "True"),
    ("log.dir", "runs/a=b", "runs/a=b"),
    ("model.channel_multipliers", "[1, 2, 2]", [1, 2, 2]),
    ("model.channel_multipliers", "[1,2,2]", [1, 2, 2]),
    ("model.channel_multipliers", "1,2,2", [1, 2, 2]),
    ("model.channel_multipliers", "1, 2, 2", [1, 2, 2]),
    ("model.channel_multipliers", "(1, 2, 2)", [1, 2, 2]),
    ("model.channel_multipliers", "(1,2,2,)", [1, 2, 2]),
    ("model.channel_multipliers", "(1,)", [1]),
    ("model.channel_multipliers", "1", [1]),
    ("model.channel_multipliers", "1.0,2.0", [1, 2]),
    ("model.attention_resolutions", "[]", []),
    ("model.attention_resolutions", "", []),
    ("model.attention_resolutions", "()", []),
    ("ema.power_widths", "0.05,0.1", [0.05, 0.1]),
    ("ema.power_widths", "[]", []),
    ("ema.power_widths", "0.1", [0.1]),
    ("sample.guidance_interval", "None", None),
    ("sample.guidance_interval", "[0.3, 5]", [0.3, 5.0]),
    ("seed", "9223372036854775807", 2**63 - 1),
    ("seed", "9007199254740993", 2**53 + 1),
]
NEEDED = {
    "model.channel_multipliers": ["--model.attention_resolutions="],
    "sample.guidance_interval": ["--sample.guidance=2"],
}


@pytest.mark.parametrize(("key", "text", "expected"), SPELLINGS, ids=[f"{k}={t}" for k, t, _ in SPELLINGS])
def test_a_value_may_be_spelt_in_several_ways(key: str, text: str, expected: Any, tmp_path: Path) -> None:
    others = NEEDED.get(key, [])
    for words in ([f"--{key}={text}"], [f"--{key}", text]):
        parsed = value(parse(*others, *words), key)
        assert parsed == expected
        assert type(parsed) is type(expected)
    # As text in YAML, too.
    assert value(parse(*others, config_file(tmp_path, yaml.safe_dump({key: text}))), key) == expected


TYPED: list[tuple[str, str, Any]] = [
    ("train.lr", "0.1", 0.1),
    ("train.lr", "1e-3", 1e-3),  # Text to YAML 1.1, which wants a dot in it.
    ("train.lr", "1", 1.0),
    ("train.steps", "64.0", 64),
    ("train.steps", "1e3", 1000),
    ("ema.warmup", "false", False),
    ("ema.warmup", "off", False),
    ("train.grad_clip", "null", None),
    ("train.grad_clip", "", None),
    ("data.path", "null", None),
    ("model.channel_multipliers", "[1, 2, 2]", [1, 2, 2]),
    ("model.channel_multipliers", "['1', 2.0]", [1, 2]),
    ("model.channel_multipliers", "1,2,2", [1, 2, 2]),
    ("model.channel_multipliers", "3", [3]),
    ("model.channel_multipliers", "3.0", [3]),
    ("model.channel_multipliers", "\n  - 1\n  - 2", [1, 2]),
    ("model.attention_resolutions", "[]", []),
]


@pytest.mark.parametrize(("key", "text", "expected"), TYPED, ids=[f"{k}: {t!r}" for k, t, _ in TYPED])
def test_a_yaml_value_may_be_typed(key: str, text: str, expected: Any, tmp_path: Path) -> None:
    file = config_file(tmp_path, f"{key}: {text}\n")
    parsed = value(parse(file, *NEEDED.get(key, [])), key)
    assert parsed == expected
    assert type(parsed) is type(expected)


def test_a_key_alone_means_true() -> None:
    words = split_argv(["--ema.warmup", "--log.progress", "--seed", "5"])
    assert words == {"ema.warmup": "true", "log.progress": "true", "seed": "5"}


def test_a_value_after_a_blank_may_be_negative_or_hold_an_equals_sign() -> None:
    assert split_argv(["--train.lr", "-0.1", "--log.dir", "a=b", "--data.path=--x"]) == {
        "train.lr": "-0.1",
        "log.dir": "a=b",
        "data.path": "--x",
    }


def test_a_section_may_come_as_the_text_of_a_dictionary() -> None:
    words = ["--preset=digits", "--train={'lr': 0.25, 'grad_clip': None}", "--model={'channel_multipliers': [1, 4]}"]
    config = parse(*words)
    assert (config.train.lr, config.train.grad_clip, config.model.channel_multipliers) == (0.25, None, [1, 4])
    assert config.train.batch_size == 64, "what it does not name stays"


def test_what_wandb_adds_to_a_configuration_is_passed_over(tmp_path: Path) -> None:
    config = parse("--_wandb={'code_path': 'code/x.py', 'e': {'a': 1}}", "--wandb_version=1", "--seed=3")
    assert config == parse("--seed=3")
    assert parse(config_file(tmp_path, "wandb_version: 1\n_wandb: {t: {a: 1}}\nseed: 3\n")) == config


AGENT_VALUES: dict[str, Any] = {
    "preset": "digits",
    "train.lr": 1e-05,
    "train.steps": 64.0,
    "ema.warmup": False,
    "train.grad_clip": None,
    "model.channel_multipliers": [1, 2],
    "model": {"dropout": 0.25, "num_heads": 2},
    "data.val_fraction": "0.1",
    "_wandb": {"t": 1},
}
FORMS = ["args", "args_no_equals", "args_no_hyphens", "args_json", "args_append_hydra", "args_override_hydra"]


@pytest.mark.parametrize("form", [*FORMS, "args_json_file"])
def test_words_made_by_wandb_itself_are_understood(form: str, tmp_path: Path) -> None:
    command = {"args": {key: {"value": entry} for key, entry in AGENT_VALUES.items()}}
    made = create_sweep_command_args(command)
    if form == "args_json_file":
        (tmp_path / "parameters.json").write_text(made["args_json"][0])
        words = ["--config", str(tmp_path / "parameters.json")]
    else:
        words = made[form]
    config = parse(*words)
    assert config == build_config(AGENT_VALUES)
    assert (config.train.lr, config.train.steps, config.ema.warmup, config.train.grad_clip) == (1e-5, 64, False, None)
    assert (config.model.channel_multipliers, config.model.dropout, config.model.num_heads) == ([1, 2], 0.25, 2)


def test_without_flags_for_false_wandb_passes_true_as_a_flag() -> None:
    command = {"args": {"seed": {"value": 3}, "ema.warmup": {"value": True}, "train.lr": {"value": 0.5}}}
    config = parse("--ema.warmup=false", *create_sweep_command_args(command)["args_no_boolean_flags"])
    assert (config.seed, config.ema.warmup, config.train.lr) == (3, True, 0.5)


def test_configurations_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TrialConfig().train.lr = 0.1


# Any valid configuration, written out and read back


def of_kind(annotation: Any, metadata: tuple[Any, ...] = ()) -> st.SearchStrategy[Any]:
    """Values that a knob of this type accepts, by the schema's own bounds."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        inner, *extra = typing.get_args(annotation)
        return of_kind(
            inner, (*metadata, *(m for e in extra for m in (e.metadata if isinstance(e, FieldInfo) else [e])))
        )
    if origin in (typing.Union, types.UnionType):
        return st.one_of([of_kind(part, metadata) for part in typing.get_args(annotation)])
    if origin is Literal:
        return st.sampled_from(typing.get_args(annotation))
    for choice in metadata:
        if isinstance(choice, Choice):
            return st.sampled_from(choice.values())
    bounds = {name: getattr(m, name) for m in metadata for name in ("gt", "ge", "lt", "le") if hasattr(m, name)}
    if origin is list:
        sizes = {name: getattr(m, name) for m in metadata for name in ("min_length", "max_length") if hasattr(m, name)}
        (item,) = typing.get_args(annotation)
        return st.lists(of_kind(item), min_size=sizes.get("min_length", 0), max_size=sizes.get("max_length", 4))
    if annotation is type(None):
        return st.none()
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        low = bounds.get("ge", bounds.get("gt", -1) + 1)
        return st.integers(low, bounds.get("le", bounds.get("lt", 10**9) - 1))
    if annotation is float:
        return st.floats(
            bounds.get("ge", bounds.get("gt")),
            bounds.get("le", bounds.get("lt")),
            exclude_min="gt" in bounds,
            exclude_max="lt" in bounds,
            allow_nan=False,
            allow_infinity=False,
        )
    assert annotation is str, annotation
    characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    return st.text(characters, min_size=1).filter(lambda text: text.strip() not in NONE_WORDS)


def made_to_go_together(values: dict[str, Any]) -> None:
    """Change what excludes each other among the knobs of the formulation, its sampling and the averages."""
    if values["diffusion.schedule"] == "karras":
        values |= {
            "diffusion.prediction": "edm",
            "diffusion.logsnr_shift": 0.0,
            "diffusion.zero_terminal_snr": False,
            "model.learned_variance": False,
        }
    elif values["diffusion.zero_terminal_snr"] and values["diffusion.prediction"] not in ("x0", "v"):
        values["diffusion.prediction"] = "v"
    values["diffusion.sigma_max"] = values["diffusion.sigma_min"] * 2 + values["diffusion.sigma_max"]
    if math.isinf(values["diffusion.sigma_max"]):
        values |= {"diffusion.sigma_min": 1e-3, "diffusion.sigma_max": 1e3}
    if values["sample.variance"] == "learned" and not values["model.learned_variance"]:
        values["sample.variance"] = "fixed_small"
    interval = values["sample.guidance_interval"]
    if interval is not None:
        low, high = sorted(interval)
        values["sample.guidance_interval"] = None if values["sample.guidance"] == 1.0 or low == high else [low, high]
    if values["ema.average_from"] is not None:
        values["ema.average_from"] = min(values["ema.average_from"], values["train.steps"] - 1)
    values["ema.power_widths"] = list({f"{width:g}": width for width in values["ema.power_widths"]}.values())
    if {"power": not values["ema.power_widths"], "average": values["ema.average_from"] is None}.get(
        values["ema.sampled"]
    ):
        values["ema.sampled"] = "decay"


def starts_made_to_go_together(values: dict[str, Any]) -> None:
    """Change what excludes each other among the knobs of pruning, of what a run starts from, and of its teacher."""
    if values["prune.block_keep"]:
        values["prune.block_keep"] = [0.5] * (2 * len(values["model.channel_multipliers"]) + 1)
    if values["prune.widths"] == "diffusers":
        values |= {"prune.depth": 0.0, "prune.blocks": []}
    for section in ("init", "distill"):
        if values[f"{section}.checkpoint"] is not None:
            values[f"{section}.artifact"] = None
    if values["init.checkpoint"] is None:
        values["init.weights"] = "ema"
    taught = values["distill.output"] > 0 or values["distill.features"] > 0
    named = values["distill.checkpoint"] is not None or values["distill.artifact"] is not None
    if named and not taught:
        values["distill.output"] = 1.0
    untrained = values["prune.method"] in ("none", "snip", "synflow", "rigl") or values["prune.step"] == 0
    if taught and not named and untrained:
        values["distill.checkpoint"] = "runs/teacher"


def masks_made_to_go_together(values: dict[str, Any]) -> None:
    """Change what excludes each other among the knobs of masks and lotteries."""
    if values["prune.profile"] == "blocks" and (values["prune.method"] == "lottery" or not values["prune.block_keep"]):
        values["prune.profile"] = "erk"
    if values["prune.method"] in ("gradual", "rigl"):
        values |= {"prune.step": None, "prune.until": None, "prune.interval": 1}
        values["train.steps"] += 8
    if values["prune.method"] == "lottery":
        values["prune.rewind_step"] = min(values["prune.rewind_step"], values["train.steps"] - 1)
        values |= dict.fromkeys(("init.checkpoint", "init.artifact", "distill.checkpoint", "distill.artifact"))
        values |= {"init.weights": "ema", "distill.output": 0.0, "distill.features": 0.0}


def steps_made_to_go_together(values: dict[str, Any]) -> None:
    """Change what excludes each other among the knobs of step distillation."""
    if values["sample.start_level"] is not None:
        values |= {"sample.start_level": 1e30, "sample.steps": 1}
    if values["prune.method"] == "lottery" or values["steps.method"] == "none":
        values["steps.method"] = "none"
        return
    values |= {
        "train.steps": values["train.steps"] + 8,  # Enough for some after pruning.
        "prune.step": None,
        "prune.until": None,
        "steps.step": None,
        "steps.target": 1,
        "steps.start": 2,
        "steps.guidance": None,
        "steps.start_level": 1e30 if values["diffusion.prediction"] == "eps" else None,
        "steps.weighting": "auto",
        "ema.average_from": None,
        "ema.sampled": "decay",
        "checkpoint.best_metric": "train/loss",
    }
    if values["prune.method"] == "none":  # It may start at once.
        values |= {"distill.checkpoint": None, "distill.artifact": None, "distill.output": 0.0, "distill.features": 0.0}


@st.composite
def configurations(draw: st.DrawFn) -> TrialConfig:
    """Random values for every knob, made to go together."""
    listed = {"plugins", "prune.blocks", "model.channel_multipliers", "model.attention_resolutions"}
    values = {
        key: draw(of_kind(field.annotation, tuple(field.metadata)), label=key)
        for key, field in KNOBS.items()
        if key not in listed
    }
    values["prune.blocks"] = draw(st.lists(st.sampled_from(["middle.1", "down.0.blocks.0"]), unique=True))
    values["plugins"] = draw(st.lists(st.sampled_from(["json", "email.message"]), unique=True))
    levels = draw(st.integers(1, 4))
    size = draw(st.none() | st.integers(1, 1024 // 2**levels).map(lambda n: max(n, 4) * 2 ** (levels - 1)))
    if size is None:
        default = DATASETS[values["data.name"]].size
        levels = min(levels, int(math.log2(default & -default)) + 1)
    pixels = size or DATASETS[values["data.name"]].size
    values["data.image_size"] = size
    values["upsample.factor"] = draw(st.sampled_from([None, *(n for n in range(2, 17) if pixels % n == 0)]))
    noise = sorted(values[f"upsample.{name}"] for name in ("sample_noise", "noise"))
    without = UpsampleConfig().sample_noise, UpsampleConfig().noise
    values["upsample.sample_noise"], values["upsample.noise"] = noise if values["upsample.factor"] else without
    if values["upsample.factor"]:  # Held-out images are enlarged, so nothing compares with them.
        values["eval.reference"] = "train"
        chosen = values["eval.figures"]
        values["eval.figures"] = [name for name in chosen if getattr(METRICS[name], "split", "train") == "train"]
    values["model.channel_multipliers"] = draw(st.lists(st.integers(1, 9), min_size=levels, max_size=levels))
    resolutions = [pixels // 2**depth for depth in range(levels)]
    values["model.attention_resolutions"] = draw(st.lists(st.sampled_from(resolutions), unique=True))
    heads = [n for n in range(1, 65) if values["model.channels"] % n == 0]
    if values["model.head_channels"] is None:
        values["model.num_heads"] = draw(st.sampled_from(heads))
    else:
        values["model.head_channels"], values["model.num_heads"] = draw(st.sampled_from(heads)), 1
    values["model.frequency_shift"] = min(values["model.frequency_shift"], values["model.channels"] // 2 - 1.0)
    if values["data.name"] == "folder":
        values["data.path"] = values["data.path"] or "images"
    elif values["data.name"] == "digits":
        values["data.path"] = None
    betas = sorted(values[f"diffusion.{end}"] for end in ("beta_start", "beta_end"))
    values["diffusion.beta_start"], values["diffusion.beta_end"] = betas
    values["sample.steps"] = draw(st.integers(1, values["diffusion.timesteps"]))
    if values["model.class_conditional"] and values["train.label_dropout"] == 1.0:
        values["train.label_dropout"] = 0.5
    if not (values["model.class_conditional"] and values["train.label_dropout"]):
        values["sample.guidance"] = 1.0
    values["train.batch_size"] = values["train.accumulation"] * draw(st.integers(1, 1000))
    if not values["model.class_conditional"] and values["eval.classifier"] == "network":
        values["eval.classifier"] = "auto"
    if not values["model.class_conditional"]:
        values["eval.figures"] = [f for f in values["eval.figures"] if not METRICS[f].labels]
    files = ["inception", "classifier", "nets/a b.pt", "c.safetensors"]
    values["eval.extractors"] = draw(st.lists(st.sampled_from(files), min_size=1, max_size=3))
    values["checkpoint.best_metric"] = draw(st.sampled_from(["val/loss", "train/loss"]))
    values["train.steps"] += 1
    if values["prune.step"] is not None:
        values["prune.step"] = draw(st.integers(0, values["train.steps"] - 1))
    made_to_go_together(values)
    starts_made_to_go_together(values)
    masks_made_to_go_together(values)
    if values["prune.method"] == "structured":
        values["prune.widths"] = "free"  # The other value restricts several sections.
    if values["prune.method"] == "structured" and values["ema.average_from"] is not None:
        first = values["train.steps"] // 2 if values["prune.step"] is None else values["prune.step"]
        values["ema.average_from"] = min(values["ema.average_from"], values["train.steps"] - first - 1)
    steps_made_to_go_together(values)
    config = build_config(values)
    assert flatten(config) == values, "a value was changed on the way in"
    return config


def spellings(entry: Any) -> list[str]:
    """Texts that all mean one value."""
    if entry is None:
        return ["None", "null", "none"]
    if isinstance(entry, bool):
        return [str(entry), str(entry).lower(), str(int(entry))]
    if isinstance(entry, float):
        return [repr(entry), f"{entry:.17e}", f" {entry!r} "]
    if isinstance(entry, int):
        return [str(entry), f" {entry}", *([f"{entry}.0"] if entry < 2**53 else [])]
    if isinstance(entry, list):
        inner = [str(n) for n in entry]
        return [str(entry), ",".join(inner), f"({', '.join(inner)})", f"[{','.join(inner)},]" if entry else "[]"]
    return [entry]


@settings(max_examples=50, deadline=None)
@given(data=st.data(), config=configurations())
def test_any_configuration_as_command_line_words_is_read_back(data: st.DataObject, config: TrialConfig) -> None:
    words: list[str] = []
    for key, entry in data.draw(st.permutations(list(flatten(config).items()))):
        text = data.draw(st.sampled_from(spellings(entry)))
        apart = not text.startswith("--") and data.draw(st.booleans())
        words += [f"--{key}", text] if apart else [f"--{key}={text}"]
    assert parse(*words) == config


@settings(max_examples=30, deadline=None)
@given(config=configurations())
def test_any_configuration_in_the_words_of_wandb_is_read_back(config: TrialConfig) -> None:
    flat = {key: {"value": entry} for key, entry in flatten(config).items()}
    assert parse(*create_sweep_command_args({"args": flat})["args"]) == config
    nested = {key: {"value": entry} for key, entry in config.model_dump().items()}
    assert parse(*create_sweep_command_args({"args": nested})["args"]) == config


@settings(max_examples=30, deadline=None)
@given(config=configurations())
def test_any_configuration_as_a_file_is_read_back(
    config: TrialConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert parse(f"--config={path}") == config
    path.write_text(yaml.safe_dump(config.model_dump()), encoding="utf-8")
    assert parse(f"--config={path}") == config


def test_the_strategies_reach_every_knob() -> None:
    """The property tests above mean nothing for a knob that never leaves its default."""
    seen: dict[str, set[str]] = {key: set() for key in KNOBS}

    @settings(max_examples=200, deadline=None, database=None, derandomize=True)
    @given(config=configurations())
    def collect(config: TrialConfig) -> None:
        for key, entry in flatten(config).items():
            seen[key].add(repr(entry))

    collect()
    assert {key for key, entries in seen.items() if len(entries) < 2} == set()


# --help, --print-config, --dry-run


def test_help_names_every_knob_with_default_purpose_and_what_it_accepts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["--help", "all"]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith(help_text(TrialConfig).rstrip())
    for key, field in KNOBS.items():
        assert field.description, f"{key} has no docstring"
        assert out.count(f"\n  --{key}=") == 1, key
        assert " ".join(field.description.split()) in " ".join(out.split()), key
    assert "--train.lr=0.0002\n        Peak learning rate of AdamW. [a number > 0 and <= 1]" in out
    assert "--model.channel_multipliers=1,2,2,2\n" in out
    out = " ".join(out.split())
    assert "[a list of at least 1 and at most 8 such as 1,2,2, each an integer >= 1 or a number > 0]" in out
    assert "[an integer >= 4 and <= 1024 or None]" in out
    assert f"[an integer >= 0 and < {2**63}]" in out


def test_a_default_as_help_shows_it_may_be_given_as_it_stands() -> None:
    words = [line.strip() for line in help_text(TrialConfig).splitlines() if line.startswith("  --")]
    assert len(words) == len(KNOBS)
    assert parse(*words) == TrialConfig()


def test_print_config_prints_a_configuration_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset=digits", "--train.lr=1e-5", "--train.grad_clip=None", "--log.dir=yes"]
    assert main([*words, "--print-config"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert set(yaml.safe_load(printed.out)) == set(KNOBS)
    assert parse(config_file(tmp_path, printed.out)) == parse(*words)


def test_dry_run_says_how_large_the_model_is_and_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--preset=digits", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert yaml.safe_load(out)["preset"] == "digits"
    assert "# model: " in out
    assert "1 x 8 x 8" in out
    assert list(tmp_path.iterdir()) == []


def run_agent(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [shared_forks().interpreter, "-m", "agent", *words],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_real_command_prints_what_it_reads(tmp_path: Path) -> None:
    printed = run_agent("--preset", "digits", "--seed=7", "--print-config", folder=tmp_path)
    assert (printed.returncode, printed.stderr) == (0, "")
    (tmp_path / "all.yaml").write_text(printed.stdout)
    again = run_agent("--config=all.yaml", "--print-config", folder=tmp_path)
    assert again.stdout == printed.stdout
    helped = run_agent("--help", "all", folder=tmp_path)
    assert helped.returncode == 0
    assert all(f"--{key}=" in helped.stdout for key in KNOBS)


def test_layers_do_not_leak_into_each_other() -> None:
    layer: Mapping[str, Any] = {"preset": "digits", "train": {"lr": 0.5}}
    build_config(layer, {"train.lr": 0.25})
    assert layer == {"preset": "digits", "train": {"lr": 0.5}}
    assert build_config({"preset": "digits"}).train.lr == PRESETS["digits"]["train.lr"]


def test_a_number_that_a_sweep_passes_as_text_is_a_number_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """YAML reads 2e-3 as text. W&B records what the sweep says; the trial says that it is another kind of value."""
    chosen = {"train.lr": "2e-3", "train.steps": "1e3", "train.batch_size": "64", "data.name": "digits", "seed": 3}
    file = tmp_path / "chosen.yaml"
    file.write_text(yaml.safe_dump({key: {"value": value} for key, value in chosen.items()}))
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(file))
    words = [f"--{key}={value}" for key, value in chosen.items()]
    assert main(["--preset=digits", *words, "--print-config"]) == 0
    out, err = capsys.readouterr()
    values = yaml.safe_load(out)
    assert (values["train.lr"], values["train.steps"], values["train.batch_size"]) == (0.002, 1000, 64)
    told = sorted(line.partition(" = ")[0] for line in err.splitlines())
    assert told == ["train.batch_size", "train.lr", "train.steps"]
    assert "train.lr = '2e-3': text in the sweep's file, and so on W&B; here it is 0.002\n" in err


@pytest.mark.parametrize("spelled", ["1e3", "1E3", "1_000", "1000", "1000.0"])
@pytest.mark.parametrize("key", ["train.steps", "train.batch_size", "log.every"])
def test_an_integer_may_be_spelled_with_an_exponent(key: str, spelled: str, tmp_path: Path) -> None:
    for words in ([f"--{key}={spelled}"], [config_file(tmp_path, f"{key}: '{spelled}'")]):
        value = flatten(parse("--preset=digits", *words))[key]
        assert (value, type(value)) == (1000, int)
    with pytest.raises(ConfigError, match=rf"{key} = '1\.5e0': expected an integer"):
        parse("--preset=digits", f"--{key}=1.5e0")
