"""Record what a fixed seed trains and samples on the built-in digits, or compare with an earlier record.

  python tests/golden.py > golden.json           before a change that must not change results
  python tests/golden.py --check golden.json     after it; exit status 1 if a digest differs

Models are trained and sampled by the command line, in fp32 on the processor with one thread: dense, masked by
magnitude, and with channels removed by their l2 norm. The record holds a SHA-256 of each weight, average, optimizer
tensor, mask and image, and the logged losses. Digests depend on the processor and on the version of PyTorch, so a
record is good for one machine only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
TRAIN = [sys.executable, "-m", "agent"]
SAMPLE = [sys.executable, str(ROOT / "scripts" / "sample_images.py")]

KNOBS = {
    "preset": "digits",
    "model.channels": "16",
    "model.norm_groups": "4",
    "model.dropout": "0.1",
    "train.steps": "48",
    "train.batch_size": "16",
    "train.warmup_steps": "8",
    "train.weight_decay": "0.01",
    "train.precision": "fp32",
    "train.device": "cpu",
    "eval.every": "16",
    "eval.val_images": "64",
    "eval.num_images": "20",
    "sample.every": "0",
    "sample.per_class": "1",
    "sample.steps": "6",
    "checkpoint.best_metric": "val/loss",
    "log.every": "4",
    "log.progress": "false",
}
CASES = {
    "dense": {"prune.method": "none"},
    "masked": {"prune.method": "magnitude", "prune.keep": "0.4"},
    "structured": {"prune.method": "structured", "prune.importance": "l2", "prune.keep": "0.5"},
}
SAMPLERS = {
    "ddim": ["--sampler", "ddim", "--eta", "0.5"],
    "ddpm": ["--sampler", "ddpm"],
    "dpmpp_2m": ["--sampler", "dpmpp_2m"],
    "heun, guided": ["--sampler", "heun", "--guidance", "2"],
}
TIMINGS = ("second", "latency", "memory")
"""Figures that differ from run to run have one of these in their names."""


def record() -> dict[str, Any]:
    """Train and sample every case."""
    cases = {}
    for name, knobs in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            cases[name] = run_case(Path(folder), KNOBS | knobs)
    return {"machine": machine(), "cases": cases}


def machine() -> dict[str, str]:
    """What digests depend on besides the code."""
    return {
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def run_case(folder: Path, knobs: dict[str, str]) -> dict[str, Any]:
    """Train one model and sample it with every sampler."""
    call([*TRAIN, *(f"--{key}={value}" for key, value in knobs.items()), "--log.dir=run"], folder)
    run = folder / "run"
    newest = max((run / "checkpoints").iterdir())
    found: dict[str, Any] = {"figures": figures(run / "history.jsonl"), "tensors": {}, "images": {}}
    for file in sorted(newest.glob("*.safetensors")):
        found["tensors"][file.stem] = {name: digest(array) for name, array in sorted(load_file(file).items())}
    for name, words in SAMPLERS.items():
        out = folder / name
        drawn = ["--labels", "all", "--num-images", "10", "--steps", "6", "--device", "cpu", "--precision", "fp32"]
        call([*SAMPLE, "--checkpoint", str(newest), "--out", str(out), *drawn, *words], folder)
        found["images"][name] = {file.name: digest(pixels(file)) for file in sorted(out.glob("*.png"))}
    return found


def call(command: list[str], folder: Path) -> None:
    """Run a command with one thread and without W&B; what it prints is shown only if it fails."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    env |= {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def digest(array: np.ndarray) -> str:
    """SHA-256 of an array's type, shape and bytes."""
    header = f"{array.dtype} {array.shape} ".encode()
    return hashlib.sha256(header + np.ascontiguousarray(array).tobytes()).hexdigest()


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def figures(history: Path) -> list[dict[str, float]]:
    """The rows of a history, without what is measured by the clock."""
    rows = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if not any(word in key for word in TIMINGS)} for row in rows]


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested dictionaries and lists as one dictionary, by path."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return {path: value}
    return {key: leaf for name, below in items for key, leaf in flat(below, f"{path}/{name}").items()}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The paths at which two records differ."""
    old, new = flat(before["cases"]), flat(after["cases"])
    return sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))


def main() -> int:
    """Returns the exit status: 0, or 1 if the record differs from the one to check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with this record, and print no new one")
    arguments = parser.parse_args()
    before = json.loads(arguments.check.read_text(encoding="utf-8")) if arguments.check else None
    if before and before["machine"] != machine():
        print(f"warning: recorded on {before['machine']}, now on {machine()}", file=sys.stderr)
    after = record()
    if before is None:
        print(json.dumps(after, indent=1))
        return 0
    changed = differences(before, after)
    for path in changed[:20]:
        print(f"differs: {path}")
    print(f"{len(changed)} of {len(flat(before['cases']))} values differ")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
