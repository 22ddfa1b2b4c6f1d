"""Real trials in a Slurm that preempts, warns, cancels and loses nodes: each ends whole, with undisturbed weights."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from clusters.slurm import Cluster, cluster, missing, wait_for
from clusters.trials import (
    EVERY,
    assert_as_undisturbed,
    difference,
    hold,
    processes_of,
    released,
    rows_in,
    sweep_of,
    undisturbed,
)
from forks import Forks
from server import Run, WandbServer
from wandb_client import Client, finish

from agent.sweep.file import check_sweep
from agent.sweep.offline import offline_sweep, run_offline
from agent.sweep.online import agent_tasks
from diffusion_core.checkpoint import read_checkpoint
from diffusion_core.machine.job import command_of_job, read_note
from diffusion_core.machine.processes import kill_tree
from diffusion_core.machine.slurm.queue import POLL
from diffusion_core.registries import LAUNCHERS
from diffusion_core.search.offline import OfflineSweep

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]

ROOT = Path(__file__).resolve().parents[3]
STEPS = 200
SEEDS = range(8)
fork = multiprocessing.get_context("fork")


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm"), nodes=3) as running:
        yield running


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server
        assert server.errors == []


def steps(run: Run) -> list[int]:
    return [row["step"] for row in run.history if "train/loss" in row]


@pytest.mark.timeout(1200)
def test_an_array_of_agents_runs_a_grid_whole_whatever_the_cluster_does(
    slurm: Cluster, server: WandbServer, tmp_path: Path, forks: Forks
) -> None:
    client = Client(server, tmp_path, forked=False)
    client.env = {name: value for name, value in client.env.items() if not name.startswith("SLURM_")}
    (tmp_path / "mine.yaml").write_text(
        json.dumps(sweep_of("grid", {"seed": {"values": list(SEEDS)}}, {"train.steps": STEPS}))
    )
    # The warning may come up to half a minute before it is due.
    words = ["--launcher", "slurm", "--slurm", "--partition=wide --cpus-per-task=2 --signal=B:USR1@55"]
    environment = {**slurm.environment, POLL: "1"}
    command = [client.interpreter, "-m", "agent.sweep"]
    submitted = finish(client.popen(*command, "mine.yaml", "--agents", "3", "--detach", *words, **environment))
    (sweep,) = server.sweeps.values()
    assert f"--attach tester/test/{sweep.id}" in submitted
    attached = client.popen(*command, "--attach", sweep.id, *words, **environment)

    wait_for(lambda: [len(steps(run)) > 1 for run in sweep.runs].count(True) >= 3, "the first rows", 120)
    at = dict(row.split("|") for row in slurm.ask("squeue", "--array", "-h", "-o", "%N|%i").splitlines())
    assert at.keys() == {"n1", "n2", "n3"}
    held = hold(tmp_path / "runs", "n3")
    left = processes_of("SLURMD_NODENAME=n3")
    slurm.lose("n3")
    slurm.ask("scontrol", "update", f"jobid={at['n2']}", "TimeLimit=1")
    slurm.preempt("n1")
    log = tmp_path / f"runs/agents/{sweep.id}-{at['n2'].split('_')[1]}.log"
    wait_for(lambda: "DUE TO TIME LIMIT" in log.read_text() or "JOB REQUEUE" in log.read_text(), "the warning", 120)
    slurm.ask("scontrol", "update", f"jobid={at['n2']}", "TimeLimit=60")

    def elsewhere() -> bool:
        """Whether the job has begun elsewhere, which it does after the first one has ended."""
        note = read_note(tmp_path / f"runs/agents/{sweep.id}-{at['n3'].split('_')[1]}")
        return note is not None and note.node != "n3"

    with slurm.hurrying(), released(held, elsewhere):
        output = finish(attached, within_s=900)

    assert sorted(run.config["seed"] for run in sweep.runs) == list(SEEDS), "one run each"
    for run in sweep.runs:
        assert (run.state, run.exit_code) == ("finished", 0)
        assert steps(run) == list(range(EVERY, STEPS + 1, EVERY)), "each row once"
        assert run.summary["slurm/partition"] == "wide"
    assert [run.summary["slurm/restarts"] for run in sweep.runs].count(1) >= 3
    assert not set(left) & set(processes_of("SLURMD_NODENAME=n3")), "they ended when the job started elsewhere"
    logs = {job: (tmp_path / f"runs/agents/{sweep.id}-{job.split('_')[1]}.log").read_text() for job in at.values()}
    assert "its job was killed; handing it back" in logs[at["n3"]]
    assert "another job took over" in logs[at["n3"]]
    assert f"jobs {sweep.id} are under way; no more are submitted" in output
    assert "agents: 3 completed" in output
    for run in sweep.runs:
        knobs = {"train.steps": STEPS, "seed": run.config["seed"]}
        assert_as_undisturbed(tmp_path / "runs" / run.id, knobs, forks, tmp_path / f"undisturbed-{run.id}")


def test_a_trial_that_is_killed_before_it_has_begun_is_handed_back(server: WandbServer, tmp_path: Path) -> None:
    """W&B has given its agent the run, and Python has hardly started."""
    client = Client(server, tmp_path, forked=False)
    (tmp_path / "bin").mkdir()
    for name in ("squeue", "scontrol"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / name).chmod(0o755)
    found = os.pathsep.join([str(tmp_path / "bin"), client.env["PATH"]])
    client.env |= {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "PATH": found}
    (tmp_path / "mine.yaml").write_text(
        json.dumps(sweep_of("grid", {"seed": {"values": [3]}}, {"train.steps": 2 * EVERY}))
    )
    client.wandb("sweep", "mine.yaml")
    (sweep,) = server.sweeps.values()
    tasks = agent_tasks(f"tester/test/{sweep.id}", 1, None, {}, wait=True)
    words = command_of_job(tmp_path / "agent", tasks.commands[0], tasks.hand_back)
    first = client.popen(*words)
    place = Path(client.env["WANDB_DIR"], "agent-1/wandb")
    wait_for(lambda: bool(list(place.glob("sweep-*/config-*.yaml"))), "the agent's file", 120)
    kill_tree(first.pid)
    assert not (tmp_path / "agent-1/trial.json").exists()
    assert not list(tmp_path.glob("runs/*")), "it has no folder yet"
    output = finish(client.popen(*words))
    assert "its job was killed; handing it back" in output
    (run,) = sweep.runs
    assert (run.state, run.exit_code, run.config["seed"]) == ("finished", 0, 3)
    assert steps(run) == [EVERY, 2 * EVERY]


def test_a_time_limit_that_nothing_warned_of_costs_no_trial(
    slurm: Cluster, server: WandbServer, tmp_path: Path, forks: Forks
) -> None:
    """Slurm ends two jobs with TIMEOUT: online, the trial leaves on SIGTERM; offline, it does not, and is killed."""
    client = Client(server, tmp_path, forked=False)
    client.env = {name: value for name, value in client.env.items() if not name.startswith("SLURM_")}
    words = "--partition=wide --cpus-per-task=2 --time=1 --signal=B:CONT@1"  # Of a signal that nobody heeds.
    content = sweep_of("grid", {"seed": {"values": [0]}}, {"train.steps": STEPS})
    (tmp_path / "mine.yaml").write_text(json.dumps(content))
    start = [sys.executable, "-m", "agent.sweep", "mine.yaml", "--launcher", "slurm", "--slurm", words]
    environment = {**slurm.environment, POLL: "1"}
    online = client.popen(*start, "--agents", "1", **environment)
    offline = client.popen(*start, "--offline", "--out", "offline", **environment, WANDB_MODE="disabled")

    frozen = []
    for where in ("runs", "offline/mine/trials"):
        wait_for(lambda where=where: bool(list(tmp_path.glob(f"{where}/*/history.jsonl"))), "rows", 120)  # type: ignore[misc]
        (history,) = tmp_path.glob(f"{where}/*/history.jsonl")
        frozen.append(min(processes_of(f"WANDB_RUN_ID={history.parent.name}")))
        os.kill(frozen[-1], signal.SIGSTOP)
    (log,) = tmp_path.glob("runs/agents/*-1.log")
    wait_for(lambda: "DUE TO TIME LIMIT" in log.read_text(), "the time limit", 180)
    os.kill(frozen[0], signal.SIGCONT)
    with slurm.hurrying():
        printed = [finish(process, within_s=300) for process in (online, offline)]

    (run,) = server.runs.values()
    (trial,) = trials_of(tmp_path / "offline/mine").values()
    assert "timeout" in printed[0]
    assert (run.state, run.exit_code, run.summary["slurm/restarts"]) == ("finished", 0, 1)
    assert (trial["state"], trial["failures"]) == ("finished", 0)
    folders = tmp_path / "runs" / run.id, tmp_path / "offline/mine/trials" / trial["id"]
    rows = list(range(EVERY, STEPS + 1, EVERY))
    assert steps(run) == rows_of(tmp_path / "offline/mine", trial["id"]) == rows, "each row once"
    for folder in folders:
        knobs = {"train.steps": STEPS, "seed": 0}
        assert_as_undisturbed(folder, knobs, forks, tmp_path / f"undisturbed-{folder.name}")


def test_trials_of_an_agent_run_on_all_nodes_of_its_job(
    slurm: Cluster, server: WandbServer, tmp_path: Path, forks: Forks
) -> None:
    """One agent on two nodes, which is warned once: two trials, one run each, with the weights of one process."""
    client = Client(server, tmp_path, forked=False)
    client.env = {name: value for name, value in client.env.items() if not name.startswith("SLURM_")}
    knobs = {"train.steps": STEPS, "train.batch_size": 8, "train.precision": "fp32", "model.dropout": 0.0}
    seeds = [0, 1]
    (tmp_path / "mine.yaml").write_text(json.dumps(sweep_of("grid", {"seed": {"values": seeds}}, knobs)))
    words = ["--launcher", "slurm", "--slurm", "--partition=low --nodes=2 --cpus-per-task=2", "--agents", "1"]
    command = client.popen(sys.executable, "-m", "agent.sweep", "mine.yaml", *words, **slurm.environment, **{POLL: "1"})
    wait_for(lambda: [len(steps(run)) > 1 for run in server.runs.values()] == [True], "rows", 120)
    (first,) = server.runs.values()
    ranks = [processes_of(f"WANDB_RUN_ID={first.id}", "WORLD_SIZE=2", f"RANK={rank}") for rank in range(2)]
    assert all(ranks), "a process on each node"
    (job,) = slurm.ask("squeue", "-h", "-o", "%i").split()
    slurm.ask("scancel", "--batch", "--signal=USR1", job)
    with slurm.hurrying():
        finish(command, within_s=600)
    (sweep,) = server.sweeps.values()
    assert sorted(run.config["seed"] for run in sweep.runs) == seeds, "one run each"
    assert first.summary["slurm/restarts"] == 1
    for run in sweep.runs:
        assert (run.state, run.exit_code) == ("finished", 0)
        assert steps(run) == list(range(EVERY, STEPS + 1, EVERY)), "each row once"
        alone = undisturbed(knobs | {"seed": run.config["seed"]}, forks, tmp_path / f"alone-{run.id}")
        ours = read_checkpoint(tmp_path / "runs" / run.id)
        assert difference(ours.tensors("model"), alone.tensors("model")) < 1e-3


# Without a network


@pytest.fixture
def quiet(slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a coordinator of this process."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "SLURM_"))]:
        monkeypatch.delenv(name)
    added = {
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        POLL: "0.5",
    }
    for name, value in {**slurm.environment, **added}.items():
        monkeypatch.setenv(name, value)


def coordinator(content: dict[str, Any], folder: Path, jobs: int, words: str) -> OfflineSweep:
    sweep = check_sweep(content, "mine.yaml", "mine")
    return offline_sweep(sweep, folder, launcher=LAUNCHERS["slurm"].make([{}] * jobs, words))


@contextmanager
def coordinator_process(content: dict[str, Any], folder: Path, jobs: int, words: str) -> Iterator[BaseProcess]:
    """A process that runs a sweep. It is killed at the end."""
    process = fork.Process(target=lambda: sys.exit(run_offline(coordinator(content, folder, jobs, words), None)))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join(60)


def trials_of(folder: Path) -> dict[str, dict[str, Any]]:
    file = folder / "sweep.json"
    stored = json.loads(file.read_text())["trials"] if file.exists() else []
    return {trial["id"]: trial for trial in stored}


def rows_of(folder: Path, trial: str) -> list[int]:
    """The steps of a trial's rows so far."""
    return rows_in(folder / "trials" / trial)


