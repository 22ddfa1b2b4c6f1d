"""A finished run that is trained for longer: the same command with more train.steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forks import WORDS, Forks
from server import WandbServer
from tiny import assert_same_tensors
from wandb_client import Client

from diffusion_core.checkpoint import list_checkpoints, read_checkpoint

FIRST, LONGER = 8, 14
BASE = [
    *WORDS,
    "--log.every=3",
    "--eval.every=4",
    "--checkpoint.every=4",
    "--checkpoint.keep=1",
    "--train.warmup_steps=0",
]


def steps(count: int, *words: str) -> list[str]:
    return [*BASE, f"--train.steps={count}", *words]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_it_goes_on_as_its_schedule_says(tmp_path: Path, forks: Forks, schedule: str) -> None:
    word = f"--train.lr_schedule={schedule}"
    long_run = forks.start(steps(LONGER, word), tmp_path / "one")
    forks.run(steps(FIRST, word), tmp_path / "two")
    run = tmp_path / "two" / "run"
    printed = forks.run(steps(LONGER, word), tmp_path / "two")
    assert long_run.wait() == 0, long_run.output
    (note,) = [line for line in printed.splitlines() if line.startswith("train.steps")]
    assert note.startswith("train.steps = 14: the run was started with 8 and continues from step 8; ")
    assert ("as before" in note) == (schedule == "constant")
    assert ("cosine" in note) == (schedule == "cosine")

    one, two = read_checkpoint(tmp_path / "one" / "run"), read_checkpoint(run)
    assert one.step == two.step == LONGER
    if schedule == "constant":  # Bit for bit what one long run is.
        for part in one.parts:
            assert_same_tensors(one.tensors(part), two.tensors(part))
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/lr" in row] == [3, 6, 8, 9, 12, 14]
    long_rows = [json.loads(line) for line in (tmp_path / "one/run/history.jsonl").read_text().splitlines()]
    # From there the rate is that of a run of the new length, before it was that of the short one.
    rate, long_rate = ({row["step"]: row.get("train/lr") for row in found} for found in (rows, long_rows))
    assert [rate[at] for at in (9, 12, 14)] == [long_rate[at] for at in (9, 12, 14)]
    assert (rate[6] == long_rate[6]) == (schedule == "constant")

    result = json.loads((run / "result.json").read_text())
    assert (result["step"], result["config"]["train.steps"]) == (LONGER, LONGER)
    losses = {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}
    assert result["figures"]["val/loss"] == min(losses.values())
    best = min(losses, key=lambda at: losses[at])
    assert Path(result["best_checkpoint"]).name == f"step-{best:08d}"
    assert {path.name for path in list_checkpoints(run / "checkpoints")} == {f"step-{best:08d}", "step-00000014"}
    assert "train.steps: 14" in (run / "config.yaml").read_text()
    assert "train.steps =" not in forks.run(steps(LONGER, word), tmp_path / "two")

    shorter = forks.start(steps(FIRST, word), tmp_path / "two")
    assert shorter.wait() == 2
    assert "train.steps = 8: the run in 'run' was started with 14; it may only grow" in shorter.output
    assert json.loads((run / "result.json").read_text())["step"] == LONGER


@pytest.mark.slow
def test_the_best_checkpoint_of_the_short_run_is_kept(tmp_path: Path, forks: Forks) -> None:
    """The second part only makes it worse: its steps are far too large."""
    words = ["--train.lr_schedule=cosine", "--train.lr=0.01"]
    forks.run(steps(FIRST, *words), tmp_path)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000008" / "checkpoint.json"
    content = json.loads(checkpoint.read_text())
    assert content["best"]["metric"] == "val/loss"
    checkpoint.write_text(json.dumps(content | {"best": content["best"] | {"value": 1e-9, "step": 8}}))
    forks.run(steps(LONGER, *words), tmp_path)
    assert {path.name for path in list_checkpoints(tmp_path / "run/checkpoints")} == {"step-00000008", "step-00000014"}
    assert json.loads((tmp_path / "run/result.json").read_text())["best_checkpoint"].endswith("step-00000008")


@pytest.mark.slow
def test_a_lottery_s_rounds_do_not_grow(tmp_path: Path, forks: Forks) -> None:
    """A round's mask is of the last step of the round before."""
    words = ["--prune.method=lottery", "--prune.rounds=1"]
    forks.run(steps(4, *words), tmp_path)
    longer = forks.start(steps(6, *words), tmp_path)
    assert longer.wait() == 2
    assert "train.steps = 6: the run in 'run/rounds/00' was started with 4; choose another log.dir" in longer.output


@pytest.mark.slow
def test_w_and_b_has_one_run_with_the_new_length(tmp_path: Path, forks: Forks) -> None:
    with WandbServer() as server:
        client = Client(server, tmp_path)
        forks.run(steps(FIRST), tmp_path, client.env)
        (run,) = server.runs.values()
        assert (run.config["train.steps"], run.state) == (FIRST, "finished")
        output = forks.run(steps(LONGER), tmp_path, client.env)
        assert "continues from step 8" in output
        (run,) = server.runs.values()
        assert (run.config["train.steps"], run.state) == (LONGER, "finished")
        assert [row["step"] for row in run.history if "train/lr" in row] == [3, 6, 8, 9, 12, 14]
        history = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
        assert [row["step"] for row in run.history] == [row["step"] for row in history]
        assert server.errors == []
