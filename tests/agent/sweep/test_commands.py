"""The command of a sweep: what the check and the estimate read from it is what the trial reads, word for word."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from agent.config import TrialConfig, build_config, config_from_words
from agent.sweep.estimate import describe_sweep, list_trials
from agent.sweep.file import SweepFile, check_sweep
from agent.sweep.offline import offline_sweep
from diffusion_core.config import split_argv
from diffusion_core.search import offline
from diffusion_core.search.macros import HYPHENATED, JSON_FILE, NO_FALSE, PASSING, expand_command, spellings
from diffusion_core.search.sweep import SweepError
from pruning.estimate import Estimator

AGENT = ["${env}", "${interpreter}", "-m", "agent"]
VALUES: dict[str, Any] = {
    "preset": "digits",
    "train.lr": 1e-05,
    "train.grad_clip": None,
    "ema.warmup": True,
    "log.progress": False,
    "model.channel_multipliers": [1, 2],
    "data.horizontal_flip": None,
    "train": {"weight_decay": 0.25},
}


def sweep_of(command: Any, parameters: dict[str, Any] | None = None, **more: Any) -> SweepFile:
    """A checked grid of one or two trials."""
    if parameters is None:
        parameters = {"preset": {"value": "digits"}, "train.lr": {"values": [0.25, 0.5]}}
    content = {"method": "grid", "command": command, "parameters": parameters, **more}
    return check_sweep(content, "x.yaml", "x")


def read_by_the_trial(sweep: SweepFile, parameters: dict[str, Any], folder: Path) -> TrialConfig:
    """The configuration that the trial's program builds from its words."""
    words = expand_command(sweep.config.get("command"), parameters, sweep.config.get("program"), folder / "p.json")
    start = next(i for i, word in enumerate(words) if word == "agent" or word.endswith("train_cifar.py"))
    return config_from_words(split_argv(words[start + 1 :]))


# Macros


@pytest.mark.parametrize("macro", [macro for macro in PASSING if macro != JSON_FILE])
def test_a_macro_becomes_what_wandb_makes_of_it(macro: str) -> None:
    made = create_sweep_command_args({"args": {key: {"value": value} for key, value in VALUES.items()}})
    assert spellings(VALUES)[macro] == made[macro[2:-1]]
    assert (macro in HYPHENATED) == all(word.startswith("--") or word in map(str, VALUES.values()) for word in
                                        spellings(VALUES)[macro])  # fmt: skip


def test_all_of_wandb_s_macros_are_known() -> None:
    made = set(create_sweep_command_args({"args": {}}))
    assert {macro[2:-1] for macro in PASSING} == made - {"args_dict"} | {"args_json_file"}


def test_a_command_is_filled_in_as_wandb_agent_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLACE", "here")
    monkeypatch.delenv("NOWHERE", raising=False)
    words = ["${env}", "${interpreter}", "${program}", "--at=${envvar:PLACE}", "${envvar:NOWHERE}", 3, "${args}"]
    file = tmp_path / "folder" / "p.json"
    start = ["/usr/bin/env", sys.executable, "train.py"]
    filled = expand_command(words, {"a": 1, "b": 2}, "train.py", file)
    assert filled == [*start, "--at=here", "NOWHERE", "3", "--a=1", "--b=2"]
    assert not file.exists()
    default: tuple[list[Any] | None, ...] = (None, [])  # W&B's own command.
    for command in default:
        assert expand_command(command, {"a": 1}, "train.py", file) == [*start, "--a=1"]
    assert expand_command(["x", JSON_FILE], {"a": None}, None, file) == ["x", str(file)]
    assert json.loads(file.read_text()) == {"a": None}


# What a trial reads

