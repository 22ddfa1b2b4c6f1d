"""Runs whose folder cannot be written: `agent.sync` and `agent.clean` say so in one line, and go on with the next."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import WORDS, Forks
from server import WandbServer
from wandb_client import Client

from diffusion_core.checkpoint import list_checkpoints
from diffusion_core.run_folder import LOCK_FILE

TRIAL = [*WORDS, "--train.steps=3", "--checkpoint.every=1", "--checkpoint.keep=9", "--log.dir=runs/b"]

pytestmark = pytest.mark.slow


@pytest.fixture
def runs(tmp_path: Path, forks: Forks) -> Path:
    """Runs a, b and c with three checkpoints each, of which clean removes one."""
    forks.run(TRIAL, tmp_path, {"WANDB_MODE": "offline"})
    for name in "ac":
        shutil.copytree(tmp_path / "runs/b", tmp_path / "runs" / name)
    for folder in (tmp_path / "runs").iterdir():
        newest = list_checkpoints(folder / "checkpoints")[-1] / "checkpoint.json"
        newest.write_text(newest.read_text().replace('"checkpoint.keep": 9', '"checkpoint.keep": 1'))
    return tmp_path / "runs"


@pytest.fixture(params=["a mount", "a lock that is a folder"])
def refused(request: pytest.FixtureRequest, runs: Path) -> Iterator[str]:
    """Run b cannot be written. Yields what the system says."""
    folder = runs / "b"
    if request.param == "a lock that is a folder":
        (folder / LOCK_FILE).unlink()
        (folder / LOCK_FILE).mkdir()
        yield "Is a directory"
        return
    bound = ["mount", "--bind", str(folder), str(folder)]
    if shutil.which("mount") is None or subprocess.run(bound, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        yield "Read-only file system"
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_sync_goes_on_with_the_next_run(refused: str, runs: Path, forks: Forks) -> None:
    with WandbServer() as server:
        for name in "ac":
            (runs / name / "run.json").write_text(f'{{"id": "{name}"}}')
        env = Client(server, runs.parent).env
        output = forks.start(["runs"], runs.parent, env, "agent.sync").end(2)
        assert "Traceback" not in output
        assert f"error: log.dir = 'runs/b': {refused}; make it writable, or copy it to another folder\n" in output
        assert output.count("complete on W&B") == 2
        assert {run.id for run in server.runs.values()} == {"a", "c"}


def test_clean_goes_on_with_the_next_run(refused: str, runs: Path, forks: Forks) -> None:
    output = forks.start(["runs", "--yes"], runs.parent, module="agent.clean").end(2)
    assert output.count("error: ") == 1
    assert f"error: log.dir = 'runs/b': {refused}; make it writable, or copy it to another folder\n" in output
    assert [len(list_checkpoints(runs / name / "checkpoints")) < 3 for name in "abc"] == [True, False, True]


def test_clean_says_of_what_it_cannot_delete_that_it_is_still_there(runs: Path, forks: Forks) -> None:
    """Before it deletes a checkpoint, clean renames it. Here a file has the new name already."""
    doomed = list_checkpoints(runs / "b/checkpoints")[0]
    (doomed.parent / f".{doomed.name}.partial").write_text("")
    output = forks.start(["runs", "--yes"], runs.parent, module="agent.clean").end(2)
    assert "Traceback" not in output
    assert f"{doomed.relative_to(runs.parent)}  removed" not in output
    assert "error: 'runs/b/checkpoints/step-00000001': Not a directory" in output
    assert [len(list_checkpoints(runs / name / "checkpoints")) < 3 for name in "abc"] == [True, False, True]


def test_clean_passes_over_a_run_whose_newest_checkpoint_is_damaged(runs: Path, forks: Forks) -> None:
    (list_checkpoints(runs / "b/checkpoints")[-1] / "checkpoint.json").write_text("{")
    output = forks.start(["runs", "--yes"], runs.parent, module="agent.clean").end(2)
    assert output.count("error: ") == 1
    assert "checkpoint.json cannot be read as JSON" in output
    assert [len(list_checkpoints(runs / name / "checkpoints")) < 3 for name in "abc"] == [True, False, True]
