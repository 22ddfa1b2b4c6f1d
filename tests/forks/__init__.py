"""Commands as processes that start at once: forked from one that has imported everything.

``with Forks() as forks`` starts that one; ``forks.start(words, ...)`` is ``python -m agent WORDS`` in a process of its
own, which may be sent signals and killed like any other. Tests share one: the fixture ``forks``.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
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
        env = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "SLURM_"))}
        self.env = env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_ERROR_REPORTING": "false"}
        self.outputs = tempfile.TemporaryDirectory()
        self.started = 0
        self.interpreter = self._interpreter()
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "server.py"), str(self.interpreter.parent)],
            env=self.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.ask(ready=True)
        return self

    def _interpreter(self) -> Path:
        """Make a program ``python`` that starts commands as forks."""
        folder = Path(self.outputs.name, "bin")
        folder.mkdir()
        (folder / "real").write_text(sys.executable)
        program = folder / "python"
        program.write_text(f"#!{sys.executable} -ISE\n{(HERE / 'python.py').read_text()}")
        program.chmod(0o755)
        return program

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(WAIT_S)
        self.outputs.cleanup()

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
        module: str = "agent",
        file_limit: int | None = None,
    ) -> Fork:
        """Start ``python -m MODULE WORDS`` in a folder.

        Args:
            words: of the command line.
            folder: the working directory; what is printed goes to ``out.txt`` in there.
            env: variables that are set besides; without any, W&B is disabled.
            module: what is run.
            file_limit: bytes that a file may have.
        """
        folder.mkdir(parents=True, exist_ok=True)
        variables = {**self.env, **(env or {"WANDB_MODE": "disabled"})}
        return self._start(["-m", module, *words], folder, variables, folder / "out.txt", file_limit)

    def python(self, words: Sequence[str], folder: Path, env: Mapping[str, str]) -> Fork:
        """Start ``python WORDS``, that is ``-m MODULE ...`` or ``SCRIPT ...``, in a folder.

        What is printed does not go to the folder. All variables are given; those that PyTorch reads when it is imported
        have no effect.
        """
        self.started += 1
        return self._start(list(words), folder, env, Path(self.outputs.name, f"{self.started}.txt"))

    def _start(
        self, words: list[str], folder: Path, env: Mapping[str, str], out: Path, file_limit: int | None = None
    ) -> Fork:
        request = {"words": words, "folder": str(folder), "env": dict(env), "out": str(out), "file_limit": file_limit}
        return Fork(self, self.ask(**request), out)

    def run(self, words: list[str], folder: Path, env: Mapping[str, str] | None = None, module: str = "agent") -> str:
        """Start a command and wait for its end, which must be a success; returns what it printed."""
        return self.start(words, folder, env, module).end()


@functools.cache
def shared_forks() -> Forks:
    """The process that forks for all tests: it takes seconds to import everything."""
    forks = Forks().__enter__()
    atexit.register(forks.__exit__)
    return forks


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

    def end(self, code: int = 0) -> str:
        """Wait for its end, which must have this status; returns what it printed."""
        status = self.wait()
        assert status == code, (status, self.output)
        return self.output

    @property
    def output(self) -> str:
        return self.out.read_text()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
