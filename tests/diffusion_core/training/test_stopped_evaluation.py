"""A signal stops an evaluation too, which may take minutes; the run that resumes begins with it."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from forks import WORDS, Forks
from tiny import assert_same_tensors

from diffusion_core.checkpoint import read_checkpoint

EVALUATED, STEPS = 4, 8
WITHIN_S = 60
BASE = [
    *WORDS,
    "--log.every=1",
    f"--eval.every={EVALUATED}",
    "--eval.classifier=network",
    "--eval.num_images=1500",
    "--checkpoint.best_metric=eval/class_agreement",
    "--sample.steps=12",
    "--sample.batch_size=50",
    "--train.warmup_steps=0",
    f"--train.steps={STEPS}",
]


def rows(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "train/images_per_second"} for row in found]


@pytest.mark.slow
@pytest.mark.parametrize("every", [EVALUATED, STEPS], ids=["a checkpoint is due", "none is due"])
def test_a_stopped_evaluation_is_made_again(tmp_path: Path, forks: Forks, every: int) -> None:
    words = [word for word in BASE if not word.startswith("--log.dir")] + [f"--checkpoint.every={every}"]
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    straight = forks.start([*words, f"--log.dir={unbroken}"], tmp_path / "straight")
    words.append(f"--log.dir={run}")
    for attempt in range(2):
        process = forks.start(words, tmp_path / f"attempt{attempt}")
        while not (process.out.is_file() and "evaluation: 1,500 images" in process.output):
            assert process.poll() is None, process.output
            time.sleep(0.01)
        time.sleep(0.3)
        process.send(signal.SIGTERM)
        asked = time.monotonic()
        assert process.wait() == 128 + signal.SIGTERM, process.output
        assert time.monotonic() - asked < WITHIN_S
        assert "Traceback" not in process.output
        assert [row["step"] for row in rows(run)] == list(range(1, EVALUATED))
        stopped = read_checkpoint(run)
        assert (stopped.step, stopped.metadata["figures"]) == (EVALUATED, {})
    forks.run(words, tmp_path / "last")
    assert straight.wait() == 0, straight.output

    assert rows(run) == rows(unbroken)
    assert [row["step"] for row in rows(run) if "eval/class_agreement" in row] == [EVALUATED, STEPS]
    one, other = read_checkpoint(unbroken), read_checkpoint(run)
    for part in one.parts:
        assert_same_tensors(one.tensors(part), other.tensors(part))
    assert one.metadata["best"] == other.metadata["best"]
    names = [json.loads((folder / "result.json").read_text())["best_checkpoint"] for folder in (run, unbroken)]
    assert Path(names[0]).name == Path(names[1]).name
