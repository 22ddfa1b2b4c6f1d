"""Trackers: the one in memory, the one that keeps nothing, and the real W&B client writing its offline file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from agent.tracking.run import tell_thread_error
from diffusion_core.tracking import MemoryTracker, NullTracker, Tracker, Upload

ROOT = Path(__file__).resolve().parents[3]


def exercise(tracker: Tracker, folder: Path) -> None:
    tracker.log({"train/loss": 0.5}, 10)
    tracker.log({"train/loss": 0.25, "val/loss": 0.75}, 20)
    tracker.summary({"model/params": 7})
    file = folder / "weights.bin"
    file.write_bytes(b"12345")
    tracker.artifact(Upload("model-x", "model", [file], ["latest", "best"], {"step": 20}))
    file.unlink()  # Allowed as soon as the call returns.
    tracker.close(0)


def test_memory_tracker_keeps_everything(tmp_path: Path) -> None:
    tracker = MemoryTracker()
    exercise(tracker, tmp_path)
    assert tracker.rows == [{"step": 10, "train/loss": 0.5}, {"step": 20, "train/loss": 0.25, "val/loss": 0.75}]
    assert tracker.figures == {"model/params": 7}
    assert tracker.artifacts == [
        {
            "name": "model-x",
            "type": "model",
            "aliases": ["latest", "best"],
            "metadata": {"step": 20},
            "ttl_days": None,
            "files": {"weights.bin": 5},
        }
    ]
    assert tracker.exit_code == 0


def test_memory_trackers_share_nothing() -> None:
    one, other = MemoryTracker(), MemoryTracker()
    one.log({"a": 1.0}, 1)
    one.summary({"a": 1})
    assert other == MemoryTracker()


def test_null_tracker_takes_anything(tmp_path: Path) -> None:
    exercise(NullTracker(), tmp_path)


PROGRAM = """
import json, sys
from pathlib import Path
import torch, wandb
from diffusion_core.sampling import media
from agent.tracking.tracker import WandbTracker
from diffusion_core.tracking import Upload
from diffusion_core.evaluation.opinions import png_text

folder = Path(sys.argv[1])
run = wandb.init(mode="offline", project="test", dir=folder)
tracker = WandbTracker(run)
images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
media.grid(images, 2).save(folder / "grid.png")
media.save_gif([media.grid(images.flip(0), 2), media.grid(images, 2)], folder / "two.gif")
for step, (loss, agreement) in enumerate([(0.5, 0.2), (0.25, 0.9), (0.75, 0.6)]):
    distance = {"eval/kd_classifier-digits_20_train": loss, "eval/kd_x_20_train/a*b": loss}
    tracker.log({"train/loss": loss, "val/loss": loss, "eval/class_agreement": agreement} | distance, 10 * step)
known = {"label": "3", "confidence": 0.5}
rows = [{"image": png_text(image), **known, "opinion": str(number)} for number, image in enumerate(images)]
(folder / "opinions.json").write_text(json.dumps(rows))
pictures = {"samples": folder / "grid.png", "diffusion": folder / "two.gif", "opinions": folder / "opinions.json"}
tracker.log(pictures, 30)
tracker.summary({"model/params": 7})
weights = folder / "weights.bin"
weights.write_bytes(b"12345")
tracker.artifact(Upload("model-x", "model", [weights], ["latest", "best"], {"step": 20}))
weights.unlink()
tracker.close(0)
print(json.dumps({"file": str(Path(run.settings.sync_file)), "summary": dict(run.summary)}, default=str))
"""


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process with the real client, offline, recorded."""
    folder = tmp_path_factory.mktemp("offline")
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    env |= {
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder),
        "WANDB_DATA_DIR": str(folder / "data"),
        "WANDB_CACHE_DIR": str(folder / "cache"),
        "WANDB_CONFIG_DIR": str(folder / "config"),
        "WANDB_SILENT": "true",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)], env=env, cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    return told | {"records": read_records(Path(told["file"])), "folder": folder}


