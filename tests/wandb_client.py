"""Processes with the real wandb client that talk to the test backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from forks import Fork, shared_forks
from server import Sweep, WandbServer

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 300


class Client:
    """Processes with the real client, in a directory of their own.

    Args:
        server: the server.
        directory: which programs run in.
        forked: whether ``interpreter``, which agents call as well, forks commands instead of starting Python. Leave it
            out where it matters which process has started which, what is imported, or how much memory it takes.
    """

    def __init__(self, server: WandbServer, directory: Path, *, forked: bool = True) -> None:
        self.server = server
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.interpreter = str(shared_forks().interpreter) if forked else sys.executable
        # Programs run in `directory`, and find this checkout's packages from there. Several run side by side.
        self.env = server.env(directory / "home") | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.env["PATH"] = os.pathsep.join([str(Path(self.interpreter).parent), self.env["PATH"]])

    def write(self, name: str, source: str) -> Path:
        path = self.directory / name
        path.write_text(textwrap.dedent(source))
        return path

    def popen(self, *command: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=self.directory,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def command(self, *command: str, **env: str) -> str:
        return finish(self.popen(*command, **env))

    def python(self, *words: str, code: int = 0, **env: str) -> str:
        """Run `python WORDS` in the directory to its end. Return what it printed."""
        return self.fork(*words, **env).end(code)

    def fork(self, *words: str, **env: str) -> Fork:
        """`python WORDS` in the directory, as a process that starts at once."""
        return shared_forks().python(words, self.directory, {**self.env, **env})

    def wandb(self, *arguments: str, **env: str) -> str:
        return self.command(self.interpreter, "-m", "wandb", *arguments, **env)

    def script(self, source: str, **env: str) -> Any:
        """Run a script; what it assigned to `result` (JSON values) comes back."""
        path = self.write("script.py", "import json\nresult = None\n" + textwrap.dedent(source))
        with path.open("a") as file:
            file.write("\njson.dump(result, open('result.json', 'w'))\n")
        self.command(self.interpreter, str(path), **env)
        return json.loads((self.directory / "result.json").read_text())

    def sweep(self, program: str, **config: Any) -> Sweep:
        """`wandb sweep` for a program given as source."""
        self.write("trial.py", program)
        path = self.directory / "sweep.yaml"  # JSON is YAML
        path.write_text(json.dumps({"program": "trial.py", **config}))
        before = set(self.server.sweeps)
        self.wandb("sweep", str(path))
        (sweep_id,) = set(self.server.sweeps) - before
        return self.server.sweeps[sweep_id]

    def agent(self, sweep: Sweep, *options: str) -> subprocess.Popen[str]:
        return self.popen(self.interpreter, "-m", "wandb", "agent", *options, f"tester/test/{sweep.id}")


def finish(process: subprocess.Popen[str], code: int = 0, within_s: float = TIMEOUT) -> str:
    try:
        output, _ = process.communicate(timeout=within_s)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        pytest.fail(f"{process.args!r} did not end:\n{output}")
    assert process.returncode == code, output
    return output
