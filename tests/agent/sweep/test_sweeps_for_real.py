"""Sweeps of the product itself: online through W&B's own agents, and offline, killed, gone on with, and synced."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from forks import Forks
from server import Run, WandbServer
from wandb_client import ROOT, TIMEOUT, Client, finish

from agent.sweep.file import check_sweep
from diffusion_core.config import flatten
from diffusion_core.runs.recorded import summary_figures
from diffusion_core.search import engine

FIXED: dict[str, Any] = {
    "preset": "digits",
    "model.channels": 16,
    "model.channel_multipliers": [1, 1],
    "model.norm_groups": 2,
    "train.warmup_steps": 0,
    "train.batch_size": 16,
    "eval.every": 4,
    "eval.val_images": 20,
    "eval.num_images": 10,
    "sample.every": 0,
    "sample.steps": 2,
    "sample.per_class": 1,
    "log.every": 4,
    "log.progress": False,
}
COMMAND = ["${env}", "${interpreter}", "-m", "agent", "${args}"]


def content(method: str, parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
    fixed = {key: {"value": value} for key, value in FIXED.items()}
    metric = {"name": "val/loss", "goal": "minimize"}
    return {"method": method, "metric": metric, "command": COMMAND, "parameters": fixed | parameters, **more}


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server
        assert server.errors == []


def losses(run: Run) -> list[tuple[int, float]]:
    return [(row["step"], row["val/loss"]) for row in run.history if "val/loss" in row]


QUICK = FIXED | {"train.steps": 2, "eval.every": 0, "log.every": 2, "eval.classifier": "none"}
QUICK |= {"checkpoint.best_metric": "val/loss", "checkpoint.upload": False}
OWN = ["--seed=3", "--train.weight_decay", "0.25"]
AGENT = COMMAND[:-1]
RATE: dict[str, Any] = {"train.lr": {"values": [0.002]}}
FORMS: dict[str, dict[str, Any]] = {
    "a program without a command, and exponents": {
        "method": "random",
        "run_cap": 1,
        "command": None,
        "program": str(ROOT / "scripts/train_cifar.py"),
        "parameters": {"train.lr": {"distribution": "log_uniform", "min": -9.0, "max": -6.0}},
    },
    "blanks, strictness, a number without a point": {
        "command": [*AGENT, *OWN, "${args_no_equals}"],
        "early_terminate": {"type": "hyperband", "min_iter": 3, "strict": True},
        "parameters": {
            "train.lr": {"value": "2e-3"},
            "ema.warmup": {"values": [False]},
            "upsample.factor": {"values": [4]},
        },
    },
    "no hyphens": {"command": [*AGENT, *OWN, "${args_no_hyphens}"], "parameters": RATE},
    "flags": {
        "command": [*AGENT, "--log.progress=false", "--checkpoint.upload=0", "${args_no_boolean_flags}", *OWN],
        "parameters": RATE | {"ema.warmup": {"value": True}},
    },
    "JSON": {"command": [*AGENT, "${args_json}", *OWN], "parameters": RATE},
    "a JSON file": {
        "command": [*AGENT, "--config", "base.yaml", "--config", "${args_json_file}", *OWN],
        "parameters": RATE,
    },
}


@pytest.mark.slow
def test_each_form_of_a_sweep_runs_through_wandb_s_agent_as_it_was_checked(server: WandbServer, tmp_path: Path) -> None:
    """The configuration on W&B is the one that the check computed before the start."""
    client = Client(server, tmp_path)
    (tmp_path / "base.yaml").write_text("train: {lr: 0.5, beta2: 0.75}\n")
    quick = {key: {"value": value} for key, value in QUICK.items()}
    given = [content("grid", {}) | form | {"parameters": quick | form["parameters"]} for form in FORMS.values()]
    with contextlib.chdir(tmp_path):
        checked = [check_sweep(sweep, "x", "x") for sweep in given]
    created = [sweep.config | {"parameters": sweep.parameters} for sweep in checked]  # As create_sweep does.
    client.script(f"import wandb\nfor sweep in {created!r}:\n    wandb.sweep(sweep, project='test')")
    made = list(server.sweeps.values())
    # Each agent waits ten seconds and computes ten: together they take a third of the time.
    for start in range(0, len(made), 3):
        agents = [client.agent(sweep, "--count", "1") for sweep in made[start : start + 3]]
        for agent in agents:
            finish(agent)
    for sweep, known in zip(made, checked, strict=True):
        (run,) = sweep.runs
        assert run.state == "finished", sweep.config["command"]
        assert run.suggested is not None
        expected = flatten(known.trial({key: entry["value"] for key, entry in run.suggested.items()}))
        assert {key: run.config[key] for key in expected} == expected | {"log.dir": f"runs/{run.id}"}
        assert 2 in [row["step"] for row in run.history]
        assert run.config["seed"] == (3 if "command" in sweep.config else 0)


@pytest.mark.slow
def test_one_command_online_where_hyperband_stops_the_bad_and_lets_the_good_finish(
    server: WandbServer, tmp_path: Path
) -> None:
    """The bad trial would run for a day: it ends because it is stopped, and in no other way."""
    client = Client(server, tmp_path)
    good = [{"lr": 0.002, "steps": 32}, {"lr": 0.004, "steps": 32}]
    bad = {"lr": 1e-9, "steps": 1_000_000}
    config = content(
        "grid",
        {"train": {"values": [good[0], bad, good[1]]}, "ema": {"parameters": {"decay": {"value": 0.9}}}},
        # One band, of four values: a later one would be reached by the bad trial alone.
        early_terminate={"type": "hyperband", "max_iter": 12, "eta": 3, "s": 1},
    )
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / ".env").write_text(f"WANDB_API_KEY={client.env.pop('WANDB_API_KEY')}\nWANDB_MODE=\n")
    command = [client.interpreter, "-m", "agent.sweep"]
    output = client.command(*command, "mine.yaml", "--agents", "2")

    (sweep,) = server.sweeps.values()
    assert [run.config["train.lr"] for run in sweep.runs] == [good[0]["lr"], bad["lr"], good[1]["lr"]]
    first, stopped, third = sweep.runs
    # At a fixed cadence, to the end.
    for run in (first, third):
        assert (run.state, run.exit_code) == ("finished", 0)
        assert [step for step, _ in losses(run)] == list(range(4, 33, 4))
    assert stopped.stop_requested
    assert stopped.state == "killed", "not preempted, which would give it to the next agent"
    seen = [step for step, _ in losses(stopped)]
    assert 4 < len(seen) < 100_000
    assert seen == list(range(4, 4 * len(seen) + 1, 4)), "its last rows arrived"
    # W&B's engine finds the best value, be it handed the history beside a summary that W&B nests, or a flat summary.
    for run in sweep.runs:
        best = pytest.approx(min(loss for _, loss in losses(run)))
        for summary, history in ((run.summary, run.history), (summary_figures(run.summary), [])):
            past = engine.past_run(run.id, {"seed": 0}, "finished", summary, history)
            assert past.metric_extremum("val/loss", "minimum") == best

    lines = output.splitlines()
    path = f"tester/test/{sweep.id}"
    assert lines[0].startswith("estimate at most: 3 trials, 2 at a time; ")
    assert any(line.startswith("sweep mine: http") and sweep.id in line for line in lines)
    assert any(line.endswith(f"python -m agent.sweep --attach {path}") for line in lines)
    ranked = [line.split()[1] for line in lines if re.match(r"^\d  ", line)]
    better = sorted((first, third), key=lambda run: min(loss for _, loss in losses(run)))
    assert ranked == [run.id for run in [*better, stopped]]
    assert len(list((tmp_path / "runs/agents").glob(f"{sweep.id}-[12].log"))) == 2
    assert lines[-1] == f"report: runs/sweeps/{sweep.id}/report.html"
    report = (tmp_path / "runs/sweeps" / sweep.id / "report.html").read_text()
    assert all(run.id in report for run in sweep.runs)
    assert f"page: in run {better[0].id} and in its artifact report-{sweep.id}" in lines
    assert [page.decode() for page in server.artifact(f"report-{sweep.id}:latest").files.values()] == [report]
    assert [run.id for run in sweep.runs if any("report" in row for row in run.history)] == [better[0].id]
    assert better[0].state == "finished"

    # Joined when it is over: nothing is left to do but to show the same table.
    again = client.command(*command, "--attach", sweep.id)
    assert [line.split()[1] for line in again.splitlines() if re.match(r"^\d  ", line)] == ranked
    assert len(sweep.runs) == 3
    for words, reason in (
        (["--attach", "nobody"], "error: --attach = 'nobody': Could not find sweep"),
        (["other.yaml", "--attach", sweep.id], f"error: train = {{'values': [{good[0]!r}]}}: in {path} it is "),
    ):
        config["parameters"]["train"] = {"values": [good[0]]}
        (tmp_path / "other.yaml").write_text(yaml.safe_dump(config))
        refused = finish(client.popen(*command, *words), code=2)
        assert refused.strip().splitlines()[-1].startswith(reason)
    assert len(server.sweeps) == 1


@pytest.mark.slow
def test_an_offline_sweep_killed_and_gone_on_with_is_synced_as_one_whole_group(
    server: WandbServer, tmp_path: Path, forks: Forks
) -> None:
    steps = 48
    parameters = {
        "train.steps": {"value": steps},
        "checkpoint.every": {"value": 16},
        "train": {"parameters": {"lr": {"min": 0.001, "max": 0.01}}},
        "diffusion.schedule": {"values": ["linear", "cosine"]},
    }
    (tmp_path / "later.yaml").write_text(yaml.safe_dump(content("bayes", parameters, run_cap=3)))
    command = [str(forks.interpreter), "-m", "agent.sweep", "later.yaml", "--offline", "--jobs", "2"]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment = clean | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "runs/sweeps/later"
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + TIMEOUT
    while not list(folder.glob("trials/*/history.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

    trials = {trial["id"]: trial for trial in json.loads((folder / "results.json").read_text())}
    assert [trial["state"] for trial in trials.values()] == ["finished"] * 3
    client = Client(server, tmp_path)
    runs_on_disk = sorted(str(path) for path in folder.glob("trials/*/wandb/offline-run-*"))
    assert len(runs_on_disk) > 3, "one of the trials was gone on with"
    client.wandb("sync", *runs_on_disk)
    runs = [run for run in server.runs.values() if run.group == "later"]
    assert {run.id for run in runs} == set(trials)
    for run in runs:
        trial = trials[run.id]
        assert run.state == "finished"
        for key, value in trial["parameters"].items():
            assert run.config[key] == value
        # Each row once, those from before the kill among them.
        assert [step for step, _ in losses(run)] == list(range(4, steps + 1, 4))
        rows = [json.loads(line) for line in (folder / "trials" / run.id / "history.jsonl").read_text().splitlines()]
        assert losses(run) == [(row["step"], row["val/loss"]) for row in rows if "val/loss" in row]
        assert all(math.isfinite(loss) for _, loss in losses(run))
        assert summary_figures(run.summary)["val/loss"] == pytest.approx(min(loss for _, loss in losses(run)))
        assert summary_figures(run.summary)["model/params"] == trial["figures"]["model/params"]
        for kind in ("model", "training-state"):
            aliases = {alias for a in run.output_artifacts if a.type == kind for alias in a.aliases}
            assert {"latest", "best", "step-32", f"step-{steps}"} <= aliases