READ: dict[str, tuple[list[Any] | None, str | None, dict[str, Any]]] = {
    "nothing of its own": ([*AGENT, "${args}"], None, {}),
    "knobs in all spellings": (
        [*AGENT, "--train.steps", "20", "--ema.warmup=false", "eval.every=7", "--log.progress", "${args}"],
        None,
        {"train.steps": 20, "ema.warmup": False, "log.progress": True, "eval.every": 7},
    ),
    "numbers": ([*AGENT, "--train.steps", 20, "${args}"], None, {"train.steps": 20}),
    "knobs after the parameters": ([*AGENT, "${args}", "--train.steps=20"], None, {"train.steps": 20}),
    "a knob that the parameters override": ([*AGENT, "--train.lr=1e-3", "${args}"], None, {}),
    "a preset": ([*AGENT, "--preset=mnist", "${args}", "--seed=3"], None, {"seed": 3}),
    "a flag before the parameters": ([*AGENT, "--log.progress", "${args_no_equals}"], None, {"log.progress": True}),
    "a launcher": (
        ["accelerate", "launch", "--num_processes", "4", "-m", "agent", "--train.steps=20", "${args}"],
        None,
        {"train.steps": 20},
    ),
    "a launcher that is a module": (
        ["python", "-m", "accelerate.commands.launch", "--num_processes", "4", "-m", "agent", "--seed=3", "${args}"],
        None,
        {"seed": 3},
    ),
    "a script": (["python3", "scripts/train_cifar.py", "--seed=3", "${args}"], None, {"seed": 3}),
    "a program": (["${env}", "${program}", "--seed=3", "${args}"], "scripts/train_cifar.py", {"seed": 3}),
    "a module as the program": (["python", "-m", "${program}", "--seed=3", "${args}"], "agent", {"seed": 3}),
    "a program without a command": (None, "scripts/train_cifar.py", {}),
    "files": (
        [*AGENT, "--config", "a.yaml", "--config=b.yaml", "${args}"],
        None,
        {"train.steps": 30, "train.batch_size": 5, "seed": 1},
    ),
    "files that knobs override": (
        [*AGENT, "--seed=3", "--config", "a.yaml", "${args}", "--config", "b.yaml"],
        None,
        {"train.steps": 30, "train.batch_size": 5, "seed": 3},
    ),
    "a file of parameters": ([*AGENT, "--config", JSON_FILE, "--seed=3"], None, {"seed": 3}),
    "a file of parameters after another file": (
        [*AGENT, "--config", "a.yaml", "--config", JSON_FILE, "--train.steps=8"],
        None,
        {"train.steps": 8, "train.batch_size": 5, "seed": 1},
    ),
    **{form: ([*AGENT, "--seed=3", form], None, {"seed": 3}) for form in PASSING if form != JSON_FILE},
}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two configuration files in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("train: {steps: 20, batch_size: 5, lr: 0.75}\nseed: 1\n")
    Path("b.yaml").write_text("train.steps: 30\n")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(("command", "program", "own"), READ.values(), ids=READ.keys())
def test_a_trial_is_checked_as_it_reads_its_words(
    command: list[Any] | None, program: str | None, own: dict[str, Any], tmp_path: Path
) -> None:
    sweep = sweep_of(command, program=program)
    chosen = {"preset": "digits", "train.lr": 0.25}
    expected = build_config({"preset": "digits", "train.lr": 0.25}, own)
    assert sweep.trial(chosen) == expected == read_by_the_trial(sweep, chosen, tmp_path)


def test_of_a_program_of_your_own_the_parameters_are_read(tmp_path: Path) -> None:
    for command in (["bash", "run.sh", "--fast", "${args}"], ["python", "mine.py", "fit", "--fast", "${args_json}"]):
        assert sweep_of(command).trial({"train.lr": 0.25}) == build_config({"train.lr": 0.25})
    sweep_of(["python", "mine.py", NO_FALSE, "hydra.run.dir=${now:%H}"], {"ema.warmup": {"values": [True, False]}})


def test_what_the_command_sets_is_estimated() -> None:
    estimator = Estimator(offline=True, past_seconds=[40.0])
    own = ["--preset", "digits", "--checkpoint.every=10", "--train.steps", "20"]
    sweep = sweep_of([*AGENT, *own, "${args}"], {"seed": {"values": [1, 2]}})
    same = sweep_of(
        [*AGENT, "${args}"],
        {
            "preset": {"value": "digits"},
            "checkpoint.every": {"value": 10},
            "train.steps": {"value": 20},
            "seed": {"values": [1, 2]},
        },
    )
    described = [describe_sweep(each, estimator, jobs=1, trials=2) for each in (sweep, same)]
    assert described[0] == described[1]
    assert list_trials(sweep, estimator, 2) == list_trials(same, estimator, 2)


def test_a_metric_that_the_command_turns_off_is_refused() -> None:
    metric = {"name": "eval/class_agreement", "goal": "maximize"}
    own = ["--eval.classifier", "none", "--checkpoint.best_metric=val/loss"]
    sweep_of([*AGENT, *own[2:], "${args}"], metric=metric)
    with pytest.raises(SweepError, match="eval/class_agreement': a trial does not log it"):
        sweep_of([*AGENT, *own, "${args}"], metric=metric)


def test_a_method_of_pruning_in_the_command_is_heard() -> None:
    parameters = {"preset": {"value": "digits"}, "prune.keep": {"values": [0.25, 0.75]}}
    sweep_of([*AGENT, "--prune.method=magnitude", "${args}"], parameters)
    with pytest.raises(SweepError, match=r"has no effect with prune\.method=none; drop it"):
        sweep_of([*AGENT, "${args}"], parameters)


def test_plugins_of_the_command_are_imported() -> None:
    with pytest.raises(SweepError, match="plugins = 'no_such_plugin': cannot import it"):
        sweep_of([*AGENT, "--plugins=no_such_plugin", "${args}"])


# What is refused, in one line

