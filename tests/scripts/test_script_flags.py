"""Every flag of every script is run by some test.

The flags are those of the scripts' own parsers. A test runs a flag if it names it in a call that is meant to work: what
tests of refusals name (REFUSALS) does not count.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
SCRIPTS = ROOT / "scripts"

RUN_BY = {
    "agent.clean": ["test_keeping.py"],
    "agent.report": ["test_reports.py", "test_published.py", "test_wandb_report.py"],
    "agent.leaderboard": ["test_evaluate.py", "test_published.py", "test_choice.py", "test_plugins.py"],
    "agent.sweep": [
        "test_end_to_end.py",
        "test_estimate.py",
        "test_offline_sweeps.py",
        "test_sweep_files.py",
        "test_fake_slurm.py",
        "test_slurm_disturbed.py",
    ],
    "agent.sync": ["test_outages.py", "test_faults.py", "test_plugins.py"],
    "benchmark": ["test_benchmark.py"],
    "check_formulations": ["test_formulations.py"],
    "compare_formulations": ["test_formulations.py"],
    "compare_pruning": ["test_compare_pruning.py"],
    "compare_tickets": ["test_compare_tickets.py"],
    "convert_diffusers": ["test_convert_diffusers.py", "test_plugins.py", "test_choice.py"],
    "evaluate": [
        "test_evaluate.py",
        "test_artifact_flags.py",
        "test_features.py",
        "test_plugins.py",
        "test_choice.py",
        "test_phase.py",
        "test_chains.py",
    ],
    "export_model": ["test_export_model.py", "test_artifact_flags.py", "test_plugins.py"],
    "gpu_check": ["test_gpu_check.py"],
    "lottery_ticket": ["test_lottery.py", "test_lottery_runs.py"],
    "prepare_images": ["test_prepare_images.py"],
    "promote": ["test_keeping.py"],
    "prune": ["test_prune_script.py", "test_provenance.py", "test_plugins.py", "test_choice.py"],
    "sample_images": [
        "test_sample_images.py",
        "test_artifact_flags.py",
        "test_plugins.py",
        "test_choice.py",
        "test_chains.py",
    ],
    "train_classifier": ["test_train_classifier.py"],
}
"""Modules with a parser, and the files of the tests that run them."""

WITHOUT_PARSER = {"train_cifar"}
"""Scripts that hand all their words to ``python -m agent``, whose knobs tests/agent/test_knobs.py runs."""

REFUSALS = re.compile(r"refused|wrong|not_mixed")
"""Names of tests that show what is refused."""

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")

PARSES = re.compile(r"\.parse_(known_)?args\(")


class Asked(Exception):
    """Carries the parser that was about to be used."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_of(module: str, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> argparse.ArgumentParser:
    """The parser that a module's ``main`` builds."""

    def capture(self: argparse.ArgumentParser, *_: object) -> None:
        raise Asked(self)

    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", capture)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", capture)
    entry = importlib.import_module(module)
    if hasattr(entry, "__path__"):  # A package: what python -m runs.
        entry = importlib.import_module(f"{module}.__main__")
    with pytest.raises(Asked) as asked:
        entry.main(words)
    return asked.value.parser


def flags_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The long flags of a parser and of its sub-commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub_parser in action.choices.values():
                yield from flags_of(sub_parser)
        elif not isinstance(action, argparse._HelpAction | argparse._VersionAction):  # Run by test_terminal.py.
            yield from (flag for flag in action.option_strings if flag.startswith("--"))


def flags_in(node: ast.AST) -> Iterator[str]:
    """The flags that source text names in strings, outside tests of refusals."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef) and REFUSALS.search(child.name):
            continue
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield from FLAG.findall(child.value)
        yield from flags_in(child)


def modules_with_parser() -> set[str]:
    """What can be run on the command line and has a parser."""
    paths = [*SCRIPTS.glob("*.py"), *(ROOT / "agent").rglob("*.py")]
    with_parser = [path for path in paths if PARSES.search(path.read_text(encoding="utf-8"))]
    dotted = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in with_parser}
    return {dotted[path].removeprefix("scripts.").removesuffix(".__main__") for path in with_parser}


def test_every_script_is_listed() -> None:
    scripts = {path.stem for path in SCRIPTS.glob("*.py")}
    assert set(RUN_BY) == modules_with_parser()
    assert scripts == {name for name in RUN_BY if "." not in name} | WITHOUT_PARSER


@pytest.mark.parametrize("module", RUN_BY)
def test_every_flag_is_run_by_a_test(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--overlap"] if module == "lottery_ticket" else []
    flags = set(flags_of(parser_of(module, monkeypatch, words)))
    assert flags
    named: set[str] = set()
    for name in RUN_BY[module]:
        source = next(TESTS.rglob(name)).read_text(encoding="utf-8")
        assert module.rpartition(".")[2] in source, f"{name} does not run {module}"
        named |= set(flags_in(ast.parse(source)))
    assert flags <= named, f"no test runs {', '.join(sorted(flags - named))} of {module}"


def test_a_flag_that_only_a_refusal_names_does_not_count() -> None:
    source = """
def test_it_works():
    run("--out", "a", "--seed=3", f"x --name {1}")

@pytest.mark.parametrize("words", [["--steps", "0"]])
def test_wrong_words(words):
    run("--count")
"""
    assert set(flags_in(ast.parse(source))) == {"--out", "--seed", "--name"}
