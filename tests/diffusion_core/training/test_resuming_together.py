"""Two processes resume from the same checkpoint, with the same batch, or both refuse in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from forks import Forks
from forks.ranks import run_ranks
from server import WandbServer
from tiny import TINY
from wandb_client import Client

from agent.config import build_config
from diffusion_core.checkpoint import read_checkpoint
from diffusion_core.model.unet import build_network
from diffusion_core.training.batch_size import training_memory

AGENT = """
import os, sys
os.chdir(os.environ["PLACE"])
from diffusion_core.training import batch_size, resume
resume.LOOK_AGAIN_S = ()
batch_size.free_memory = lambda device: int(os.environ.get("FREE", 10**12))
from agent.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
WORDS = [
    *(f"--{key}={value}" for key, value in TINY.items()),
    "--preset=digits",
    "--eval.classifier=none",
    "--checkpoint.best_metric=val/loss",
    "--checkpoint.every=1",
    "--log.dir=run",
]


def trained(forks: Forks, folder: Path, *words: str) -> Path:
    """A folder in which one process has trained a run for two steps."""
    forks.run([*WORDS, "--train.steps=2", *words], folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["4", "auto"])
def test_processes_that_find_different_checkpoints_refuse_to_go_on(batch: str, tmp_path: Path, forks: Forks) -> None:
    (tmp_path / "agent.py").write_text(AGENT)
    trained(forks, tmp_path / "one", "--train.batch_size=4")
    (tmp_path / "two").mkdir()
    places = [{"PLACE": str(tmp_path / name)} for name in ("one", "two")]
    words = ["agent.py", *WORDS, "--train.steps=4", f"--train.batch_size={batch}"]
    ended = run_ranks(forks, tmp_path, words, env=places)
    for status, _, err in ended:
        assert status == 2, err
        (line,) = err.splitlines()
        assert line.startswith("error: log.dir = 'run': process 0 finds step 2 in ")
        assert f":{tmp_path}/one/run/checkpoints, process 1 finds no checkpoint" in line
        assert line.endswith(f":{tmp_path}/two/run/checkpoints; choose a folder that all processes share")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_batch_size_of_a_checkpoint_that_is_fetched_stays(processes: int, tmp_path: Path, forks: Forks) -> None:
    """Another machine has more memory, and the run's checkpoints are on W&B."""
    (tmp_path / "agent.py").write_text(AGENT)
    words = ["agent.py", *WORDS, "--train.batch_size=auto"]
    with WandbServer() as server:
        client = Client(server, tmp_path)
        env = client.env | {"WANDB_RUN_ID": "moved", "WANDB_MODE": "online"}
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
        config = build_config({"preset": "digits", **TINY})
        memory = training_memory(build_network(config, 10), config)
        less = env | {"PLACE": "one", "FREE": str(memory.fixed + 2 * memory.per_image)}
        (first,) = run_ranks(forks, tmp_path, [*words, "--train.steps=2"], env=[less])
        assert first[0] == 0, first
        more = env | {"PLACE": "two", "FREE": str(10**12)}
        ended = run_ranks(forks, tmp_path, [*words, "--train.steps=4"], env=[more] * processes)
        assert [status for status, _, _ in ended] == [0] * processes, ended
        folders = [tmp_path / name / "run" for name in ("one", "two")]
        sizes = [read_checkpoint(folder).metadata["config"]["train.batch_size"] for folder in folders]
        assert sizes == [2, 2]
        assert server.runs["moved"].config["train.batch_size"] == 2


@pytest.mark.slow
def test_processes_that_cannot_share_the_batch_of_a_run_refuse_it(tmp_path: Path, forks: Forks) -> None:
    (tmp_path / "agent.py").write_text(AGENT)
    trained(forks, tmp_path / "one", "--train.batch_size=3")
    words = ["agent.py", *WORDS, "--train.steps=4", "--train.batch_size=auto"]
    for status, _, err in run_ranks(forks, tmp_path, words, env=[{"PLACE": "one"}] * 2):
        assert status == 2, err
        (line,) = err.splitlines()
        assert line.startswith("error: train.batch_size = 3: expected a multiple of the number of processes (2) times")
        assert line.endswith("; the run was started with it; choose another number of processes")


LATE = """
from types import SimpleNamespace
from pathlib import Path
from accelerate import PartialState
from diffusion_core.training import resume

resume.LOOK_AGAIN_S = (0.1, 0.1, 0.1)
state = PartialState(cpu=True)
looked = []
def find():
    looked.append(1)
    return SimpleNamespace(step=3) if state.process_index == 0 or len(looked) == 3 else None
print("step", resume.found_by_all(find, Path("x")).step, "after", len(looked))
"""


def test_processes_look_again_as_a_network_disk_shows_files_late(tmp_path: Path, forks: Forks) -> None:
    (tmp_path / "late.py").write_text(LATE)
    assert [out for _, out, _ in run_ranks(forks, tmp_path, ["late.py"])] == ["step 3 after 3\n"] * 2