@pytest.mark.usefixtures("quiet")
def test_bayes_with_hyperband_is_whole_whatever_the_cluster_does(slurm: Cluster, tmp_path: Path, forks: Forks) -> None:
    early = {"type": "hyperband", "min_iter": 4, "eta": 2}
    lr = {"min": 0.0001, "max": 0.01}
    fixed = {"train.steps": STEPS, "eval.every": 20}
    content = sweep_of("bayes", {"train.lr": lr}, fixed, run_cap=5, early_terminate=early)
    folder, words = tmp_path / "sweep", "--partition=wide --cpus-per-task=2"
    with coordinator_process(content, folder, 3, words):
        held = [process for node in ("n1", "n2", "n3") for process in hold(folder / "trials", node)]
    at = {note.node: name for name in trials_of(folder) if (note := read_note(folder / "trials" / name))}
    assert at.keys() == {"n1", "n2", "n3"}
    cancelled = at["n1"]
    with coordinator_process(content, folder, 3, words):
        slurm.lose("n3")
        slurm.ask("scancel", str(trials_of(folder)[cancelled]["job"]))
        slurm.preempt("n2")
        wait_for(lambda: trials_of(folder)[cancelled]["failures"] == 1, "the failure", 60)
    with slurm.hurrying(), released(held, lambda: read_note(folder / "trials" / at["n3"]).node != "n3"):  # type: ignore[union-attr]
        last = coordinator(content, folder, 3, words)
        last.run()
    assert len(last.state.trials) == 5
    assert {trial.state for trial in last.state.trials} <= {"finished", "stopped"}
    assert {trial.id: trial.failures for trial in last.state.trials if trial.failures} == {cancelled: 1}
    assert [read_note(folder / "trials" / at[node]).restarts for node in ("n2", "n3")] == [1, 1]  # type: ignore[union-attr]
    for trial in last.state.trials:
        rows = rows_of(folder, trial.id)
        assert rows == list(range(EVERY, (STEPS if trial.state == "finished" else rows[-1]) + 1, EVERY))
        if trial.state == "finished":
            knobs = fixed | trial.parameters
            assert_as_undisturbed(folder / "trials" / trial.id, knobs, forks, tmp_path / trial.id)