BOOLEAN = {"preset": {"value": "digits"}, "ema.warmup": {"values": [True, False]}}
REFUSED: dict[str, tuple[Any, dict[str, Any] | None, str]] = {
    "no parameters": (
        [*AGENT, "--seed=3"],
        None,
        "passes no parameters; end it in ${args}, such as [${env}, ${interpreter}, -m, agent, ${args}]",
    ),
    "a program without a name": (
        ["python", "${program}", "${args}"],
        None,
        "program = None: the command has ${program}",
    ),
    "a macro within a word": (
        [*AGENT, "--config=${args_json_file}"],
        None,
        "command = '--config=${args_json_file}': ${args_json_file} is filled in only as a word of its own; split it",
    ),
    "an unknown knob": (
        [*AGENT, "--trian.lr=1", "${args}"],
        None,
        "trian.lr = '1': unknown key; did you mean train.lr?",
    ),
    "a value out of range": (
        [*AGENT, "--train.steps", "0", "${args}"],
        None,
        "train.steps = '0': expected an integer >= 1",
    ),
    "a combination with the parameters": (
        [*AGENT, "--train.steps=20", "${args}"],
        {"preset": {"value": "digits"}, "prune.method": {"value": "magnitude"}, "prune.step": {"values": [10, 30]}},
        "prune.step = 30: expected less than train.steps = 20",
    ),
    "a word that is none": (
        [*AGENT, "fit", "${args}"],
        None,
        "command = 'fit': expected --key=value; --help all lists all keys",
    ),
    "a file that is missing": (
        [*AGENT, "--config", "none.yaml", "${args}"],
        None,
        "--config = 'none.yaml': No such file or directory",
    ),
    "a dry run": ([*AGENT, "--dry-run", "${args}"], None, "dry-run = 'true': unknown key"),
    "parameters that are overridden": (
        [*AGENT, "${args}", "--train.lr=1e-3"],
        None,
        "command = 'train.lr=0.001': overrides what the sweep chooses; put it before the parameters",
    ),
    "a section that overrides a parameter": (
        [*AGENT, "${args}", "--train={'lr': 0.001}"],
        None,
        "command = 'train.lr=0.001': overrides what the sweep chooses",
    ),
    "knobs over a file of parameters": (
        [*AGENT, "--train.lr=1e-3", "--config", JSON_FILE],
        None,
        "command = 'train.lr=0.001': overrides what the sweep chooses",
    ),
    "a file of parameters without --config": (
        [*AGENT, "--seed=3", JSON_FILE],
        None,
        "command = '${args_json_file}': is no knob; write --config before it",
    ),
    "parameters as a value": (
        [*AGENT, "--params", "${args_json}"],
        None,
        "command = '${args_json}': becomes the value of --params, which precedes it; use ${args}",
    ),
    "a flag before words without hyphens": (
        [*AGENT, "--log.progress", "${args_no_hyphens}"],
        None,
        "command = '${args_no_hyphens}': becomes the value of --log.progress, which precedes it; use ${args}",
    ),
    "a false value that is left out": (
        [*AGENT, NO_FALSE],
        BOOLEAN,
        "ema.warmup = False: the command leaves out false values, and True is used; use ${args}",
    ),
}


@pytest.mark.parametrize(("command", "parameters", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_would_not_run_as_it_reads_is_refused(
    command: Any, parameters: dict[str, Any] | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SweepError) as caught:
        sweep_of(command, parameters)
    assert reason in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_false_value_that_is_left_out_may_be_the_default() -> None:
    sweep = sweep_of([*AGENT, "--ema.warmup=False", NO_FALSE], BOOLEAN)
    assert [sweep.trial({"ema.warmup": value}).ema.warmup for value in (True, False)] == [True, False]


# Offline

ECHO = """
import json, os, sys
with open(os.path.join(os.environ["NOTES"], os.environ["WANDB_RUN_ID"]), "w") as file:
    json.dump(sys.argv[1:], file)
"""


@pytest.mark.parametrize("macro", PASSING)
def test_offline_each_macro_passes_what_the_sweep_chose(
    macro: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "POLL_SECONDS", 0.01)
    notes = tmp_path / "notes"
    notes.mkdir()
    monkeypatch.setenv("NOTES", str(notes))
    program = tmp_path / "echo.py"
    program.write_text(ECHO)
    parameters = {key: {"value": value} for key, value in VALUES.items()} | {"seed": {"values": [1, 2]}}
    words = ["--config", macro] if macro == JSON_FILE else [macro]
    sweep = sweep_of(["${interpreter}", "-S", "${program}", *words], parameters, program=str(program))
    coordinator = offline_sweep(sweep, tmp_path / "out", jobs=2)
    coordinator.run()
    assert sorted(os.listdir(notes)) == sorted(trial.id for trial in coordinator.state.trials)
    for trial in coordinator.state.trials:
        assert trial.state == "finished"
        config = config_from_words(split_argv(json.loads((notes / trial.id).read_text())))
        left_out = {"log.progress": True} if macro == NO_FALSE else {}  # Its default.
        folder = {"log.dir": str(coordinator.state.trial_folder(trial))}
        assert config == build_config(trial.parameters | left_out | folder)
