"""A run's folder: one process works in it, and what is kept of its checkpoints is what is needed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import metadata, one_line, tiny_network

from agent import clean
from diffusion_core.checkpoint import list_checkpoints, write_checkpoint
from diffusion_core.config import ConfigError
from diffusion_core.files import write_json
from diffusion_core.run_folder import HISTORY_FILE, RUN_FILE, locked, picture_files
from diffusion_core.runs.uploads import UploadQueue
from diffusion_core.tracking import Upload


def hold(folder: Path, held: Any, let_go: Any) -> None:
    with locked(folder):
        held.set()
        let_go.wait(300)


def test_a_second_process_is_refused_and_a_dead_one_forgotten(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held, let_go = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, held, let_go))
    process.start()
    assert held.wait(300)
    with pytest.raises(ConfigError) as caught, locked(tmp_path):
        pass
    assert f"process {process.pid} works on this run" in one_line(caught.value)
    process.kill()
    process.join()
    with locked(tmp_path):
        assert (tmp_path / "lock").read_text() != f"{process.pid}\n"


def test_pictures_are_found_by_their_step(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    for name in ("samples-00000004.png", "diffusion-00000004.gif", "samples-00000008.png"):
        (tmp_path / "samples" / name).touch()
    assert {name: path.name for name, path in picture_files(tmp_path, 4).items()} == {
        "samples": "samples-00000004.png",
        "diffusion": "diffusion-00000004.gif",
    }
    assert picture_files(tmp_path, 5) == {}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with five checkpoints, of which the second is the best, and leftovers."""
    folder = tmp_path / "runs" / "abc"
    folder.mkdir(parents=True)
    write_json(folder / RUN_FILE, {"id": "abc"})
    (folder / HISTORY_FILE).touch()
    network = tiny_network()
    described = metadata(network) | {"best": {"metric": "val/loss", "value": 0.1, "step": 2}}
    described["config"]["checkpoint.keep"] = 2
    for step in range(1, 6):
        write_checkpoint(folder / "checkpoints", step, described, {"ema": {"weight": torch.zeros(3)}})
    (folder / "checkpoints" / ".step-00000006.partial").mkdir()
    for name in ("run-1", "offline-run-2", "offline-run-3"):
        (folder / "wandb" / name / "staged" / "model").mkdir(parents=True)
    (folder / "wandb" / "offline-run-3" / "x.wandb.synced").touch()
    return folder


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(folder / "checkpoints")]


def test_clean_shows_first_and_removes_when_told(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parents[1])
    assert clean.main([]) == 0
    shown = {line.split()[2] for line in capsys.readouterr().out.splitlines()}
    base = "runs/abc"
    assert shown == {
        *(f"{base}/checkpoints/{name}" for name in ("step-00000001", "step-00000003", ".step-00000006.partial")),
        f"{base}/wandb/run-1/staged/model",  # It has arrived; what was recorded offline has not, unless it was synced.
        f"{base}/wandb/offline-run-3/staged/model",
    }
    assert steps(run) == [1, 2, 3, 4, 5]
    assert clean.main(["runs", "--yes"]) == 0
    assert steps(run) == [2, 4, 5]
    assert (run / "wandb" / "offline-run-2" / "staged" / "model").exists()
    capsys.readouterr()
    assert clean.main(["runs", "--yes"]) == 0
    assert capsys.readouterr().out == ""


def test_clean_leaves_a_run_alone_that_is_worked_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(run):
        assert clean.main([str(run.parent), "--yes"]) == 0
    assert steps(run) == [1, 2, 3, 4, 5]
    assert "skipped" in capsys.readouterr().err
    assert clean.main([str(run / "nowhere")]) == 2


# Uploads.


class Sent:
    """What a queue sends; the first upload waits until it is let go."""

    def __init__(self) -> None:
        self.go = multiprocessing.get_context("fork").Event()
        self.names: list[tuple[str, bytes]] = []
        self.fail = False

    def __call__(self, uploads: Sequence[Upload]) -> None:
        assert self.go.wait(300)
        if self.fail:
            raise OSError("no\nroute")
        self.names += [(upload.aliases[0], upload.files[0].read_bytes()) for upload in uploads]


def put(queue: UploadQueue, folder: Path, number: int, *aliases: str, names: Sequence[str] = ("model-x",)) -> None:
    file = folder / "file"
    file.write_bytes(b"%d" % number)
    queue.put(*(Upload(name, "model", (file,), (f"step-{number}", *aliases), {}, None) for name in names))
    file.unlink()


def test_uploads_wait_by_hard_link_and_the_superseded_are_dropped(tmp_path: Path) -> None:
    sent = Sent()
    queue = UploadQueue(sent, tmp_path / "staged", keep=2)
    put(queue, tmp_path, 0)
    while queue._waiting:  # The first one is on its way.
        pass
    for number in range(1, 8):
        put(queue, tmp_path, number, *(["best"] if number in (2, 4) else []))
    assert len(list((tmp_path / "staged").iterdir())) == 4
    sent.go.set()
    assert queue.close(300) == []
    # The one that was being sent, the best of those that waited, and the newest two.
    assert sent.names == [("step-0", b"0"), ("step-4", b"4"), ("step-6", b"6"), ("step-7", b"7")]
    assert not list((tmp_path / "staged").iterdir())


def test_what_was_put_together_is_sent_or_dropped_together(tmp_path: Path) -> None:
    sent = Sent()
    queue = UploadQueue(sent, tmp_path / "staged", keep=1)
    for number in range(6):
        put(queue, tmp_path, number, names=("model-x", "training-state-x"))
        while number == 0 and queue._waiting:  # The first pair is on its way.
            pass
    assert len(list((tmp_path / "staged").iterdir())) == 4
    sent.go.set()
    assert queue.close(300) == []
    assert [name for name, _ in sent.names] == ["step-0", "step-0", "step-5", "step-5"]


def test_close_waits_no_longer_than_it_may_and_says_for_what(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = Sent()
    queue = UploadQueue(sent, tmp_path / "staged")
    put(queue, tmp_path, 1)
    assert queue.close(0.05) == ["model-x"]
    assert "waiting up to 0 s for uploads: model-x" in capsys.readouterr().err
    sent.go.set()


def test_an_upload_that_fails_keeps_its_files_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusion_core.runs.uploads.PAUSE_S", 0.0)
    sent = Sent()
    sent.fail = True
    sent.go.set()
    queue = UploadQueue(sent, tmp_path / "staged")
    put(queue, tmp_path, 1)
    put(queue, tmp_path, 2)
    assert queue.close(300) == ["model-x"]
    assert capsys.readouterr().err.count("could not upload model-x: no route") == 2
    assert len(list((tmp_path / "staged").iterdir())) == 2


def test_a_queue_without_uploads_ends_at_once(tmp_path: Path) -> None:
    assert UploadQueue(Sent(), tmp_path / "staged").close(300) == []
    assert not (tmp_path / "staged").exists()
