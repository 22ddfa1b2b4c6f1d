"""Sweep files as other projects write them are accepted where W&B accepts them, or refused in one line per reason."""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command

from agent.sweep.advice import advice
from agent.sweep.file import check_sweep
from diffusion_core.search.sweep import SweepError

DOCUMENTS = [
    document
    for document in yaml.safe_load_all((Path(__file__).parent / "public_sweeps.yaml").read_text(encoding="utf-8"))
    if document
]
SHAPES = [document["shape"] for document in DOCUMENTS]


def engine(name: str, *arguments: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(import_module("sweeps"), name)(*arguments)


def refusals_of_wandb(content: dict[str, Any]) -> list[str]:
    """Why W&B's schema, its engine or its agent cannot use a file.

    The published schema is older than two settings of the documentation, and its words on exponents are advice.
    """
    known = {key: value for key, value in content.items() if key != "run_cap"}
    if "early_terminate" in content:
        known["early_terminate"] = {k: v for k, v in content["early_terminate"].items() if k != "strict"}
    try:
        found = engine("schema_violations_from_proposed_config", known)
    except ValueError as error:
        found = [str(error)]
    if found := [reason for reason in found if "base-e exponents" not in reason]:
        return found
    try:
        engine("next_run", known, [])
        if "early_terminate" in known:
            engine("stop_runs", known, [])
    except Exception as error:  # Whatever the engine raises, it ends the sweep.
        return [repr(error)]
    words = create_sweep_command(list(content.get("command") or []))
    return ["no program"] if "${program}" in words and "program" not in content else []


def test_there_are_many_of_them() -> None:
    assert len(set(SHAPES)) == len(SHAPES) >= 30


@pytest.mark.parametrize("document", DOCUMENTS, ids=SHAPES)
def test_a_public_sweep_file_is_accepted_where_wandb_accepts_it_or_refused_in_lines(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("train: {steps: 6000}\n")
    Path("more.yaml").write_text("seed: 4\n")
    content = document["sweep"]
    assert (refusals_of_wandb(content) == []) == document["wandb"], refusals_of_wandb(content)
    if "refused" in document:
        with pytest.raises(SweepError) as caught:
            check_sweep(content, "x.yaml", "x")
        lines = str(caught.value).splitlines()
        assert len(lines) == len(document["refused"]), lines
        for line, part in zip(lines, document["refused"], strict=True):
            assert line.startswith("x.yaml: ")
            assert part in line
        return
    sweep = check_sweep(content, "x.yaml", "x")
    said = list(advice(sweep, sweep.total, offline=True))
    assert len(said) == len(document.get("advice", [])), said
    for line, part in zip(said, document.get("advice", []), strict=True):
        assert part in line
