"""W&B goes away: before a trial starts, for a while, or until after its end. Training goes on; nothing is lost.

Three trials share one outage. The client and its core are W&B's own; what they print is what a user would follow.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from forks import WAIT_S, WORDS, Fork, Forks
from server import Run, WandbServer
from wandb_client import Client

from agent.ending import UNSENT

STEPS = 200
TRIAL = [*WORDS, f"--train.steps={STEPS}", "--checkpoint.every=100", "--checkpoint.keep=1"]


@dataclass
class Outage:
    """What came of the three trials.

    Attributes:
        server: after the outage.
        lasting: until the server was back, and a moment longer.
        ended: before the server was back; ``python -m agent.sync`` was called since.
        begun: what the one that began during the outage printed; ``python -m agent.sync`` was called since.
        steps: of the lasting trial, when the outage began and when it ended.
    """

    server: WandbServer
    lasting: Fork
    ended: Fork
    begun: str
    steps: tuple[int, int]

    def run(self, name: str) -> Run:
        return self.server.runs[name]


def until(condition: Callable[[], bool], trial: Fork) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, trial.output
        assert trial.poll() in (None, 0), trial.output
        time.sleep(0.05)


def recorded(folder: Path) -> int:
    file = folder / "run" / "history.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


@pytest.fixture(scope="module")
def outage(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Iterator[Outage]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("lasting", "ended", "begun")}
    with WandbServer() as server:
        clients = {name: Client(server, folder) for name, folder in folders.items()}

        def start(name: str, **env: str) -> Fork:
            variables = clients[name].env | {
                "WANDB_RUN_ID": name,
                "WANDB_INIT_TIMEOUT": "5",
                # Retries as usual, but for a test's sake not minutes apart.
                "WANDB_X_FILE_STREAM_RETRY_WAIT_MAX_SECONDS": "1",
                "WANDB_X_GRAPHQL_RETRY_WAIT_MAX_SECONDS": "1",
                "WANDB_X_FILE_TRANSFER_RETRY_WAIT_MAX_SECONDS": "1",
            }
            return forks.start(TRIAL, folders[name], variables | env)

        def has_history(name: str) -> bool:
            return name in server.runs and len(server.runs[name].history) > 0

        lasting, ended = start("lasting"), start("ended", WANDB_FINISH_TIMEOUT="3")
        for name, trial in (("lasting", lasting), ("ended", ended)):
            until(functools.partial(has_history, name), trial)
        server.pause()
        gone = len(server.runs["lasting"].history)
        begun = start("begun")
        assert ended.wait() == UNSENT, ended.output
        assert begun.wait() == UNSENT, begun.output
        until(lambda: recorded(folders["lasting"]) == STEPS, lasting)
        partial = len(server.runs["ended"].history)
        assert 0 < partial < STEPS
        assert "begun" not in server.runs
        server.resume()
        assert lasting.wait() == 0, lasting.output

        assert re.search(r"this has not arrived yet: history.*; to send it: python -m agent.sync run\n", ended.output)
        said = begun.output
        for name, trial in (("ended", ended), ("begun", begun)):
            words = re.search(r"to send it: python -m (agent\.sync) (\S+)\n", trial.output)
            assert words is not None, trial.output
            sync = forks.start([words[2]], folders[name], clients[name].env, words[1])
            assert sync.wait() == 0, sync.output
        yield Outage(server, lasting, ended, said, (gone, STEPS))
        assert server.errors == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lasting", "ended", "begun"])
def test_the_run_is_whole_on_the_server(outage: Outage, name: str) -> None:
    run = outage.run(name)
    assert (run.state, run.exit_code) == ("finished", 0)
    assert [row["step"] for row in run.history] == list(range(1, STEPS + 1))
    assert [row["_step"] for row in run.history] == list(range(1, STEPS + 1))
    assert run.config["train.steps"] == STEPS
    assert run.summary["model/params"] > 0
    (best,) = [row for row in run.history if row["step"] == run.summary["best/step"]]
    assert run.summary["best/val/loss"] == pytest.approx(best["val/loss"])
    last = run.history[-1]
    assert {"val/loss", "samples", "diffusion"} <= last.keys()
    assert run.files[last["samples"]["path"]].startswith(b"\x89PNG")
    for kind in ("model", "training-state"):
        aliases = {alias for artifact in run.output_artifacts if artifact.type == kind for alias in artifact.aliases}
        assert {"latest", "best", f"step-{STEPS}"} <= aliases


@pytest.mark.slow
def test_a_trial_that_begins_without_a_server_says_so(outage: Outage) -> None:
    assert "the server does not answer, so this run is recorded offline" in outage.begun
    assert "Traceback" not in outage.begun
