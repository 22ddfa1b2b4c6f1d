"""Sweep files: those that come with the project are right, and in a wrong one all is found before anything starts."""

from __future__ import annotations

import copy
import math
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from forks import Forks

from agent.config import build_config
from agent.sweep import __main__ as sweep
from agent.sweep import file
from agent.sweep.file import SweepFile, load_sweep
from agent.sweep.offline import offline_sweep
from diffusion_core.search import engine
from diffusion_core.search.macros import MACROS
from diffusion_core.search.space import SPREAD, flat_parameters, values_to_try
from diffusion_core.search.sweep import SweepError

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "sweeps").glob("*.yaml"))
COMMAND = ["${env}", "${interpreter}", "-m", "agent", "${args}"]
GOOD: dict[str, Any] = {
    "method": "random",
    "metric": {"name": "val/loss", "goal": "minimize"},
    "command": COMMAND,
    "parameters": {"preset": {"value": "digits"}, "train.lr": {"values": [0.1, 0.01]}},
}

TWO = [{"name": "val/loss", "goal": "minimize"}, {"name": "sample/macs", "goal": "minimize"}]
"""Objectives, one of them a cost."""


def changed(**changes: Any) -> dict[str, Any]:
    """The good sweep with some settings replaced (None: left out) and parameters added."""
    content = copy.deepcopy(GOOD)
    for key, value in changes.items():
        if key == "add":
            content["parameters"] |= value
        elif value is None:
            content.pop(key, None)
        else:
            content[key] = value
    return content


def write(folder: Path, content: Any) -> Path:
    path = folder / "sweep.yaml"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def load(folder: Path, content: Any) -> SweepFile:
    return load_sweep(write(folder, content))


# The files that come with the project


