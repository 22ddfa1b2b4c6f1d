"""Trials as processes that start at once: forked from one that has imported everything.

``with Forks() as forks`` starts that one; ``forks.start(words, ...)`` is ``python -m agent WORDS`` in a process of its
own, which may be sent signals and killed like any other.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]
WAIT_S = 300

STEPS = 300
EVERY = 4
WORDS = [
    "--preset=digits",
    "--model.channels=8",
    "--model.channel_multipliers=1",
    "--model.num_res_blocks=1",
    "--model.attention_resolutions=",
    "--model.norm_groups=4",
    "--model.dropout=0.2",
    "--diffusion.timesteps=50",
    "--train.batch_size=4",
    "--train.warmup_steps=10",
    "--train.device=cpu",
    "--train.precision=fp32",
    f"--train.steps={STEPS}",
    "--eval.classifier=none",
    "--eval.val_images=8",
    "--checkpoint.best_metric=val/loss",
    f"--checkpoint.every={EVERY}",
    "--sample.every=0",
    "--sample.steps=1",
    "--sample.per_class=1",
    "--log.every=1",
    "--log.dir=run",
    "--log.progress=false",
]


class Forks:
    """The process that forks."""

    def __enter__(self) -> Self:
        env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(WAIT_S)

    def ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        words: list[str],
        folder: Path,
        env: Mapping[str, str] | None = None,
        module: str = "agent.__main__",
        file_limit: int | None = None,
    ) -> Fork:
        """Start a command in a folder.

        Args:
            words: of the command line.
            folder: the working directory; what is printed goes to ``out.txt`` in there.
            env: variables that are set besides; without any, W&B is disabled.
            module: whose ``main`` is called.
            file_limit: bytes that a file may have.
        """
        folder.mkdir(parents=True, exist_ok=True)
        env = env or {"WANDB_MODE": "disabled"}
        request = {"start": words, "folder": str(folder), "env": dict(env), "module": module, "file_limit": file_limit}
        return Fork(self, self.ask(**request), folder / "out.txt")

    def run(
        self, words: list[str], folder: Path, env: Mapping[str, str] | None = None, module: str = "agent.__main__"
    ) -> str:
        """Start a command and wait for its end, which must be a success; returns what it printed."""
        fork = self.start(words, folder, env, module)
        status = fork.wait()
        assert status == 0, (status, fork.output)
        return fork.output


def handles(pid: int, number: int) -> bool:
    """Whether a process has a handler of a signal. Python has none of SIGTERM: from then on, ours are in place."""
    status = Path(f"/proc/{pid}/status").read_text()
    (caught,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(int(caught, 16) >> (number - 1) & 1)


@dataclass
class Fork:
    """A command that runs."""

    forks: Forks
    pid: int
    out: Path

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self.forks.ask(poll=self.pid)

    def wait(self) -> int:
        end = time.monotonic() + WAIT_S
        while (status := self.poll()) is None:
            assert time.monotonic() < end, f"did not end:\n{self.output}"
            time.sleep(0.02)
        return status

    @property
    def output(self) -> str:
        return self.out.read_text()


def serve() -> None:
    """Fork whenever asked to, in the process that has imported everything."""
    import importlib

    import sklearn.datasets  # noqa: F401
    import torch._dynamo  # noqa: F401
    import wandb  # noqa: F401

    import agent.__main__
    import agent.session  # noqa: F401

    ended: dict[int, int | None] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = None
        if "poll" in request:
            pid = request["poll"]
            if ended[pid] is None:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    ended[pid] = os.waitstatus_to_exitcode(status)
            answer = ended[pid]
        else:
            answer = os.fork()
            if answer == 0:
                os.setsid()
                out = os.open(Path(request["folder"], "out.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                nothing = os.open(os.devnull, os.O_RDONLY)
                for number, descriptor in enumerate((nothing, out, out)):
                    os.dup2(descriptor, number)
                if request["file_limit"] is not None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
                os.environ.update(request["env"])
                os.chdir(request["folder"])
                sys.argv = [request["module"], *request["start"]]
                module = importlib.import_module(request["module"])
                if hasattr(module, "__path__"):  # A package: what python -m runs.
                    module = importlib.import_module(f"{request['module']}.__main__")
                sys.exit(module.main(request["start"]))
            ended[answer] = None
        print(json.dumps(answer), flush=True)
    for pid, exit_code in ended.items():  # Of a test that failed.
        if exit_code is None:
            os.kill(pid, signal.SIGKILL)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


if __name__ == "__main__":
    serve()
