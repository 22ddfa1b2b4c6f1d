"""Variables of a launcher that do not lead to other processes: one line that names the variable and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from forks import ROOT, WORDS, Forks

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


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_trial_names_the_variable_and_the_remedy(case: str, tmp_path: Path, forks: Forks) -> None:
    variables, expected = CASES[case]
    output = forks.python(["-m", "agent", *WORDS], tmp_path, forks.env | {"WANDB_MODE": "disabled"} | variables).end(2)
    (line,) = [line for line in output.splitlines() if not line.startswith(("[W", "[E"))]  # PyTorch's own log.
    assert line.startswith(f"error: {expected}")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_scripts_and_a_size_of_one(tmp_path: Path, forks: Forks) -> None:
    env = forks.env | {"WANDB_MODE": "disabled"}
    for script in ("sample_images.py", "evaluate.py"):
        words = [str(ROOT / "scripts" / script), "--checkpoint", "nothing", "--device", "cpu"]
        words += ["--out", "out"] if script == "sample_images.py" else []
        output = forks.python(words, tmp_path, env | {"PMI_SIZE": "2"}).end(2)
        assert output == f"error: PMI_SIZE = '2': {NO_ADDRESS}; {REMEDY.format('PMI_SIZE')}\n"
    alone = env | {"PMI_SIZE": "1", "PMI_RANK": "0"}
    forks.python(["-m", "agent", *WORDS, "--train.steps=1"], tmp_path, alone).end()
