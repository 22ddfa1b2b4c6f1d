"""The scripts that train every formulation: what they measure, keep, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import check_formulations
import compare_formulations
import compare_pruning
import compare_tickets
import pytest
from check_formulations import Measured
from commands import run_command
from tiny import TINY

from agent.config import build_config
from diffusion_core.config import FORMULATIONS

SMALL = [f"--{key}={','.join(map(str, value)) if isinstance(value, list) else value}" for key, value in TINY.items()
         if key not in ("train.precision", "log.every", "train.steps", "train.lr", "eval.val_images")]  # fmt: skip


def check(folder: Path, *words: str) -> int:
    return check_formulations.main([*SMALL, "--train.steps=20", "--train.lr=0.01", "--out", str(folder), *words])


def test_every_formulation_is_one_of_the_schema_and_no_two_are_the_same() -> None:
    configs = [build_config(check_formulations.STARTING_POINT, knobs) for knobs in FORMULATIONS.values()]
    assert len({config.model_dump_json() for config in configs}) == len(FORMULATIONS) == 10
    assert set(compare_formulations.COMPARED) <= set(FORMULATIONS)


def test_the_check_says_how_the_loss_falls_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(tmp_path, "--formulations=v") == 0
    table = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert list(results) == ["v, fp32", "v, bf16"]
    for key, precision in (("v, fp32", "01"), ("v, bf16", "02")):
        history = (tmp_path / precision / "history.jsonl").read_text().splitlines()
        losses = [row["train/loss"] for row in map(json.loads, history) if "train/loss" in row]
        assert len(losses) == 20
        assert results[key]["first"] == pytest.approx(sum(losses[:2]) / 2)
        assert results[key]["last"] == pytest.approx(sum(losses[-2:]) / 2)
        assert f"{results[key]['first']:.3f} | {results[key]['last']:.3f} | falls" in table
    assert results["v, fp32"]["first"] != results["v, bf16"]["first"]
    assert table.strip() == (tmp_path / "table.md").read_text().strip()

    assert check(tmp_path, "--formulations=v") == 0
    again = capsys.readouterr()
    assert again.out == table
    assert "1 of 2" not in again.err
    assert check(tmp_path, "--formulations=v", "--seed=1") == 2
    assert "holds results of other knobs" in capsys.readouterr().err


def test_a_loss_that_rises_or_is_no_number_fails() -> None:
    assert Measured(1.0, 0.5, "", 1.0).verdict == "falls"
    assert Measured(0.5, 0.5, "", 1.0).verdict == "does not fall"
    assert Measured(0.5, float("nan"), "", 1.0).verdict == "does not fall"
    assert Measured(1.0, 0.5, "train/loss = nan", 1.0).verdict == "train/loss = nan"


@pytest.mark.parametrize(
    ("script", "word", "said"),
    [
        (check_formulations, "--formulations=eps;eq", "--formulations = 'eq': expected some of eps; v"),
        (check_formulations, "--train.lrr=1", "unknown key; did you mean train.lr?"),
        (compare_formulations, "--formulations=min-SNR", "--formulations = 'min-SNR': expected some of eps; v"),
        (compare_formulations, "--samplers=magic", "--samplers = 'magic': expected some of ddim 50; ddpm 100"),
        (compare_formulations, "--seeds=-1", "--seeds = '-1': expected an integer >= 0"),
        (compare_formulations, "--steps=1", "--steps = 1: expected an integer >= 2"),
        (compare_pruning, "--seeds=a", "--seeds = 'a': expected an integer >= 0"),
        (compare_pruning, "--tables=best", "--tables = 'best': expected some of structured"),
        (compare_pruning, "--tune-steps=0", "--tune-steps = 0: expected an integer >= 1"),
        (compare_pruning, "--keep=1", "--keep = '1': expected shares between 0 and 1"),
        (compare_tickets, "--seeds=a", "--seeds = 'a': expected an integer >= 0"),
        (compare_tickets, "--sparsities=80,100", "--sparsities = '80,100': expected percentages above 0"),
        (compare_tickets, "--sparsities=0", "--sparsities = '0': expected percentages above 0"),
    ],
)
def test_wrong_words_are_refused_in_one_line(
    script: Any, word: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(script.__name__, word, "--out", str(tmp_path / "out")) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
    assert not (tmp_path / "out").exists()


def test_a_comparison_measures_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare_formulations, "IMAGES", 20)
    monkeypatch.setitem(FORMULATIONS, "eps", {key: value for key, value in TINY.items() if key.startswith("model.")})
    words = ["--formulations=eps", "--steps=3", "--seeds=5", "--out", str(tmp_path)]
    assert compare_formulations.main([*words, "--samplers=dpmpp_2m 10"]) == 0
    first = json.loads((tmp_path / "results.json").read_text())["eps, 3 steps, seed 5"]
    assert first.keys() == {"seconds", "dpmpp_2m 10"}
    assert 0.0 <= first["dpmpp_2m 10"] <= 1.0
    checkpoints = sorted(tmp_path.rglob("*.safetensors"))
    stamps = [path.stat().st_mtime_ns for path in checkpoints]
    assert checkpoints
    assert compare_formulations.main([*words, "--samplers=dpmpp_2m 10;heun 10, karras"]) == 0
    second = json.loads((tmp_path / "results.json").read_text())["eps, 3 steps, seed 5"]
    assert {key: second[key] for key in first} == first
    assert "heun 10, karras" in second
    assert [path.stat().st_mtime_ns for path in checkpoints] == stamps  # The model was not trained again.
    assert "| 10, 19 |" in capsys.readouterr().out  # Evaluations an image: Heun's two a step, one at the last.
