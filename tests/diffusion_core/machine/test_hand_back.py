"""A job whose trial W&B does not take back keeps it, and begins no other one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from diffusion_core.machine import job
from diffusion_core.machine.assigned import TRIAL_FILE

HAND_BACK = """
import os, sys
with open("calls", "a") as file:
    file.write(sys.argv[-1] + "\\n")
told = sys.argv[1:-1][len(open("calls").readlines()) - 1]
if told.startswith("SIG"):
    os.kill(os.getppid(), getattr(__import__("signal"), told))
sys.exit(143 if told.startswith("SIG") else int(told))
"""


@pytest.fixture(autouse=True)
def member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process is a member of an array, whose last job was killed in a trial. Return the folder of its notes."""
    (tmp_path / "bin").mkdir()
    for name in ("squeue", "scontrol"):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/slurm\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    for name, value in {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "PAUSES_S", (0.1, 0.2), raising=False)
    (tmp_path / "agent-1").mkdir()
    (tmp_path / "agent-1" / TRIAL_FILE).write_text(json.dumps({"folder": "runs/mine", "run": "mine"}))
    return tmp_path


def run_job(*told: str) -> int:
    """Run an agent that only notes that it began; its trial's return ends in these ways, one after the other."""
    hand_back = [sys.executable, "-S", "-c", HAND_BACK, *told]
    words = job.command_of_job(Path("agent"), [sys.executable, "-S", "-c", "open('began', 'w')", "a/b/c"], hand_back)
    return job.main(words[3:])


@pytest.mark.parametrize("told", [["0"], ["1"], ["2", "143", "0"]])
def test_a_trial_that_was_handed_back_is_forgotten_and_the_agent_begins(member: Path, told: list[str]) -> None:
    assert run_job(*told) == 0
    assert (member / "calls").read_text().split() == ["runs/mine"] * len(told)
    assert (member / "began").exists()
    assert not (member / "agent-1" / TRIAL_FILE).exists()


@pytest.mark.parametrize("told", [["2"] * 3, ["SIGTERM"], ["2", "SIGTERM"], ["SIGUSR1"]])
def test_a_trial_that_was_not_handed_back_is_kept_and_the_agent_does_not_begin(
    member: Path, told: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_job(*told) == 2
    assert (member / "calls").read_text().split() == ["runs/mine"] * len(told)
    assert not (member / "began").exists()
    assert json.loads((member / "agent-1" / TRIAL_FILE).read_text())["run"] == "mine"
    assert ("scontrol requeue 7_1" in (member / "slurm").read_text()) == (told[-1] == "SIGUSR1")
    said = "runs/mine: not handed back; when W&B answers, start the sweep's command again\n"
    assert capfd.readouterr().err == (said if told[-1] == "2" else "")
