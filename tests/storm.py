"""A sweep in a storm: real agents, real trials, and faults drawn from a seed; then count what is missing.

  python tests/storm.py --trials 100 --agents 2 --seed 0 --out storm.json

While the agents run, a fault happens every few seconds: a status from 400 to 599, a broken connection, a lost answer
or a hang for some operation; SIGTERM or SIGKILL to a trial, an agent, W&B's core or all of them; no space on the disk;
the folder of a trial that is not running, deleted. Then the weather is fine again, each run gets at most one command,
and the report says for every run whether it is on W&B once, with its whole history and pictures, and with the weights
of a quiet run.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from forks import WORDS, shared_forks
from server import Fault, Run, Sweep, WandbServer
from wandb_client import Client

STEPS = 40
TRIAL = [word for word in WORDS if "log.dir" not in word and "checkpoint.every" not in word]
TRIAL += [f"--train.steps={STEPS}", "--checkpoint.every=10", "--checkpoint.keep=1"]
RETRIES = {f"WANDB_X_{what}_RETRY_WAIT_MAX_SECONDS": "1" for what in ("FILE_STREAM", "GRAPHQL", "FILE_TRANSFER")}
OPERATIONS = (
    "file_stream",
    "UpsertBucket",
    "Heartbeat",
    "CreateRunFiles",
    "CreateArtifact|CommitArtifact|CreateArtifactFiles|CreateArtifactManifest",
    "PUT storage/.*",
    "GET .*",
    "RunResumeStatus",
    "RunArrival|StopCause",
    ".*",
)
STATUSES = (400, 401, 403, 404, 408, 409, 410, 413, 422, 429, 500, 501, 502, 503, 504, 599)
FILE_LIMIT = 20_000
"""Bytes that a file may have where the disk is full; a checkpoint has more."""


@dataclass
class Report:
    """What came of a storm.

    Attributes:
        trials: number of trials of the sweep.
        faults: how often each kind of fault happened.
        commands: how many runs needed a command at the end, by kind.
        wrong: what is wrong, by run; empty if nothing is.
        seconds: how long it took.
    """

    trials: int
    faults: dict[str, int] = field(default_factory=dict)
    commands: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


class Storm:
    """A sweep of tiny trials, its agents, and what goes wrong.

    Args:
        server: the server.
        folder: each agent has a folder of its own in it, as if it ran on another machine.
        trials: number of trials, which differ by their seed.
        agents: number of agents.
        seed: of the faults.
        every_s: seconds between two faults, on average.
    """

    def __init__(self, server: WandbServer, folder: Path, trials: int, agents: int, seed: int, every_s: float) -> None:
        self.server = server
        self.chance = random.Random(seed)
        self.machines = [Client(server, folder / f"machine-{number}", forked=False) for number in range(agents)]
        for machine in self.machines:
            machine.env |= RETRIES | {"WANDB_FINISH_TIMEOUT": "15", "WANDB_INIT_TIMEOUT": "15"}
            machine.env |= {"DIFFUSION_SWEEPS_DOWNLOAD_WITHIN": "5"}
        self.count = trials
        self.every_s = every_s
        self.faults: Counter[str] = Counter()
        self.commands: Counter[str] = Counter()
        self.agents: list[subprocess.Popen[bytes] | None] = [None] * agents
        self.started = [-5.0] * agents
        self.seen_at = time.monotonic()  # When a trial's process was seen last.
        self.sweep = self._sweep()

    def _sweep(self) -> Sweep:
        first = self.machines[0]
        content = {
            "method": "grid",
            "command": ["python", "-m", "agent", *TRIAL, "${args}"],
            "parameters": {"seed": {"values": list(range(self.count))}},
        }
        file = first.directory / "sweep.yaml"
        file.write_text(json.dumps(content))
        first.wandb("sweep", str(file))
        (sweep,) = self.server.sweeps.values()
        return sweep

    def run(self, patience_s: float) -> None:
        """Run agents until the sweep is over, with faults all the time, for at most so many seconds."""
        end = time.monotonic() + patience_s
        over = threading.Event()
        weather = threading.Thread(target=self._weather, args=(over,), daemon=True)
        weather.start()
        while time.monotonic() < end and not self._is_done():
            self._agents_at_work()
            time.sleep(0.2)
        over.set()
        weather.join()
        self.server.faults.clear()
        self._full_disks(full=False)
        while time.monotonic() < end and not self._is_done():  # Fine weather for the rest.
            self._agents_at_work()
            time.sleep(0.2)
        for agent in self.agents:
            if agent is not None and agent.poll() is None:
                agent.wait(patience_s)
        while any(self._trials()):  # Trials whose agent was killed.
            time.sleep(0.2)

    def _agents_at_work(self) -> None:
        for number, machine in enumerate(self.machines):
            agent = self.agents[number]
            if (agent is None or agent.poll() is not None) and time.monotonic() > self.started[number] + 5.0:
                self.started[number] = time.monotonic()
                log = (machine.directory / "agent.txt").open("ab")
                self.agents[number] = subprocess.Popen(
                    [sys.executable, "-m", "wandb", "agent", f"tester/test/{self.sweep.id}"],
                    cwd=machine.directory,
                    env=machine.env,
                    stdout=log,
                    stderr=log,
                )

    def _is_done(self) -> bool:
        runs = self.sweep.runs
        if len(runs) < self.count or self.sweep.requeued:
            return False
        if any(self._trials()):
            self.seen_at = time.monotonic()
        # The server takes a trial that was killed for running, until its heartbeat is overdue.
        return all(run.state != "running" for run in runs) or time.monotonic() - self.seen_at > 20.0

    def _trials(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                here = process.cwd().startswith(str(self.machines[0].directory.parent))
                if here and words[1:3] == ["-m", "agent"] and process.status() != psutil.STATUS_ZOMBIE:
                    yield process

    def _weather(self, over: threading.Event) -> None:
        while not over.wait(self.chance.uniform(0.2, 1.8) * self.every_s):
            kind = self.chance.choice(
                ["status"] * 4 + ["drop", "lose", "hang", "term", "kill", "term all", "kill core", "kill agent"]
                + ["full disk", "free disk", "free disk", "empty disk"]
            )  # fmt: skip
            with contextlib.suppress(psutil.Error, OSError, IndexError):
                self._happen(kind)
                self.faults[kind] += 1

    def _happen(self, kind: str) -> None:
        chance, operation, times = self.chance, self.chance.choice(OPERATIONS), self.chance.randint(1, 4)
        if kind == "status":
            self.server.faults = [Fault(operation, status=chance.choice(STATUSES), times=times)]
        elif kind in ("drop", "lose"):
            self.server.faults = [Fault(operation, times=times, **{kind: True})]  # type: ignore[arg-type]
        elif kind == "hang":
            self.server.faults = [Fault(operation, wait_s=10.0, times=1)]
        elif kind == "kill agent":
            agent = chance.choice([agent for agent in self.agents if agent is not None])
            agent.send_signal(chance.choice([signal.SIGTERM, signal.SIGKILL]))
        elif kind in ("full disk", "free disk"):
            self._full_disks(full=kind == "full disk")
        elif kind == "empty disk":
            self._empty_disk()
        else:
            trial = chance.choice(list(self._trials()))
            family = [trial, *trial.children(recursive=True)]
            chosen = {"term": [trial], "kill": [trial], "term all": family, "kill core": family[1:]}[kind]
            for process in chosen:
                process.send_signal(signal.SIGTERM if kind.startswith("term") else signal.SIGKILL)

    def _full_disks(self, *, full: bool) -> None:
        """Limit the size of files of all trials, or do not any more. A trial that starts has no limit."""
        limit = FILE_LIMIT if full else resource.RLIM_INFINITY
        for trial in self._trials():
            with contextlib.suppress(psutil.Error, OSError):
                trial.rlimit(psutil.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def _empty_disk(self) -> None:
        """Delete the folder of a trial that was handed back and waits: another machine will go on with it."""
        waiting = [run.id for run in self.sweep.requeued]
        for machine in self.machines:
            if waiting:
                shutil.rmtree(machine.directory / "runs" / self.chance.choice(waiting), ignore_errors=True)

    # Afterwards

    def mend(self, run: Run) -> None:
        """Give a run the one command that its user would give it, if it needs one."""
        if run.state == "finished" and missing(run) == "":
            return
        folders = {machine: machine.directory / "runs" / run.id for machine in self.machines}
        finished = [machine for machine, folder in folders.items() if (folder / "result.json").is_file()]
        if finished:
            self.commands["agent.sync"] += 1
            command = ["-m", "agent.sync", f"runs/{run.id}"]
            machine = finished[0]
        else:
            self.commands["agent"] += 1
            machine = max(self.machines, key=lambda machine: newest(folders[machine]))
            command = ["-m", "agent", *TRIAL, f"--seed={run.config['seed']}", f"--log.dir=runs/{run.id}"]
        env = machine.env | {"WANDB_RUN_ID": run.id, "WANDB_SWEEP_ID": self.sweep.id}
        with (machine.directory / "mended.txt").open("ab") as log:
            subprocess.run(
                [sys.executable, *command], cwd=machine.directory, env=env, stdout=log, stderr=log, check=False
            )

    def wrong(self, quiet: dict[int, str]) -> dict[str, str]:
        """What is wrong with the runs, by their ids."""
        found = {}
        seeds = Counter(run.config["seed"] for run in self.sweep.runs)
        for run in self.sweep.runs:
            reason = missing(run) or ("" if run.state == "finished" else f"it is {run.state}")
            if not reason and seeds[run.config["seed"]] != 1:
                reason = "its trial is there twice"
            if not reason and weights(run) != {quiet[run.config["seed"]]}:
                reason = "its weights are others than those of a quiet run"
            if reason:
                found[run.id] = reason
        if len(self.sweep.runs) != self.count:
            found["sweep"] = f"{len(self.sweep.runs)} runs of {self.count}"
        return found


def missing(run: Run) -> str:
    """What a run lacks on W&B, in words; empty if nothing."""
    steps = [row["_step"] for row in run.history]
    if steps != list(range(1, STEPS + 1)):
        return f"history of {len(steps)} rows up to step {steps[-1] if steps else 0}"
    pictures = [row["samples"]["path"] for row in run.history if "samples" in row]
    if lost := [name for name in pictures if name not in run.files]:
        return f"{len(lost)} pictures of {len(pictures)}"
    for kind in ("model", "training-state"):
        versions = [item for item in run.output_artifacts if item.type == kind and item.state == "COMMITTED"]
        if not any(item.metadata.get("step") == STEPS for item in versions):
            return f"no {kind} of step {STEPS}"
    return ""


def weights(run: Run) -> set[str]:
    """Hashes of the last weights that W&B has of a run: one, unless two versions differ."""
    versions = [item for item in run.output_artifacts if item.type == "model" and item.metadata.get("step") == STEPS]
    return {hashlib.sha256(item.files["ema.safetensors"]).hexdigest() for item in versions if item.state == "COMMITTED"}


def newest(folder: Path) -> str:
    """The name of the newest checkpoint in a run's folder."""
    return max((path.name for path in folder.glob("checkpoints/step-*")), default="")


