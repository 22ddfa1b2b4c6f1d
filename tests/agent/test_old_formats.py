"""What an earlier version wrote still loads: runs and sweeps go on, checkpoints sample, what is missing is sent to W&B.

tests/fixtures/house holds what commit a7e0e82 wrote; its README says how. Losses and images are that version's, to be
compared within rounding: processors differ in it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forks import Forks
from PIL import Image
from server import WandbServer
from wandb_client import Client

HOUSE = Path(__file__).resolve().parents[1] / "fixtures" / "house"
EXPECTED = json.loads((HOUSE / "expected.json").read_text())
SAME_LOSS = 1e-3
"""Relative difference that rounding may make of a loss."""
SAME_PIXEL = 2
STOPPED_AT = 240
STEPS = 400
TRIALS = ("house-001", "house-002", "house-003")


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy: what goes on writes into it."""
    return shutil.copytree(HOUSE, tmp_path / "house")


def history(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def assert_same_losses(rows: list[dict[str, Any]], expected: dict[str, dict[str, float]]) -> None:
    """The rows end as those of the run that the earlier version never stopped."""
    found = {row["step"]: row for row in rows}
    assert len(expected) >= 15
    for step, losses in expected.items():
        for name, value in losses.items():
            assert found[int(step)][name] == pytest.approx(value, rel=SAME_LOSS), (step, name)


def assert_same_images(drawn: Path, expected: Path) -> None:
    names = [path.name for path in expected.glob("*-0.png")]
    assert len(names) == 10
    for name in names:
        ours, theirs = (np.asarray(Image.open(folder / name)).astype(int) for folder in (drawn, expected))
        assert np.abs(ours - theirs).max() <= SAME_PIXEL, name


def sampling(checkpoint: str, out: str) -> list[str]:
    return [*("--checkpoint", checkpoint, "--out", out), *SAMPLING]


SAMPLING = ["--labels", "all", "--num-images", "10", "--device", "cpu", "--precision", "fp32"]


def test_an_interrupted_run_goes_on(house: Path, forks: Forks) -> None:
    before = (house / "half" / "history.jsonl").read_text()
    output = forks.run(["--config", "half.yaml", "--log.dir=half"], house)
    assert "finished half at step 400" in output
    assert (house / "half" / "history.jsonl").read_text().startswith(before)
    rows = history(house / "half")
    assert [row["step"] for row in rows] == list(range(10, STEPS + 1, 10))
    assert_same_losses(rows, EXPECTED["half"])
    result = json.loads((house / "half" / "result.json").read_text())
    assert result["figures"]["prune/sparsity"] == 0.5
    assert result["figures"]["prune/consistency_ssim_16"] < 1.0  # Against the dense images of before.
    assert json.loads((house / "half" / "run.json").read_text())["preemptions"] == 1


def test_an_interrupted_chain_of_tickets_goes_on_and_rewinds(house: Path, forks: Forks) -> None:
    """The second round starts from the weights that the earlier version kept to rewind to."""
    before = (house / "lottery" / "rounds" / "00" / "history.jsonl").read_text()
    forks.run(["--config", "lottery.yaml", "--log.dir=lottery"], house)
    assert (house / "lottery" / "rounds" / "00" / "history.jsonl").read_text().startswith(before)
    assert_same_losses(history(house / "lottery" / "rounds" / "01"), EXPECTED["lottery"])
    result = json.loads((house / "lottery" / "rounds" / "01" / "result.json").read_text())
    assert result["figures"]["prune/sparsity"] == pytest.approx(0.2, abs=0.001)


@pytest.mark.slow
def test_a_half_finished_sweep_goes_on_is_ranked_and_judged(house: Path, forks: Forks) -> None:
    folder = house / "sweeps" / "house"
    begun = [trial["id"] for trial in json.loads((folder / "sweep.json").read_text())["trials"]]
    kept = (folder / "trials" / begun[0] / "result.json").read_text()
    before = (folder / "trials" / begun[1] / "history.jsonl").read_text()
    forks.run(["sweep.yaml", "--offline", "--out", "sweeps"], house, module="agent.sweep")
    trials = json.loads((folder / "sweep.json").read_text())["trials"]
    assert [trial["id"] for trial in trials[:2]] == begun
    assert [(trial["id"][:9], trial["state"], trial["failures"]) for trial in trials] == [
        (name, "finished", 0) for name in TRIALS
    ]
    assert (folder / "trials" / begun[0] / "result.json").read_text() == kept
    assert (folder / "trials" / begun[1] / "history.jsonl").read_text().startswith(before)
    for trial in trials[:2]:  # Trials that begin today draw other random numbers.
        assert_same_losses(
            history(folder / "trials" / trial["id"]), EXPECTED["sweep"][str(trial["parameters"]["seed"])]
        )
    ranked = json.loads((folder / "results.json").read_text())
    assert [trial["figures"]["val/loss"] for trial in ranked] == sorted(
        trial["figures"]["val/loss"] for trial in ranked
    )

    words = [
        "--sweep",
        "sweeps/house",
        "--num-images",
        "10",
        "--figures",
        "",
        "--device",
        "cpu",
        "--json",
        "found.json",
    ]
    forks.run(words, house, module="scripts.evaluate")
    assert "eval/class_agreement" in json.loads((house / "found.json").read_text())["figures"]
    forks.run(["sweeps/house/trials", "--out", "."], house, module="agent.leaderboard")
    assert len(json.loads((house / "leaderboard.json").read_text())) == len(TRIALS)


@pytest.mark.parametrize(("name", "drawn"), [("half", "drawn-half"), ("pruned", "drawn")])
def test_a_checkpoint_is_sampled(name: str, drawn: str, house: Path, forks: Forks) -> None:
    """With masks, and with channels removed."""
    (pruned,) = (house / "sweeps" / "house" / "trials").glob("house-001-*")
    checkpoint = str(house / "half" if name == "half" else pruned)
    forks.run(sampling(checkpoint, "new"), house, module="scripts.sample_images")
    assert_same_images(house / "new", house / drawn)
    # Its folder of images goes on as well.
    output = forks.run(sampling(checkpoint, drawn), house, module="scripts.sample_images")
    assert "10 images (0 new)" in output


@pytest.mark.slow
def test_a_run_is_sent_to_wandb(house: Path, forks: Forks) -> None:
    with WandbServer() as server:
        client = Client(server, house)
        forks.run(["half"], house, client.env, module="agent.sync")
        run = server.runs["half"]
        assert [row["step"] for row in run.history] == list(range(10, STOPPED_AT + 1, 10))
        assert run.config["prune.method"] == "magnitude"
        for kind in ("model", "training-state"):
            assert {"latest", f"step-{STOPPED_AT}"} <= set(server.artifact(f"{kind}-half:latest").aliases)
        words = ["--artifact", "model-half:latest", "--out", "new", *SAMPLING]
        forks.run(words, house, client.env, module="scripts.sample_images")
        assert_same_images(house / "new", house / "drawn-half")
        assert server.errors == []


UPLOAD = """
import json
from pathlib import Path
import wandb

house = Path("house")
with wandb.init(id="half", project="test") as run:
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    for line in (house / "half/history.jsonl").read_text().splitlines():
        row = json.loads(line)
        run.log(row, step=row["step"])
    for record in json.loads((house / "artifacts.json").read_text()):
        artifact = wandb.Artifact(record["name"], record["type"], metadata=record["metadata"])
        for name in record["files"]:
            artifact.add_file(str(house / f"half/checkpoints/step-{record['metadata']['step']:08d}" / name))
        run.log_artifact(artifact, aliases=record["aliases"]).wait()
"""
"""What the earlier version put on W&B: its rows and the artifacts that artifacts.json describes."""


@pytest.mark.slow
def test_a_run_goes_on_elsewhere_from_its_artifacts(house: Path, forks: Forks) -> None:
    with WandbServer() as server:
        Client(server, house.parent).script(UPLOAD)
        elsewhere = Client(server, house.parent / "elsewhere")
        shutil.copy(house / "half.yaml", elsewhere.directory)
        forks.run(["--config", "half.yaml"], elsewhere.directory, elsewhere.env | {"WANDB_RUN_ID": "half"})
        rows = server.runs["half"].history
        assert [row["step"] for row in rows] == list(range(10, STEPS + 1, 10))
        assert_same_losses(rows, EXPECTED["half"])
        assert server.runs["half"].config["draws"] == 1, "W&B knows that it draws as before"
        assert {"latest", "best", f"step-{STEPS}"} <= set(server.artifact("model-half:latest").aliases)
        assert server.errors == []
