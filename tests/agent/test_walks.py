"""How far the configuration travels: which modules of the project are handed a whole one while a trial runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from tiny import TINY, digits

from agent.config import TrialConfig
from agent.trial import run_trial
from diffusion_core.config import CoreConfig, build
from diffusion_core.tracking import MemoryTracker

PROJECT = f"{Path(__file__).resolve().parents[2]}/"
PRUNINGS: dict[str, dict[str, Any]] = {
    "gradual": {"prune.method": "gradual", "prune.step": 1, "prune.until": 3, "prune.interval": 1},
    "snip": {"prune.method": "snip"},
    "rigl": {"prune.method": "rigl", "prune.until": 3, "prune.interval": 1},
    "structured": {"prune.method": "structured", "prune.keep": 0.5, "prune.depth": 0.5, "distill.features": 1.0},
}


@pytest.mark.slow
def test_a_trial_hands_its_whole_configuration_to_few_modules(tmp_path: Path) -> None:
    reached: set[str] = set()

    def note(frame: FrameType, event: str, _argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PROJECT):
            # As a function is entered, its locals are its arguments. The schema's own checks do not count.
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            if any(isinstance(frame.f_locals.get(name), CoreConfig) for name in names):
                reached.add(code.co_filename.removeprefix(PROJECT))

    for name, knobs in PRUNINGS.items():
        config = build(TrialConfig, TINY, {"train.steps": 4, "eval.consistency_images": 2}, knobs)
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            run_trial(config, MemoryTracker(), dataset=digits(), folder=tmp_path / name, run_id=name)
        finally:
            sys.setprofile(before)
    reached = {path for path in reached if not re.match(r"tests/|diffusion_core/config/|\w+/config\.py", path)}
    assert {"agent/trial.py", "diffusion_core/training/trainer.py", "pruning/pruner.py"} <= reached
    assert len(reached) <= 15, "\n".join(sorted(reached))