def read_records(path: Path) -> list[Any]:
    """The records of a run file, which `wandb sync` uploads: protocol buffers in LevelDB's log format.

    After a header of 7 bytes come blocks of 32 KiB (the first with the header in it), of pieces: checksum (4 bytes),
    length (2), type (1: whole, 2: first, 3: middle, 4: last), data.
    """
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # Its classes are made at run time.

    content, position, parts, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # No piece begins in the last bytes of a block.
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = messages.Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records


def history(records: list[Any]) -> list[dict[str, Any]]:
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return rows


def test_wandb_offline_keeps_the_history_by_step(offline: dict[str, Any]) -> None:
    rows = history(offline["records"])
    assert [row["step"] for row in rows] == [0, 10, 20, 30]
    assert [row["_step"] for row in rows] == [0, 10, 20, 30]
    assert [row.get("val/loss") for row in rows] == [0.5, 0.25, 0.75, None]
    assert rows[3]["samples._type"] == "image-file"
    assert rows[3]["samples.format"] == "png"
    assert rows[3]["diffusion._type"] == "video-file"
    assert rows[3]["diffusion.path"].endswith(".gif")


def artifacts(records: list[Any]) -> list[Any]:
    return [
        record.request.log_artifact.artifact if record.WhichOneof("record_type") == "request" else record.artifact
        for record in records
        if record.WhichOneof("record_type") == "artifact"
        or (record.WhichOneof("record_type") == "request" and record.request.HasField("log_artifact"))
    ]


def test_wandb_offline_keeps_the_table_of_samples_with_its_images(offline: dict[str, Any]) -> None:
    """W&B keeps a table as an artifact of its own, which holds the images."""
    assert history(offline["records"])[3]["opinions._type"] == "table-file"
    (artifact,) = [artifact for artifact in artifacts(offline["records"]) if artifact.type == "run_table"]
    files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    table = json.loads(files["opinions.table.json"].read_text())
    assert table["columns"] == ["image", "label", "confidence", "opinion"]
    assert [cells[1:] for cells in table["data"]] == [["3", 0.5, str(number)] for number in range(4)]
    for cells in table["data"]:
        with Image.open(files[cells[0]["path"]]) as image:
            assert image.size == (48, 48)


def test_wandb_offline_plots_over_steps_and_summarises_by_goal(offline: dict[str, Any]) -> None:
    metrics = [record.metric for record in offline["records"] if record.WhichOneof("record_type") == "metric"]
    by_name = {metric.name: metric for metric in metrics}
    assert by_name["val/loss"].summary.min
    assert by_name["eval/class_agreement"].summary.max
    assert by_name["eval/kd_classifier-digits_20_train"].summary.min
    assert by_name["val/loss"].step_metric == "step"
    # Of two patterns that match a name, W&B takes any.
    assert [(metric.glob_name, metric.step_metric) for metric in metrics if metric.glob_name] == [("*", "step")]


def test_wandb_offline_keeps_the_artifact_after_its_file_is_gone(offline: dict[str, Any]) -> None:
    (artifact,) = [found for found in artifacts(offline["records"]) if found.type != "run_table"]
    assert (artifact.name, artifact.type) == ("model-x", "model")
    assert set(artifact.aliases) == {"latest", "best"}
    assert json.loads(artifact.metadata) == {"step": 20}
    (entry,) = artifact.manifest.contents
    assert (entry.path, entry.size) == ("weights.bin", 5)
    assert Path(entry.local_path).read_bytes() == b"12345"


def test_wandb_offline_ends_with_its_exit_code(offline: dict[str, Any]) -> None:
    (end,) = [record.exit for record in offline["records"] if record.WhichOneof("record_type") == "exit"]
    assert end.exit_code == 0


def test_an_error_in_a_thread_of_the_client_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    monkeypatch.setattr(threading, "excepthook", tell_thread_error)

    def ours() -> None:
        raise ZeroDivisionError("a bug of ours")

    for target in (lambda: wandb.Artifact("not/a name", type="model"), ours):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    client, *own = capsys.readouterr().err.splitlines()
    assert client.startswith("W&B: a thread of its client ended: ")
    assert own[1:2] == ["Traceback (most recent call last):"]
    assert own[-1] == "ZeroDivisionError: a bug of ours"