@pytest.mark.usefixtures("quiet")
def test_a_trial_on_two_nodes_survives_a_warning_a_dead_process_and_a_lost_node_and_goes_on_with_one(
    slurm: Cluster, tmp_path: Path, forks: Forks
) -> None:
    knobs = {
        "train.steps": STEPS,
        "train.batch_size": 8,
        "train.precision": "fp32",
        "model.dropout": 0.0,
        "checkpoint.every": 10,
    }
    content = sweep_of("grid", {"seed": {"values": [0]}}, knobs)
    folder, words = tmp_path / "sweep", "--partition=low --nodes=2 --cpus-per-task=2 --exclude=n3"

    def trial() -> dict[str, Any]:
        return next(iter(trials_of(folder).values()))

    def wait_for_rows(more: int) -> None:
        before = sum(len(rows_of(folder, name)) for name in trials_of(folder))
        wait_for(lambda: sum(len(rows_of(folder, name)) for name in trials_of(folder)) >= before + more, "rows", 120)

    with coordinator_process(content, folder, 1, words) as process:
        wait_for_rows(3)
        first = trial()["job"]
        slurm.ask("scancel", "--batch", "--signal=USR1", first)
        wait_for(lambda: "PENDING" in slurm.states().values(), "the queue", 60)
        slurm.start_now()
        wait_for_rows(5)
        os.kill(processes_of(f"WANDB_RUN_ID={trial()['id']}", "RANK=1")[0], signal.SIGKILL)
        wait_for(lambda: trial()["failures"] == 1, "the failure", 60)
        wait_for_rows(5)
        slurm.lose("n2")
        ranks = [f"WANDB_RUN_ID={trial()['id']}", "WORLD_SIZE=2"]
        wait_for(lambda: not processes_of(*ranks), "the end of all processes, also on the lost node", 30)
        assert trial()["job"] != first
        for _ in range(2):  # The job waits for a second node, so cancel it.
            os.kill(process.pid or 0, signal.SIGINT)
            time.sleep(0.5)
        process.join(60)
    assert trial()["state"] == "waiting"
    last = coordinator(content, folder, 1, "--partition=low --cpus-per-task=2")
    assert [record.state for record in last.run()] == ["finished"]
    assert rows_of(folder, trial()["id"]) == list(range(EVERY, STEPS + 1, EVERY))
    config = json.loads((folder / "results.json").read_text())[0]["config"]
    assert config["train.batch_size"] == 8
    alone = undisturbed(knobs | {"seed": 0}, forks, tmp_path / "alone")
    ours = read_checkpoint(folder / "trials" / trial()["id"])
    for part in ("model", "ema"):  # Two processes add up gradients in another order than one.
        assert difference(ours.tensors(part), alone.tensors(part)) < 1e-3
