"""Variables of a launcher that do not lead to other processes: one line that names the variable and the remedy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from forks import ROOT, WORDS

NO_ADDRESS = "says that this is one of several processes, but MASTER_ADDR, the address of the first one, is not set"
REMEDY = "start them with `accelerate launch`, or unset {} to run one process"
HOST = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
CASES: dict[str, tuple[dict[str, str], str]] = {
    **{
        name: ({name: "2"}, f"{name} = '2': {NO_ADDRESS}; {REMEDY.format(name)}")
        for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    },
    "of one process by mpirun": (
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
        f"OMPI_COMM_WORLD_SIZE = '2': {NO_ADDRESS}; {REMEDY.format('OMPI_COMM_WORLD_SIZE')}",
    ),
    "no size": ({"LOCAL_RANK": "0"}, f"LOCAL_RANK = '0': {NO_ADDRESS}; {REMEDY.format('LOCAL_RANK')}"),
    "no integer": ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two': expected an integer; correct or unset it"),
    "an empty one": ({"RANK": ""}, "RANK = '': expected an integer; correct or unset it"),
    "no rank": (
        {"WORLD_SIZE": "2", **HOST},
        f"WORLD_SIZE = '2': says that this is one of several processes, but RANK is not set; "
        f"{REMEDY.format('WORLD_SIZE')}",
    ),
    "too large a rank": (
        {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", **HOST},
        f"RANK = 2: expected 0 to 1 with WORLD_SIZE=2; {REMEDY.format('WORLD_SIZE')}",
    ),
    "a port that is not free": (  # Only the system's first user may listen on port 1.
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "99999"},
        "WORLD_SIZE = '2': says that this is one of several processes, but it cannot join them (",
    ),
}


def run(folder: Path, variables: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    clean |= {"WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=clean | variables,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_trial_names_the_variable_and_the_remedy(case: str, tmp_path: Path) -> None:
    variables, expected = CASES[case]
    done = run(tmp_path, variables, "-m", "agent", *WORDS)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith(("[W", "[E"))]  # PyTorch's own log.
    assert line.startswith(f"error: {expected}")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_scripts_and_a_size_of_one(tmp_path: Path) -> None:
    for script in ("sample_images.py", "evaluate.py"):
        words = [str(ROOT / "scripts" / script), "--checkpoint", "nothing", "--device", "cpu"]
        words += ["--out", "out"] if script == "sample_images.py" else []
        done = run(tmp_path, {"PMI_SIZE": "2"}, *words)
        assert (done.returncode, done.stderr) == (
            2,
            f"error: PMI_SIZE = '2': {NO_ADDRESS}; {REMEDY.format('PMI_SIZE')}\n",
        )
    alone = run(tmp_path, {"PMI_SIZE": "1", "PMI_RANK": "0"}, "-m", "agent", *WORDS, "--train.steps=1")
    assert alone.returncode == 0, alone.stderr
