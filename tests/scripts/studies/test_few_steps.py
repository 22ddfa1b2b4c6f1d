"""The study of few sampling steps trains each model once, judges all alike, and counts what an image costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from studies import few_steps

from diffusion_core.sampling.cost import MACS

TINY = [
    "--model.channels=8",
    "--model.channel_multipliers=1",
    "--model.attention_resolutions=",
    "--model.norm_groups=2",
]


@pytest.mark.slow
def test_each_model_is_trained_once_and_judged_in_its_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--teacher-steps", "4", "--tune-steps", "2", "--images", "100", "--out", str(tmp_path), "--", *TINY]
    few = ["--seeds", "0", "--lengths", "2"]
    assert few_steps.main([*few, *words]) == 0
    assert capsys.readouterr().err.count("run ") == 4
    measured = json.loads((tmp_path / "few-steps.json").read_text())
    macs = {key: figures[MACS] for key, figures in measured.items()}
    whole = macs["teacher, all steps, seed 0"]
    for name in ("dense, undistilled", "dense, student of 2 steps"):
        assert macs[f"{name}, 2 steps, seed 0"] == 2 * macs[f"{name}, 1 steps, seed 0"] == whole / 25
    assert macs["half the MACs, student of 2 steps, 1 steps, seed 0"] == pytest.approx(whole / 100, rel=0.1)
    table = [line for line in (tmp_path / "few-steps.md").read_text().splitlines() if line.startswith("| ")]
    assert len(table) == 1 + 10
    # Distillation: six forward passes a step against the teacher's three; the half one costs half, with fine-tuning.
    assert [row.split(" | ")[-1].strip(" |") for row in table[4:6]] == ["1.0", "1.0"]
    assert [row.split(" | ")[-1].strip(" |") for row in table[9:]] == ["0.8", "0.8"]

    more = ["--seeds", "0", "--lengths", "2,3", "--counts", "4,2,1"]
    assert few_steps.main([*more, *words]) == 0
    assert capsys.readouterr().err.count("run ") == 2, "only the longer students"
    again = json.loads((tmp_path / "few-steps.json").read_text())
    assert {key: again[key] for key in measured} == measured
    assert again["dense, student of 2 steps, 4 steps, seed 0"][MACS] == whole * 4 / 50

    assert few_steps.main([*more, *words, "--train.batch_size=8"]) == 2
    assert "holds results of {'teacher_steps': 4, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--lengths", "2,x"], "--lengths = '2,x': expected integers > 0, such as 1300,2600"),
        (["--counts", "0"], "--counts = '0': expected integers > 0, such as 4,2,1"),
    ],
)
def test_wrong_numbers_are_one_line(
    words: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert few_steps.main([*words, "--out", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err == f"error: {error}\n"