def quiet_weights(folder: Path, count: int) -> dict[int, str]:
    """A hash of the weights that each trial ends with if nothing happens, by its seed."""
    found = {}
    for seed in range(count):
        shared_forks().run([*TRIAL, f"--seed={seed}", "--log.dir=run"], folder / str(seed))
        file = folder / str(seed) / "run" / "checkpoints" / f"step-{STEPS:08d}" / "ema.safetensors"
        found[seed] = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.rmtree(folder / str(seed))
    return found


def storm(folder: Path, trials: int, agents: int, seed: int, patience_s: float, every_s: float = 4.0) -> Report:
    """Run a sweep in a storm, mend its runs, and say what is wrong."""
    began = time.monotonic()
    quiet = quiet_weights(folder / "quiet", trials)
    with WandbServer() as server:
        weather = Storm(server, folder, trials, agents, seed, every_s)
        weather.run(patience_s)
        for run in weather.sweep.runs:
            if run.state in ("running", "preempting"):
                server.expire(run.id)
            weather.mend(run)
        wrong = weather.wrong(quiet)
        if server.errors:
            wrong["server"] = server.errors[0]
    return Report(trials, dict(weather.faults), dict(weather.commands), wrong, round(time.monotonic() - began, 1))


def main() -> int:
    """Run the command; return the exit status: 0, or 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--agents", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, default=4.0, metavar="S", help="seconds between two faults, on average")
    parser.add_argument("--hours", type=float, default=2.0, help="give up after so long")
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    parser.add_argument("--keep", action="store_true", help="keep the folders")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = Path(tempfile.mkdtemp(prefix="storm-"))
    report: dict[str, Any] = asdict(
        storm(folder, arguments.trials, arguments.agents, arguments.seed, 3600 * arguments.hours, arguments.every)
    )
    print(json.dumps(report, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1))
    if arguments.keep:
        print(folder)
    else:
        shutil.rmtree(folder)
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
