"""The study of recovery trains each model once, judges all by the same real images, and goes on where it stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT
from studies import recovery

from diffusion_core.checkpoint import read_checkpoint
from diffusion_core.run_folder import CHECKPOINTS, HISTORY_FILE, read_history

TINY = [
    "--preset=digits",
    "--model.channels=8",
    "--model.channel_multipliers=1,2",
    "--model.attention_resolutions=",
    "--model.norm_groups=2",
    "--sample.steps=2",
]


@pytest.mark.slow
def test_rows_may_come_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--steps", "20", "--images", "100", "--out", str(tmp_path), "--", *TINY]
    assert recovery.main(["--rows", "dense", "--guidances", "1,2", *words]) == 0
    assert len(list(tmp_path.glob("*.png"))) == 2, "a grid of each guidance"
    dense = json.loads((tmp_path / "dense-guidance-2.json").read_text())
    first = {file: file.read_bytes() for file in tmp_path.glob("*.json")}

    assert recovery.main(["--rows", "random,l2", "--guidances", "1,2", *words]) == 0
    assert {file: file.read_bytes() for file in first} == first, "nothing is measured twice"
    pruned = json.loads((tmp_path / "l2-guidance-2.json").read_text())
    assert pruned["macs"] / dense["macs"] == pytest.approx(0.56, rel=0.02)
    table = [line.split("|")[1:-1] for line in (tmp_path / "recovery.md").read_text().splitlines() if line[:2] == "| "]
    names = [row[0].strip() for row in table[1:]]
    assert names == [
        "training images",
        "dense, guidance 1",
        "dense, guidance 2",
        "random, guidance 2",
        "l2, guidance 2",
    ]
    least, ratios = float(table[1][2]), [float(row[3]) for row in table[1:]]
    assert ratios == pytest.approx([float(row[2]) / least for row in table[1:]], abs=0.06)
    assert ratios[0] == 1.0
    assert "and 2 steps of fine-tuning" in capsys.readouterr().out

    assert recovery.main(["--rows", "dense", *words, "--train.batch_size=8"]) == 2
    assert "holds results of {'steps': 20, " in capsys.readouterr().err


def test_an_unknown_row_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recovery.main(["--rows", "l2,tailor", "--out", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err.startswith("error: --rows = 'tailor': expected some of dense, random, l1, l2, ")


@pytest.mark.slow
def test_a_study_that_is_stopped_goes_on_inside_its_run(tmp_path: Path) -> None:
    """Real processes: one is sent SIGTERM while a run trains; the next command continues that run."""
    words = ["--rows", "dense", "--images", "100", "--guidances", "1"]

    def command() -> subprocess.Popen[str]:
        more = ["--steps", "400", "--out", str(tmp_path / "out"), "--", *TINY, "--log.every=1"]
        return subprocess.Popen(
            [sys.executable, "-m", "studies.recovery", *words, *more],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")])},
            stderr=subprocess.PIPE,
            text=True,
        )

    stopped = command()
    run = tmp_path / "out" / "runs" / "dense"
    deadline = time.monotonic() + 120.0
    while not (run / HISTORY_FILE).is_file() and stopped.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    _, said = stopped.communicate(timeout=120)
    assert stopped.returncode == 128 + signal.SIGTERM
    assert said.splitlines()[-1] == f"stopped; run the same command again to continue ({tmp_path / 'out'})"
    (kept,) = (run / CHECKPOINTS).iterdir()
    step = read_checkpoint(kept).step
    assert 0 < step < 400

    again = command()
    _, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    steps = [row["step"] for row in read_history(run)]
    assert steps == list(range(1, 401)), "no step is lost, and none is repeated"
