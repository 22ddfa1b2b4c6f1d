"""Measure training and sampling on a GPU against its floors, which are measured too: matrix rate and bandwidth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.measurement.options import Options
from benchmarks.measurement.rows import Row

SUBJECT = "gpu"
PARTS = (
    "floors",
    "training",
    "peer",
    "sampling",
    "digits",
    "training-pruned",
    "training-pruned-64",
    "sampling-pruned",
)
TRAIN_TARGET, TRAIN_SHARE_TARGET, PEER_TARGET = 9000.0, 0.40, 2.5
SAMPLE_SHARE_TARGET, SAMPLES_TARGET_MIN, SAMPLES = 0.50, 5.0, 50_000
DIGITS_TARGET, PRUNED_TARGET, START_TARGET_S = 1000.0, 1.6, 15.0
COMPILING_S, MEASURING_S = 300.0, 300.0
"""Time limits in seconds for all parts together: for compiling, and for measuring."""


def measure(options: Options) -> list[Row]:
    """Measure all parts, each in its own process (see :mod:`benchmarks.gpu_parts`).

    Without a GPU, nothing is measured, except in a short run, which checks that the code works.
    """
    if not torch.cuda.is_available() and not options.short:
        return [Row(SUBJECT, what, None, note="no GPU here") for what in ("floors", "training", "sampling")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = {part: start(part, folder, options) for part in PARTS}
        deadline = time.monotonic() + COMPILING_S
        while time.monotonic() < deadline and not all(
            (folder / f"{part}.ready").exists() or process.poll() is not None for part, process in processes.items()
        ):
            time.sleep(0.2)
        options.say("all parts are compiled; measuring one after another")
        (folder / "go").touch()
        deadline = time.monotonic() + MEASURING_S
        for process in processes.values():
            try:
                process.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        # The compiler's cache is warm now, as it is for the second trial of a sweep.
        start("start", folder, options).wait()
        found = {
            part: json.loads(file.read_text()) if (file := folder / f"{part}.json").is_file() else {}
            for part in (*PARTS, "start")
        }
    return rows(found)


def start(part: str, folder: Path, options: Options) -> subprocess.Popen[bytes]:
    """Start the process of a part."""
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "scripts"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "benchmarks.gpu_parts", part, str(folder), "--started", str(time.time())]
    output = subprocess.DEVNULL if options.quiet else sys.stderr
    return subprocess.Popen([*command, *(["--short"] if options.short else [])], env=environment, stdout=output)


def rows(found: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Return rows with the results of the parts and their targets. Parts without results have rows without values."""

    def value(part: str, name: str) -> float | None:
        return found[part].get(name)

    def ratio(one: float | None, other: float | None) -> float | None:
        return one / other if one is not None and other is not None else None

    def images(part: str) -> str:
        return f"{found[part]['images']:,.0f} images/s" if "images" in found[part] else ""

    def share(part: str) -> float | None:
        done, flops = value(part, "images"), value(part, "flops_an_image")
        return ratio(done * flops if done is not None and flops is not None else None, value("floors", "flops"))

    rate, moved = ratio(value("floors", "flops"), 1e12), ratio(value("floors", "bytes"), 1e9)
    train, sample = "training, bf16, batch 512, whole loop", "sampling, DDIM 50, batch 1024"
    drawn, seen = value("sampling", "images"), value("sampling", "looked_at")
    minutes = SAMPLES * (1.0 / drawn + 1.0 / seen) / 60.0 if drawn and seen else None
    return [
        Row(SUBJECT, "floor: bf16 matrix product", rate, "TFLOP/s"),
        Row(SUBJECT, "floor: copy, bytes read and written", moved, "GB/s"),
        Row(SUBJECT, train, value("training", "images"), "images/s", TRAIN_TARGET, details=dict(found["training"])),
        Row(SUBJECT, f"{train}: share of the matrix rate", share("training"), "of it", TRAIN_SHARE_TARGET),
        Row(
            SUBJECT,
            f"{train}, against diffusers' example in bf16",
            ratio(value("training", "images"), value("peer", "images")),
            target=PEER_TARGET,
            ours=images("training"),
            peer=images("peer"),
        ),
        Row(
            SUBJECT,
            f"{train}, pruned to half the MACs, against dense",
            ratio(value("training-pruned", "images"), value("training", "images")),
            target=PRUNED_TARGET,
            ours=images("training-pruned"),
            peer=images("training"),
            details=dict(found["training-pruned"]),
        ),
        Row(
            SUBJECT,
            f"{train}, pruned to half the MACs in multiples of 64 channels, against dense",
            ratio(value("training-pruned-64", "images"), value("training", "images")),
            ours=images("training-pruned-64"),
            peer=images("training"),
        ),
        Row(
            SUBJECT,
            f"{sample}: share of the matrix rate",
            share("sampling"),
            "of it",
            SAMPLE_SHARE_TARGET,
            ours=images("sampling"),
            details=dict(found["sampling"]),
        ),
        Row(
            SUBJECT,
            f"{sample}, pruned to half the MACs, against dense",
            ratio(value("sampling-pruned", "images"), drawn),
            target=PRUNED_TARGET,
            ours=images("sampling-pruned"),
            peer=images("sampling"),
        ),
        Row(SUBJECT, f"{SAMPLES:,} samples and Inception features", minutes, "min", SAMPLES_TARGET_MIN, at_least=False),
        Row(
            SUBJECT,
            "digits, batch 256, whole loop",
            value("digits", "steps"),
            "steps/s",
            DIGITS_TARGET,
            details=dict(found["digits"]),
        ),
        Row(
            SUBJECT,
            "start of a process to its first step, compiled, from a warm cache",
            value("start", "first_step_s"),
            "s",
            START_TARGET_S,
            at_least=False,
        ),
    ]
