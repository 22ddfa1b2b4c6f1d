"""Two processes on one machine, by gloo: they train the model that one alone would, in one folder and one run.

`accelerate launch` as a user calls it; W&B's own client, offline. (`scripts/sample_images.py` on several processes
belongs here as well.)
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_core.checkpoint import read_checkpoint

ROOT = Path(__file__).parents[1]
WORDS = [
    "--preset=digits",
    "--train.device=cpu",
    "--train.precision=fp32",
    "--train.steps=4",
    "--train.batch_size=8",
    "--train.warmup_steps=0",
    "--model.channels=8",
    "--model.channel_multipliers=1,2",
    "--model.num_res_blocks=1",
    "--model.attention_resolutions=4",
    "--model.norm_groups=4",
    "--model.dropout=0",
    "--diffusion.timesteps=50",
    "--sample.steps=2",
    "--sample.per_class=1",
    "--eval.classifier=none",
    "--eval.val_images=16",
    "--checkpoint.best_metric=val/loss",
    "--checkpoint.every=2",
    "--log.every=1",
    "--log.progress=false",
]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(folder: Path, processes: int, *words: str, mode: str = "disabled") -> subprocess.CompletedProcess[str]:
    """`python -m agent` in an empty folder, on so many processes."""
    folder.mkdir(exist_ok=True)
    launcher = [sys.executable]
    if processes > 1:
        launcher = [
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
            *("--num_processes", str(processes), "--num_machines", "1", "--main_process_port", str(free_port())),
            *("--mixed_precision", "no", "--dynamo_backend", "no"),
        ]
    done = subprocess.run(
        [*launcher, "-m", "agent", *WORDS, *words],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        | {"PYTHONPATH": str(ROOT), "WANDB_MODE": mode, "OMP_NUM_THREADS": "1", "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def check_same_training(alone: Path, together: Path, tolerance: float = 1e-5) -> None:
    one, two = (read_checkpoint(only(folder, "runs/*")) for folder in (alone, together))
    assert one.step == two.step == 4
    assert one.parts == two.parts
    for part in ("model", "ema"):
        theirs = two.tensors(part)
        for name, tensor in one.tensors(part).items():
            assert (tensor - theirs[name]).abs().max() < tolerance, f"{part} {name}"


@pytest.mark.slow
def test_two_processes_train_the_model_of_one_as_one_run(tmp_path: Path) -> None:
    """With all that a step draws: noise, timesteps, offsets, dropped labels, who is shown an estimate."""
    words = [
        "--model.self_conditioning",
        "--model.learned_variance",
        "--diffusion.timestep_sampling=lognormal",
        "--diffusion.offset_noise=0.1",
        "--train.accumulation=2",
        "--ema.power_widths=0.1",
        "--ema.average_from=1",
        "--checkpoint.upload=false",
    ]
    alone, together = tmp_path / "alone", tmp_path / "together"
    run(alone, 1, *words)
    done = run(together, 2, *words, mode="offline")

    one, two = (read_checkpoint(only(folder, "runs/*")) for folder in (alone, together))  # One run folder each.
    assert one.step == two.step == 4
    assert one.parts == two.parts
    for part in one.parts:
        if part != "optimizer":
            theirs = two.tensors(part)
            for name, tensor in one.tensors(part).items():
                assert (tensor - theirs[name]).abs().max() < 1e-5, f"{part} {name}"
    assert len(list(together.rglob("offline-run-*"))) == 1

    assert done.stdout.count("finished ") == 1  # The second process is silent.
    texts = [only(folder, "runs/*/history.jsonl").read_text() for folder in (alone, together)]
    rows = [[json.loads(line) for line in text.splitlines()] for text in texts]
    assert [row["step"] for row in rows[1]] == [1, 2, 3, 4]
    for mine, ours in zip(*rows, strict=True):
        for key in ("train/loss", "train/lr", "train/epoch"):
            assert ours[key] == pytest.approx(mine[key], rel=1e-5), key
    assert rows[1][-1]["val/loss"] == pytest.approx(rows[0][-1]["val/loss"], rel=1e-4)
    assert json.loads(only(together, "runs/*/result.json").read_text())["step"] == 4