def test_there_are_sweep_files() -> None:
    assert len(FILES) >= 3


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_sweep_file_is_right_and_every_value_in_it_is_tried(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[dict[str, Any]] = []

    def build_and_note(values: Mapping[str, Any]) -> Any:
        tried.append(dict(values))
        return build_config(values)

    monkeypatch.setattr(file, "build_config", build_and_note)
    loaded = load_sweep(path)
    assert len(tried) > len(loaded.parameters)
    assert all(set(values) == set(loaded.parameters) for values in tried)
    for key, spec in loaded.parameters.items():
        for value in spec.get("values", [spec.get("value", spec.get("min")), spec.get("value", spec.get("max"))]):
            assert any(values[key] == value for values in tried), f"{key} = {value}"
    assert loaded.varied, "nothing varies between trials"
    assert loaded.metric is not None
    assert (loaded.grid_size() is None) == (loaded.config["method"] != "grid")
    if loaded.config["method"] != "grid":
        assert loaded.run_cap is not None, "such a search would go on for ever"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_first_suggestion_for_a_sweep_file_is_a_configuration(path: Path) -> None:
    loaded = load_sweep(path)
    parameters = loaded.search().suggest([], list)
    assert parameters is not None
    assert set(parameters) == set(loaded.parameters)
    build_config(parameters)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_of_a_sweep_file_has_a_comment_above_it(path: Path) -> None:
    """Above every setting and every parameter; what describes one parameter (values, min, ...) is under its comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# "), "a file starts with what it is for"
    uncommented = []
    commented = 0
    for number, line in enumerate(lines):
        text = line.lstrip()
        indent = len(line) - len(text)
        if not text or text.startswith(("#", "- ")):
            continue
        key = text.partition(":")[0]
        if lines[number - 1].lstrip().startswith("#"):
            commented += 1
        elif not (indent == 0 and key in ("name", "parameters")) and not parent_is_commented(lines, number, indent):
            uncommented.append(line)
    assert uncommented == []
    assert commented >= 5


def parent_is_commented(lines: list[str], number: int, indent: int) -> bool:
    """Whether the key stands under one that has a comment; of a group, only the first key directly below it."""
    for above in range(number - 1, -1, -1):
        text = lines[above].lstrip()
        if text and not text.startswith("#") and len(lines[above]) - len(text) < indent:
            group = text.startswith(("parameters", "early_terminate"))
            return lines[above - 1].lstrip().startswith("#") and (not group or above == number - 1)
    return False


# What a right file means


def test_a_loaded_sweep_knows_its_name_its_trials_and_what_varies(tmp_path: Path) -> None:
    loaded = load(tmp_path, changed(method="grid", name="mine", add={"seed": {"values": [0, 1, 2]}}, run_cap=4))
    assert (loaded.name, loaded.metric, loaded.maximize, loaded.run_cap) == ("mine", "val/loss", False, 4)
    assert loaded.varied == ["train.lr", "seed"]
    assert loaded.grid_size() == 6
    assert load(tmp_path, GOOD).name == "sweep", "the file's own name"
    assert load(tmp_path, GOOD).grid_size() is None
    agreement = {"name": "eval/class_agreement", "goal": "maximize"}
    assert load(tmp_path, changed(metric=agreement)).maximize


def test_nested_parameters_are_flattened(tmp_path: Path) -> None:
    nested = {
        "preset": {"value": "digits"},
        "train": {"parameters": {"lr": {"values": [0.1, 0.2]}, "steps": {"value": 5}}},
        "ema.decay": {"min": 0.5, "max": 0.9},
    }
    expected = {
        "preset": {"value": "digits"},
        "train.lr": {"values": [0.1, 0.2]},
        "train.steps": {"value": 5},
        "ema.decay": {"min": 0.5, "max": 0.9},
    }
    assert flat_parameters(nested) == expected
    deeper = {"a": {"parameters": {"b": {"parameters": {"c": {"value": 1}}}}}}
    assert flat_parameters(deeper) == {"a.b.c": {"value": 1}}
    loaded = load(tmp_path, changed(parameters=nested))
    assert loaded.parameters == expected
    suggested = engine.suggest(loaded.engine_config(), [])
    assert suggested is not None
    assert set(suggested) == set(expected)


def test_a_setting_with_nothing_after_it_is_none(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("metric", "run_cap", "early_terminate", "name", "description", "program"))
    loaded = load(tmp_path, GOOD | nothing)
    assert (loaded.name, loaded.metric, loaded.run_cap, loaded.total) == ("sweep", None, None, None)
    assert loaded.config.keys() == GOOD.keys() - {"metric"}


def test_a_metric_is_optional_and_a_whole_section_may_be_one_value(tmp_path: Path) -> None:
    assert load(tmp_path, changed(metric=None)).metric is None
    assert load(tmp_path, changed(add={"ema": {"value": {"decay": 0.5}}})).parameters["ema"] == {
        "value": {"decay": 0.5}
    }


TRIED: list[tuple[dict[str, Any], list[float]]] = [
    ({"value": 3}, [3]),
    ({"values": [3, 1, 2]}, [3, 1, 2]),
    ({"min": 2, "max": 9}, [2, 5, 9]),
    ({"distribution": "int_uniform", "min": 2, "max": 9}, [2, 5, 9]),
    ({"min": 0.0, "max": 1.0}, [0.0, 0.618, 1.0]),
    ({"min": 0, "max": 0.5}, [0.0, 0.309, 0.5]),
    ({"distribution": "log_uniform", "min": -2.0, "max": 0.0}, [math.exp(-2), 0.382 * math.exp(-2) + 0.618, 1]),
    ({"distribution": "inv_log_uniform", "min": 0.0, "max": 2.0}, [math.exp(-2), 0.382 * math.exp(-2) + 0.618, 1]),
    ({"distribution": "q_log_uniform", "min": 2.0, "max": 4.0, "q": 8}, [8, 40, 56]),
    ({"distribution": "uniform", "min": 0, "max": 1}, [0, 0.618, 1]),
    ({"distribution": "log_uniform_values", "min": 0.1, "max": 1.0}, [0.1, 0.6562, 1.0]),
    ({"distribution": "inv_log_uniform_values", "min": 0.1, "max": 1.0}, [0.1, 0.6562, 1.0]),
    ({"distribution": "q_uniform", "min": 8, "max": 64, "q": 8}, [8, 40, 64]),
    ({"distribution": "q_log_uniform_values", "min": 8, "max": 64, "q": 8}, [8, 40, 64]),
    ({"distribution": "normal", "mu": 5.0, "sigma": 1.0}, [5 - SPREAD, 5, 5 + SPREAD]),
    ({"distribution": "normal"}, [-SPREAD, 0, SPREAD]),
    ({"distribution": "q_normal", "mu": 5.2, "sigma": 1.0}, [2, 5, 8]),
    ({"distribution": "log_normal", "mu": -7.0, "sigma": 1.0}, [math.exp(-10), math.exp(-7), math.exp(-4)]),
    ({"distribution": "beta", "a": 2.0, "b": 3.0}, [0, 0.5, 1]),
    ({"distribution": "beta"}, [0, 0.5, 1]),
]


@pytest.mark.parametrize(("spec", "expected"), TRIED, ids=[str(spec) for spec, _ in TRIED])
def test_of_a_distribution_the_ends_and_one_between_are_tried(spec: dict[str, Any], expected: list[float]) -> None:
    assert engine.violations({"method": "random", "parameters": {"x": spec}}) == []
    assert values_to_try(spec) == pytest.approx(expected)
    if all(isinstance(value, int) for value in expected) and "normal" not in str(spec) and "beta" not in str(spec):
        assert all(isinstance(value, int) for value in values_to_try(spec)) == (spec.get("distribution") != "uniform")


def test_what_is_tried_spans_what_the_engine_draws() -> None:
    for spec, _ in TRIED:
        if "value" in spec or "values" in spec:
            continue
        config = {"method": "random", "parameters": {"x": spec}}
        runs: list[Any] = []
        for number in range(20):
            suggestion = engine.suggest(config, runs)
            assert suggestion is not None
            low, _, high = values_to_try(spec)
            slack = 1.0 if "q" in spec or "q_" in str(spec) else 1e-9  # Rounding to a quantum may pass the end.
            assert low - slack <= suggestion["x"] <= high + slack, spec
            runs.append(engine.past_run(str(number), suggestion, "finished", {}, []))


def test_bayes_takes_every_distribution() -> None:
    parameters = {f"p{number}": spec for number, (spec, _) in enumerate(TRIED)} | {
        "flag": {"values": [True, False, None]}
    }
    config = {"method": "bayes", "metric": {"name": "val/loss", "goal": "minimize"}, "parameters": parameters}
    assert engine.violations(config) == []
    for suggestion in search(config, 5, lambda found: {"val/loss": float(found["p4"])}):
        assert suggestion.keys() == parameters.keys()
        for number, (spec, _) in enumerate(TRIED):
            value, tried = suggestion[f"p{number}"], values_to_try(spec)
            if "values" in spec or "value" in spec:
                assert value in tried
            else:
                assert tried[0] - 1.0 <= value <= tried[-1] + 1.0


# What is wrong with a file: each with all that must be said, one line each

UNKNOWN = "unknown key; did you mean"
WELL_FORMED = "expected value:, values:, or min: and max:"
WRONG: dict[str, tuple[Any, list[str]]] = {
    "unknown knob": (
        changed(add={"zzz": {"value": 1}}),
        ["zzz = {'value': 1}: unknown key; --help all lists all keys"],
    ),
    "misspelt knob": (changed(add={"trian.lr": {"value": 1}}), [f"trian.lr = {{'value': 1}}: {UNKNOWN} train.lr?"]),
    "a knob alone and in a group": (
        changed(parameters={"train.lr": {"values": [0.1, 0.2]}, "train": {"parameters": {"lr": {"value": 0.3}}}}),
        ["train.lr = {'values': [0.1, 0.2]} and {'value': 0.3}: given twice, by its dotted key and in its section"],
    ),
    "a knob alone and in the values of its section": (
        changed(parameters={"train": {"values": [{"lr": 0.1}, {"lr": 0.3}]}, "train.lr": {"value": 0.2}}),
        ["train.lr = {'values': [{'lr': 0.1}, {'lr': 0.3}]} and {'value': 0.2}: given twice"],
    ),
    "misspelt nested knob": (
        changed(add={"ema": {"parameters": {"decy": {"value": 0.5}}}}),
        [f"ema.decy = {{'value': 0.5}}: {UNKNOWN} ema.decay?"],
    ),
    "number as a key": (changed(add={5: {"value": 1}}), ["5 = {'value': 1}: unknown key"]),
    "value out of range": (changed(add={"train.steps": {"value": 0}}), ["train.steps = 0: expected an integer >= 1"]),
    "value out of range in the middle of a list": (
        changed(add={"train.steps": {"values": [100, 0, 200]}}),
        ["train.steps = 0: expected an integer >= 1"],
    ),
    "first value out of range": (
        changed(add={"train.steps": {"values": [0, 100]}, "ema.decay": {"values": [0.5, 1.5]}}),
        ["train.steps = 0: expected an integer >= 1", "ema.decay = 1.5: expected a number >= 0 and < 1"],
    ),
    "wrong types": (
        changed(add={"train.steps": {"value": True}, "ema.warmup": {"values": [True, "maybe"]}}),
        ["train.steps = True: expected an integer", "ema.warmup = 'maybe': expected true or false"],
    ),
    "wrong choice": (
        changed(add={"diffusion.schedule": {"values": ["linear", "cosin"]}}),
        ["diffusion.schedule = 'cosin': expected one of linear, cosine"],
    ),
    "wrong preset": (
        changed(add={"preset": {"values": ["digits", "imagenet"]}}),
        ["preset = 'imagenet': expected one of cifar10, cifar100, mnist, digits"],
    ),
    "wrong preset hides nothing": (
        changed(add={"preset": {"value": "imagenet"}, "train.steps": {"values": [1, 0]}}),
        ["preset = 'imagenet': expected one of", "train.steps = 0: expected an integer >= 1"],
    ),
    "a list of wrong elements": (
        changed(add={"model.channel_multipliers": {"values": [[1, 2], [1, "x"]]}}),
        ["model.channel_multipliers = [1, 'x']: expected a list"],
    ),
    "a combination": (
        changed(add={"sample.steps": {"values": [10, 2000]}}),
        ["sample.steps = 2000: expected at most diffusion.timesteps = 1000"],
    ),
    "a combination of two parameters": (
        changed(add={"prune.step": {"values": [50, 90]}, "train.steps": {"values": [100, 80, 60, 40]}}),
        ["prune.step = 50: expected less than train.steps = 40"],
    ),
    "a knob that no method of the sweep listens to": (
        changed(add={"prune.method": {"values": ["none", "magnitude"]}, "prune.threshold": {"values": [0.05, 0.1]}}),
        ["prune.threshold = 0.1: has no effect with prune.method=none or magnitude; drop it or use structured"],
    ),
    "end of a distribution out of range": (
        changed(add={"train.lr": {"distribution": "uniform", "min": 0.1, "max": 1.5}}),
        ["train.lr = 1.5: expected a number > 0 and <= 1"],
    ),
    "other end of a distribution out of range": (
        changed(add={"model.dropout": {"min": -0.5, "max": 0.5}}),
        ["model.dropout = -0.5: expected a number >= 0 and < 1"],
    ),
    "normal distribution": (
        changed(add={"train.lr": {"distribution": "normal", "mu": 0.1, "sigma": 0.1}}),
        ["train.lr = -0.2", "expected a number > 0 and <= 1"],
    ),
    "float distribution for an integer": (
        changed(add={"model.channels": {"distribution": "uniform", "min": 8, "max": 64}}),
        ["model.channels = 42.608: expected an integer >= 4 and <= 4096"],
    ),
    "float ends for an integer": (
        changed(add={"model.channels": {"min": 8.0, "max": 64.0}}),
        ["model.channels = 42.608: expected an integer"],
    ),
    "integers for a choice": (changed(add={"diffusion.loss": {"min": 1, "max": 2}}), ["diffusion.loss = 1", "l2, l1"]),
    "not a parameter": (changed(parameters={"train.lr": 3}), [f"train.lr = 3: {WELL_FORMED}"]),
    "an empty parameter": (changed(parameters={"train.lr": {}}), [f"train.lr = {{}}: {WELL_FORMED}"]),
    "no values": (changed(parameters={"train.lr": {"values": []}}), [f"train.lr = {{'values': []}}: {WELL_FORMED}"]),
    "misspelt values": (changed(add={"seed": {"vales": [1]}}), [f"seed = {{'vales': [1]}}: {WELL_FORMED}"]),
    "value and values": (changed(add={"seed": {"value": 1, "values": [1]}}), [f"'values': [1]}}: {WELL_FORMED}"]),
    "minimum alone": (changed(add={"seed": {"min": 1}}), [f"seed = {{'min': 1}}: {WELL_FORMED}"]),
    "unknown distribution": (
        changed(add={"ema.decay": {"distribution": "gauss", "min": 0.1, "max": 0.2}}),
        ["ema.decay = ", "'gauss'", "with a distribution: that W&B knows"],
    ),
    "ends the wrong way round": (
        changed(add={"seed": {"min": 5, "max": 1}}),
        ["seed = ", "min 5 is not less than max 1"],
    ),
    "values where exponents are expected": (
        changed(add={"train.lr": {"distribution": "log_uniform", "min": 1e-4, "max": 0.1}}),
        [
            "train.lr = 1.1",
            "expected a number > 0 and <= 1; min and max are exponents of e: log_uniform_values takes the values",
        ],
    ),
    "exponents beyond all numbers": (
        changed(add={"train.lr": {"distribution": "log_uniform", "min": -9, "max": 1e4}}),
        ["train.lr = 1.0", "e+304: expected a number > 0 and <= 1; min and max are exponents of e"],
    ),
    "a group that is none": (changed(add={"ema": {"parameters": 3}}), [f"ema = {{'parameters': 3}}: {WELL_FORMED}"]),
    "a section as a number": (changed(add={"ema": {"value": 3}}), ["ema = 3: ema is a section; set one of its keys"]),
    "unknown metric": (
        changed(metric={"name": "val/los", "goal": "minimize"}),
        ["metric.name = 'val/los': expected one of train/loss, val/loss"],
    ),
    "metric without a name": (changed(metric={"goal": "minimize"}), ["metric.name = None: expected one of train/loss"]),
    "metric with a list as a name": (
        changed(metric={"name": ["val/loss"]}),
        ["metric.name = ['val/loss']: expected one"],
    ),
    "metric as text": (changed(metric="val/loss"), ["metric = 'val/loss': expected name: and goal:"]),
    "wrong goal": (
        changed(metric={"name": "val/loss", "goal": "maximize"}),
        ["metric.goal = 'maximize': expected minimize, which is the better way for val/loss"],
    ),
    "no goal where minimize is wrong": (
        changed(metric={"name": "eval/class_agreement"}),
        ["metric.goal = 'minimize': expected maximize, which is the better way for eval/class_agreement"],
    ),
    "unknown goal": (
        changed(metric={"name": "val/loss", "goal": "min"}),
        ["metric.goal = 'min': expected minimize"],
    ),
    "unknown word in the metric": (
        changed(metric={"name": "val/loss", "goal": "minimize", "target": "low"}),
        ["metric = {'name': 'val/loss'", "'low'"],
    ),
    "bayes without a metric": (
        changed(method="bayes", metric=None),
        ["metric = None", "method=bayes cannot do without"],
    ),
    "early end without a metric": (
        changed(metric=None, early_terminate={"type": "hyperband", "min_iter": 3}),
        ["metric = None", "early_terminate cannot do without"],
    ),
    "unknown early end": (
        changed(early_terminate={"type": "hyperbnd"}),
        ["early_terminate = {'type': 'hyperbnd'}: expected type: hyperband, with min_iter:"],
    ),
    "early end without a number": (
        changed(early_terminate={"type": "hyperband"}),
        ["early_terminate = {'type': 'hyperband'}: expected type: hyperband, with min_iter:"],
    ),
    **{
        f"early end with {early}": (
            changed(early_terminate={"type": "hyperband", **early}),
            [f"{early}: expected type: hyperband, with min_iter: alone, or with max_iter:".removeprefix("{")],
        )
        for early in ({"min_iter": 3, "max_iter": 27}, {"max_iter": 2, "s": 2}, {"max_iter": 27, "s": 2.0})
    },
    "strictness as text": (
        changed(early_terminate={"type": "hyperband", "min_iter": 3, "strict": "yes"}),
        ["early_terminate = ", "expected type: hyperband"],
    ),
    "no command": (changed(command=None), ["command = None: expected a list that ends in ${args}"]),
    "command without args": (
        changed(command=["python", "-m", "agent"]),
        ["command = ['python', '-m', 'agent']: passes no parameters; end it in ${args}"],
    ),
    "command as text": (
        changed(command="python -m agent ${args}"),
        ["command = 'python -m agent ${args}': expected a list that ends in ${args}"],
    ),
    "command as a number": (changed(command=3), ["command = 3: expected a list that ends in ${args}"]),
    "unknown method": (changed(method="gird"), ["method = 'gird': expected one of grid, random, bayes"]),
    "method for a server of one's own": (changed(method="custom"), ["method = 'custom': expected one of grid, random"]),
    "several objectives and one": (
        changed(metrics=TWO),
        ["metric, metrics: expected one of them"],
    ),
    "several objectives that are one": (
        changed(metric=None, metrics=TWO[:1]),
        ["metrics = [{'name': 'val/loss'", "expected a list of two or more", "one is a metric:"],
    ),
    "an objective without a name": (
        changed(metric=None, metrics=[TWO[0], {"goal": "minimize"}]),
        ["metrics[1].name = None: expected one of train/loss, val/loss"],
    ),
    "an objective that is no figure": (
        changed(metric=None, metrics=[TWO[0], {"name": "sample/mac", "goal": "minimize"}]),
        ["metrics[1].name = 'sample/mac': expected one of train/loss, val/loss", "sample/macs"],
    ),
    "an objective the wrong way": (
        changed(metric=None, metrics=[TWO[0], {"name": "sample/macs", "goal": "maximize"}]),
        ["metrics[1].goal = 'maximize': expected minimize, which is the better way for sample/macs"],
    ),
    "an objective without a goal": (
        changed(metric=None, metrics=[TWO[0], {"name": "sample/macs"}]),
        ["metrics[1].goal = None: expected minimize"],
    ),
    "a limit that is no number": (
        changed(metric=None, metrics=[TWO[0], TWO[1] | {"limit": "2e6"}]),
        ["metrics[1].limit = '2e6': expected a number, the worst sample/macs that is of use"],
    ),
    "a target of several objectives": (
        changed(metric=None, metrics=[TWO[0], TWO[1] | {"target": 5}]),
        ["metrics[1].target = 5: expected name:, goal: or limit:"],
    ),
    "an objective twice": (
        changed(metric=None, metrics=[TWO[0], TWO[0]]),
        ["metrics = 'val/loss': is there twice"],
    ),
    "several objectives for a method of one": (
        changed(metric=None, metrics=TWO, method="bayes"),
        ["method = 'bayes': learns from one metric; with metrics: expected one of grid, random, tpe, nsga2"],
    ),
    "an objective that no trial logs": (
        changed(metric=None, metrics=[{"name": "eval/kd_inception_200_train", "goal": "minimize"}, TWO[1]]),
        ["metrics[0].name = 'eval/kd_inception_200_train': a trial does not log it", "val/loss", "sample/macs"],
    ),
    "an objective that students do not log": (
        changed(metric=None, metrics=TWO, add={"steps.method": {"values": ["none", "consistency"]}}),
        ["metrics[0].name = 'val/loss': a trial with steps.method=consistency does not log it"],
    ),
    "early termination without a figure to judge by": (
        changed(
            metric=None,
            metrics=[TWO[1], {"name": "model/params", "goal": "minimize"}],
            early_terminate={"type": "hyperband", "min_iter": 2},
        ),
        ["early_terminate: no objective is known while a trial runs"],
    ),
    "a search that learns without an objective": (
        changed(method="tpe", metric=None),
        ["metric = None", "method=tpe cannot do without"],
    ),
    "probabilities for a search that learns": (
        changed(method="nsga2", add={"seed": {"values": [1, 2], "probabilities": [0.5, 0.5]}}),
        ["seed = ", "without probabilities:, which method=nsga2 cannot use"],
    ),
    "method as a list": (changed(method=["grid"]), ["method = ['grid']: expected one of grid, random, bayes"]),
    "no method": (changed(method=None), ["method = None: expected one of grid, random, bayes"]),
    "bayes with probabilities": (
        changed(method="bayes", add={"seed": {"values": [1, 2], "probabilities": [0.5, 0.5]}}),
        ["seed = ", "without probabilities:, which method=bayes cannot use"],
    ),
    "bayes with nothing to search": (
        changed(method="bayes", parameters={"preset": {"value": "digits"}}),
        ["parameters: expected one that varies, for method=bayes to search"],
    ),
    "a grid that nobody will finish": (
        changed(method="grid", add={"seed": {"min": 0, "max": 10**12}}),
        ["parameters: 2,000,000,000,002 combinations; expected at most 100,000 for method=grid"],
    ),
    "unknown macro": (
        changed(command=["${env}", "${python}", "-m", "agent", "${args}"]),
        [f"command = '${{python}}': expected one of {', '.join(MACROS)}, ${{envvar:NAME}}"],
    ),
    "name that leads elsewhere": (changed(name="../x"), ["name = '../x': expected a name that a folder can have"]),
    "grid of a distribution": (
        changed(method="grid", add={"ema.decay": {"min": 0.1, "max": 0.9}}),
        ["ema.decay = {'min': 0.1, 'max': 0.9}: expected value: or values:, which method=grid needs"],
    ),
    "grid of probabilities": (
        changed(method="grid", add={"seed": {"values": [1, 2], "probabilities": [0.5, 0.5]}}),
        ["seed = ", "expected value: or values:, which method=grid needs"],
    ),
    **{
        f"run_cap {cap!r}": (changed(run_cap=cap), [f"run_cap = {cap!r}: expected an integer >= 1"])
        for cap in (0, -1, 1.5, "ten", True, [1])
    },
    "name as a number": (changed(name=3), ["name = 3: 3 is not of type 'string'"]),
    "unknown setting": (changed(metod="grid"), ["metod = 'grid': Additional properties are not allowed"]),
    "no parameters": (changed(parameters=None), ["parameters = None: expected a mapping from knobs such as train.lr"]),
    "empty parameters": (changed(parameters={}), ["parameters = {}: expected a mapping from knobs"]),
    "parameters as a list": (changed(parameters=["train.lr"]), ["parameters = ['train.lr']: expected a mapping"]),
    "everything at once": (
        changed(
            method="gird",
            metric={"name": "loss"},
            command=None,
            run_cap=0,
            early_terminate={"type": "never"},
            add={
                "trian.lr": {"value": 1},
                "seed": {"vales": [1]},
                "train.steps": {"values": [5, 0, -1]},
                "ema.decay": {"min": 0.5, "max": 1.1},
                "prune.method": {"values": ["magnitud"]},
            },
        ),
        [
            "method = 'gird'",
            "metric.name = 'loss'",
            "command = None",
            "run_cap = 0",
            "early_terminate = {'type': 'never'}",
            "trian.lr = {'value': 1}: unknown key; did you mean train.lr?",
            "seed = {'vales': [1]}",
            "train.steps = 0: expected an integer >= 1",
            "train.steps = -1: expected an integer >= 1",
            "ema.decay = 1.1: expected a number >= 0 and < 1",
            "prune.method = 'magnitud': expected one of none, structured, lottery, magnitude, random, snip, synflow, "
            "wanda, gradual, rigl, n_of_m",
        ],
    ),
    "empty": ("", ["method = None", "command = None", "parameters = None"]),
    "broken YAML": ("method: [grid\n", ["not valid YAML"]),
    "a parameter twice": (
        "parameters:\n  train.lr: {value: 1}\n  train.lr: {value: 2}\n",
        ["not valid YAML", "train.lr is given twice"],
    ),
    "a list": ("- method: grid\n", ["expected a mapping of keys to values"]),
    "binary": (b"\x89PNG\r\n\xff", ["not a text file"]),
}


@pytest.mark.parametrize(("content", "expected"), WRONG.values(), ids=WRONG.keys())
def test_all_that_is_wrong_with_a_sweep_file_is_said_at_once(content: Any, expected: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, content)
    with pytest.raises(SweepError) as caught:
        load_sweep(path)
    message = str(caught.value)
    lines = message.splitlines()
    for fragment in expected:
        assert fragment in message
    assert all(str(path) in line for line in lines), "each line names the file"
    assert len(set(lines)) == len(lines)
    assert "not valid under any of the given schemas" not in message
    assert "is a required property" not in message


@pytest.mark.parametrize("name", ["everything at once", "first value out of range", "value out of range"])
def test_a_problem_is_said_once_and_nothing_besides(name: str, tmp_path: Path) -> None:
    content, expected = WRONG[name]
    with pytest.raises(SweepError) as caught:
        load(tmp_path, content)
    assert len(str(caught.value).splitlines()) == len(expected)


LAUGHS = "a0: &a0 [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("method: grid\nparameters: &p {train: {parameters: *p}}\n", "holds more than 100,000 values, or itself"),
        ("parameters: &p {train.lr: {values: [*p]}}\n", "holds more than 100,000 values, or itself"),
        ("parameters: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        (LAUGHS, "holds more than 100,000 values, or itself"),
        ("command: !!python/object/apply:os.system [touch owned]\n", "not valid YAML"),
    ],
    ids=["a parameter within itself", "a value within itself", "deep", "aliases without end", "code"],
)
def test_yaml_that_is_meant_to_do_harm(content: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=reason) as caught:
        load(tmp_path, content)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 1000
    assert str(tmp_path / "sweep.yaml") in message
    assert not Path("owned").exists()


def test_what_is_long_is_shown_in_part(tmp_path: Path) -> None:
    with pytest.raises(SweepError) as caught:
        load(tmp_path, changed(add={"train.steps": {"vales": list(range(10_000))}}))
    assert len(str(caught.value)) < 1000


def test_a_file_that_is_none(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "missing.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(SweepError, match=reason) as caught:
            load_sweep(path)
        assert str(caught.value).startswith(f"FILE = {str(path)!r}: ")


# The command line


@pytest.mark.parametrize("name", ["everything at once", "broken YAML", "wrong goal", "binary", "no parameters"])
def test_the_command_prints_what_is_wrong_and_runs_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    content, expected = WRONG[name]
    path = write(tmp_path, content)
    assert sweep.main([path.name, "--offline"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert all(line.startswith("error: ") for line in err.splitlines())
    assert len(err.splitlines()) == len(expected) or name in ("binary", "broken YAML")
    assert all(fragment in err for fragment in expected)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "words",
    [["--count=0"], ["--count=-1"], ["--count=x"], ["--cout=1"], ["--name=../x"], ["--jobs=0"], ["--jobs=1.5"],
     ["--agents=2"], ["--attach=ab"], ["--name="], ["more.yaml"]],
)  # fmt: skip
def test_wrong_words_of_the_command(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, GOOD)
    try:
        status: Any = sweep.main([path.name, "--offline", *words])
    except SystemExit as left:
        status = left.code
    assert status == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "FILE: a sweep file is needed"),
        (["--attach", "ab"], "W&B is needed: set WANDB_API_KEY"),
        (["sweep.yaml", "--agents", "2"], "W&B is needed: set WANDB_API_KEY"),
        (["--attach", "ab", "--jobs", "2"], "for sweeps without a server"),
        (["--attach", "ab", "--retry-failed"], "for sweeps without a server"),
    ],
)
def test_words_that_do_not_go_together(
    words: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(tmp_path, GOOD)
    try:
        status: Any = sweep.main(words)
    except SystemExit as left:
        status = left.code
    assert status == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert reason in err
    assert len(err.splitlines()) == 1


NO_KEY = "no W&B API key; set WANDB_API_KEY (see .env.example), run `wandb login`, or use"


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"eval.extractors": {"values": [["classifier"], ["net.pt"]]}}, "eval.extractors = 'net.pt': no such file"),
        ({"init.artifact": {"value": "model-ab:best"}}, f"init.artifact = 'model-ab:best': {NO_KEY} init.checkpoint"),
        (
            {"distill.artifact": {"values": ["model-ab:best", "model-cd"]}, "distill.output": {"value": 1.0}},
            f"distill.artifact = 'model-ab:best': {NO_KEY} distill.checkpoint\n"
            f"error: distill.artifact = 'model-cd': {NO_KEY} distill.checkpoint",
        ),
        ({"eval.inception_weights": {"value": "net.pth"}}, "eval.inception_weights = 'net.pth': no such file"),
    ],
)
def test_files_of_trials_that_are_not_there(
    parameters: dict[str, Any],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, changed(add={"eval.figures": {"value": ["kernel"]}, **parameters}))
    assert sweep.main([path.name, "--offline", "--dry-run"]) == 2
    assert capsys.readouterr() == ("", f"error: {reason}\n")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("words", [["--offline"], ["--offline", "--dry-run"], ["--dry-run"]], ids=" ".join)
def test_a_sweep_file_in_which_no_id_of_a_run_was_put(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert sweep.main([str(ROOT / "sweeps" / "pruning_recovery.yaml"), *words]) == 2
    line = "error: init.artifact = 'model-RUN_ID:best': put the id of a run there, in place of RUN_ID\n"
    assert capsys.readouterr() == ("", line)
    assert not list(tmp_path.iterdir())


def test_the_real_command_prints_all_problems(tmp_path: Path, forks: Forks) -> None:
    content, expected = WRONG["everything at once"]
    path = write(tmp_path, content)
    done = subprocess.run(
        [forks.interpreter, "-m", "agent.sweep", path.name],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == len(expected)
    assert all(line.startswith("error: sweep.yaml: ") for line in lines)
    assert all(fragment in done.stderr for fragment in expected)
    assert list(tmp_path.iterdir()) == [path]


# W&B's search engine


def search(config: Mapping[str, Any], count: int, figure: Any = lambda _: {}) -> list[dict[str, Any]]:
    """The first suggestions of a search whose trials are all finished, with the figures that ``figure`` gives them."""
    runs: list[Any] = []
    suggestions: list[dict[str, Any]] = []
    for number in range(count):
        parameters = engine.suggest(config, runs)
        if parameters is None:
            break
        suggestions.append(parameters)
        summary = figure(parameters)
        runs.append(engine.past_run(f"t{number}", parameters, "finished", summary, [summary] if summary else []))
    return suggestions


def test_the_engine_is_told_the_figures_of_past_trials() -> None:
    """It takes unknown names in silence, so what it knows is asked back."""
    history = [{"step": 1, "val/loss": 0.7}, {"step": 2, "val/loss": 0.5}]
    run = engine.past_run("t0", {"seed": 1}, "finished", {"val/loss": 0.5}, history)
    assert run.summary_metric("val/loss") == 0.5
    assert run.metric_history("val/loss") == [0.7, 0.5]
    assert run.config == {"seed": {"value": 1}}
    assert (run.name, run.state) == ("t0", "finished")


def test_a_grid_is_exhausted_after_exactly_its_product(tmp_path: Path) -> None:
    content = changed(
        method="grid",
        add={
            "train.grad_clip": {"values": [None, 1.0]},
            "model.channel_multipliers": {"values": [[1, 2], [1, 4], [2, 2]]},
            "ema.warmup": {"values": [True, False]},
            "train": {"parameters": {"beta2": {"values": [0.9, 0.99]}}},
        },
    )
    loaded = load(tmp_path, content)
    found = search(loaded.engine_config(), 100)
    assert len(found) == loaded.grid_size() == 2 * 2 * 3 * 2 * 2
    assert len({repr(sorted(parameters.items(), key=str)) for parameters in found}) == len(found)
    for parameters in found:
        assert set(parameters) == set(loaded.parameters)
        build_config(parameters)


@pytest.mark.parametrize(
    ("spec", "count"), [({"min": 2, "max": 5}, 4), ({"distribution": "q_uniform", "min": 0.1, "max": 0.9, "q": 0.2}, 4)]
)
def test_a_grid_may_count_through_a_range(spec: dict[str, Any], count: int, tmp_path: Path) -> None:
    knob = "sample.guidance" if "q" in spec else "model.num_res_blocks"
    loaded = load(tmp_path, changed(method="grid", add={knob: spec}))
    assert len(search(loaded.engine_config(), 100)) == loaded.grid_size() == 2 * count


def test_random_search_is_reproducible_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    content = changed(add={"ema.decay": {"min": 0.5, "max": 0.9}, "seed": {"min": 0, "max": 1000}})
    config = load(tmp_path, content).engine_config()
    first, second = search(config, 8), search(config, 8)
    assert first == second
    assert len({parameters["ema.decay"] for parameters in first}) == 8
    runs = [
        engine.past_run(f"t{number}", parameters, "finished", {}, []) for number, parameters in enumerate(first[:5])
    ]
    assert engine.suggest(config, runs) == first[5]
    for parameters in first:
        assert 0.5 <= parameters["ema.decay"] <= 0.9
        assert isinstance(parameters["seed"], int)
        assert parameters["train.lr"] in (0.1, 0.01)
        assert parameters["preset"] == "digits"
        assert all(type(value) in (int, float, str) for value in parameters.values()), "plain Python, no numpy"
        build_config(parameters)


def test_bayes_stays_within_its_ranges_and_follows_what_was_better(tmp_path: Path) -> None:
    space = {
        "preset": {"value": "digits"},
        "train.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1},
        "model.dropout": {"min": 0.0, "max": 0.5},
        "model.channels": {"min": 8, "max": 64},
    }
    config = load(tmp_path, changed(method="bayes", parameters=space)).engine_config()

    def best_at(exponent: float) -> list[dict[str, Any]]:
        return search(config, 16, lambda found: {"val/loss": (math.log10(found["train.lr"]) - exponent) ** 2})

    found = best_at(-3.9)
    assert len(found) == 16
    for parameters in found:
        assert 1e-4 <= parameters["train.lr"] <= 1e-1
        assert 0.0 <= parameters["model.dropout"] <= 0.5
        assert 8 <= parameters["model.channels"] <= 64
        assert isinstance(parameters["model.channels"], int)
        build_config(parameters)
    assert best_at(-3.9) == found, "reproducible"
    # The figures are used: where low rates are better, lower ones are suggested than where high rates are.
    low, high = (sorted(parameters["train.lr"] for parameters in best_at(end)[8:])[4] for end in (-3.9, -1.1))
    assert low < high


def test_hyperband_gives_up_on_the_trial_that_is_behind(tmp_path: Path) -> None:
    content = changed(early_terminate={"type": "hyperband", "min_iter": 3, "eta": 2})
    config = load(tmp_path, content).engine_config()
    runs = []
    for number, level in enumerate((0.1, 0.2, 0.3, 0.9)):
        history = [{"step": step, "val/loss": level} for step in range(1, 6)]
        state = "running" if level == 0.9 else "finished"
        runs.append(engine.past_run(f"t{number}", {"preset": "digits"}, state, {"val/loss": level}, history))
    assert engine.doomed(config, runs) == {"t3"}
    for values, doomed in ((3, set()), (4, {"t3"})):  # It is judged when it has more than min_iter values.
        history = [{"step": step, "val/loss": 0.9} for step in range(1, values + 1)]
        runs[-1] = engine.past_run("t3", {"preset": "digits"}, "running", {"val/loss": 0.9}, history)
        assert engine.doomed(config, runs) == doomed


def test_a_sweep_of_another_content_is_not_continued(tmp_path: Path) -> None:
    first = load(tmp_path, GOOD)
    folder = tmp_path / "out"
    folder.mkdir()
    offline_sweep(first, folder).state.write()
    assert offline_sweep(first, folder).state.trials == []
    longer = load(tmp_path, changed(run_cap=50))
    assert offline_sweep(longer, folder).sweep.run_cap == 50, "more trials of the same sweep"
    other = load(tmp_path, changed(add={"seed": {"value": 1}}))
    with pytest.raises(SweepError, match=r"^parameters\.seed = {'value': 1}: the sweep in '.*' has no value; set it"):
        offline_sweep(other, folder)


@pytest.mark.parametrize(
    ("metric", "parameters", "expected"),
    [
        (
            "eval/fid50k_train",
            {},
            "metric.name = 'eval/fid50k_train': a trial does not log it; expected one of train/loss",
        ),
        (
            "eval/class_agreement",
            {"eval.classifier": {"values": ["auto", "none"]}},
            "a trial with eval.classifier=none does not log it",
        ),
        (
            "val/loss_t3",
            {"eval.figures": {"values": [["loss_by_timestep"], []]}},
            "a trial with eval.figures=[] does not log it",
        ),
        (
            "eval/fd_classifier-digits_500_train",
            {
                "eval.figures": {"value": ["frechet"]},
                "eval.extractors": {"value": ["classifier"]},
                "eval.num_images": {"values": [500, 1000]},
            },
            "a trial with eval.num_images=1000 does not log it",
        ),
    ],
)
def test_the_metric_must_be_logged_by_every_trial(
    metric: str, parameters: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    goal = "maximize" if "agreement" in metric else "minimize"
    base = {"preset": {"value": "digits"}, "checkpoint.best_metric": {"value": "val/loss"}}
    config = changed(metric={"name": metric, "goal": goal}) | {"parameters": base | parameters}
    with pytest.raises(SweepError) as refusal:
        load(tmp_path, config)
    assert expected in str(refusal.value)
    first = {key: {"value": spec.get("value", spec.get("values", [0])[0])} for key, spec in parameters.items()}
    if first:  # With the first value of each alone there is nothing wrong.
        load(tmp_path, config | {"parameters": base | first})
