"""The content of sweep files whose trials are tests/stub_trial.py: they start at once and train nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

STUB = Path(__file__).parent / "stub_trial.py"


def stub_content(steps: int, rates: Sequence[float]) -> dict[str, Any]:
    """A grid over learning rates, one trial each."""
    fixed = {"preset": "digits", "seed": 0, "train.steps": steps, "train.warmup_steps": 0}
    return {
        "method": "grid",
        "metric": {"name": "val/loss", "goal": "minimize"},
        "command": ["${interpreter}", "-S", str(STUB), "${args}"],
        "parameters": {key: {"value": value} for key, value in fixed.items()} | {"train.lr": {"values": list(rates)}},
    }
