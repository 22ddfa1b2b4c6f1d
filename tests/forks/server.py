"""The process that forks whenever it is asked to: by the tests on its standard input, by `python.py` on a socket."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

LIBRARIES = (
    "sklearn.datasets",
    "torch._dynamo",
    "wandb",
    "wandb.apis.public",
    "wandb.cli.beta",
    "wandb.sdk.launch",
    "wandb.sdk.wandb_sweep",
    "wandb.wandb_agent",
    "matplotlib.pyplot",
    "plotly.graph_objects",
    "detect_secrets.core.plugins.util",
    "detect_secrets.core.scan",
    "sweeps",
    "accelerate.commands.launch",
    "torch.distributed.run",
    "torchvision.datasets",
)
COMMANDS = ("agent.clean", "agent.leaderboard", "agent.report", "agent.sync", "diffusion_core.machine.job")
"""What ``python -m`` runs, which is imported then."""


def import_everything() -> None:
    """Import what takes time in the commands that tests start."""
    import gc
    import importlib
    import pkgutil

    import agent
    import diffusion_core
    import pruning

    for name in LIBRARIES:
        importlib.import_module(name)
    for package in (agent, diffusion_core, pruning):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name not in COMMANDS and not module.name.endswith("__main__"):
                importlib.import_module(module.name)

    # A collection in a fork looks at, and thereby copies, whatever was made before: half a second for each.
    gc.collect()
    gc.freeze()


@dataclass
class Server:
    """Forks, and those that wait for them.

    Attributes:
        listener: the socket that `python.py` asks on.
        waiting: what to wait for: a request of the tests, a new connection, the end of one, the end of a fork.
        running: file descriptors of the forks that run, by their process id.
        ended: exit statuses.
        askers: connections of those who asked for a fork, by its process id.
    """

    listener: socket.socket
    waiting: selectors.PollSelector = field(default_factory=selectors.PollSelector)
    running: dict[int, int] = field(default_factory=dict)
    ended: dict[int, int] = field(default_factory=dict)
    askers: dict[int, socket.socket] = field(default_factory=dict)

    def serve(self) -> None:
        """Answer until there are no more tests."""
        self.waiting.register(sys.stdin, selectors.EVENT_READ)
        self.waiting.register(self.listener, selectors.EVENT_READ)
        while True:
            for key, _ in self.waiting.select():
                if key.fd == sys.stdin.fileno():
                    line = sys.stdin.readline()
                    if not line:
                        return
                    print(json.dumps(self.answer(json.loads(line))), flush=True)
                elif key.fileobj is self.listener:
                    self.accept()
                elif key.fd == self.running.get(key.data):
                    self.note_end(key.data)
                elif key.data in self.running:  # Who asked for this fork was killed.
                    self.waiting.unregister(self.askers[key.data])
                    os.kill(key.data, signal.SIGKILL)

    def answer(self, request: dict[str, Any]) -> Any:
        """Answer the tests: the process id of a fork, or the exit status of one that has ended."""
        if "ready" in request:
            return True
        if "poll" not in request:
            return self.fork(request)
        pid = request["poll"]
        if pid in self.running and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self.note_end(pid)
        return self.ended.get(pid)

    def accept(self) -> None:
        """Fork for a `python.py`: it hands over its standard input, output and error."""
        connection, _ = self.listener.accept()
        _, descriptors, _, _ = socket.recv_fds(connection, 1, 3)
        with connection.makefile() as lines:
            request = lines.readline()
        if not request.endswith("\n"):  # It was killed before it had asked.
            connection.close()
        else:
            pid = self.fork({**json.loads(request), "descriptors": descriptors})
            self.askers[pid] = connection
            self.waiting.register(connection, selectors.EVENT_READ, pid)
            self.tell(pid, pid)
        for descriptor in descriptors:
            os.close(descriptor)

    def tell(self, pid: int, number: int) -> None:
        """Write a number to who asked for a fork."""
        with contextlib.suppress(OSError):  # It is gone, which is seen next.
            self.askers[pid].sendall(f"{number}\n".encode())

    def fork(self, request: dict[str, Any]) -> int:
        """Fork a command. Return its process id."""
        pid = os.fork()
        if pid == 0:
            self.listener.close()
            for connection in self.askers.values():
                connection.close()
            for descriptor in self.running.values():
                os.close(descriptor)
            run_and_leave(request)
        self.running[pid] = os.pidfd_open(pid)
        self.waiting.register(self.running[pid], selectors.EVENT_READ, pid)
        return pid

    def note_end(self, pid: int) -> None:
        """Keep the exit status of a fork that has ended, and tell who asked for it."""
        descriptor = self.running.pop(pid)
        self.waiting.unregister(descriptor)
        os.close(descriptor)
        _, status = os.waitpid(pid, 0)
        self.ended[pid] = os.waitstatus_to_exitcode(status)
        asker = self.askers.get(pid)
        if asker is not None:
            self.tell(pid, self.ended[pid])
            if asker in self.waiting.get_map():
                self.waiting.unregister(asker)
            self.askers.pop(pid).close()


def run_and_leave(request: dict[str, Any]) -> NoReturn:
    """Run a command in a process that was just forked; do not tear down the interpreter, which takes a second."""
    status: int | None = None

    def leave() -> None:  # Handlers run in reverse order: this one after all of the command's.
        if status is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    atexit.register(leave)
    try:
        become(**request)
        status = 0
    except SystemExit as leaving:
        if isinstance(leaving.code, int | None):
            status = leaving.code or 0
        else:
            print(leaving.code, file=sys.stderr)
            status = 1
    except Exception:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.exit(status)


def become(
    words: list[str],
    folder: str,
    env: dict[str, str],
    out: str = "",
    file_limit: int | None = None,
    descriptors: list[int] | None = None,
    ignored: list[int] | None = None,
    interpreter: str = sys.executable,
) -> None:
    """Make of a process that was just forked what ``python WORDS`` would be in a folder, and run it.

    Args:
        words: of the command line.
        folder: the working directory.
        env: all variables.
        out: file that output and errors go to.
        file_limit: bytes that a file may have.
        descriptors: of input, output and errors, in place of ``out``.
        ignored: signals that whoever starts it ignores.
        interpreter: what this process calls to start another ``python``.
    """
    os.setsid()
    if descriptors is None:
        output = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        descriptors = [os.open(os.devnull, os.O_RDONLY), output, output]
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    for descriptor in set(descriptors):
        os.close(descriptor)
    for number in ignored or []:
        signal.signal(number, signal.SIG_IGN)
    sys.executable = interpreter
    if words[0] == "-u":
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        words = words[1:]
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit,) * 2)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    own = folder if words[0] == "-m" else str(Path(words[0]).parent)
    sys.path[:] = [own, *env.get("PYTHONPATH", "").split(os.pathsep), *sys.path[1:]]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def main() -> None:
    """Serve in the folder of `python.py`."""
    import_everything()
    here = Path.cwd()
    os.chdir(sys.argv[1])  # The name of a socket may not be long.
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("socket")
    listener.listen(64)
    os.chdir(here)
    server = Server(listener)
    server.serve()
    for pid in server.running:  # Of a test that failed.
        os.kill(pid, signal.SIGKILL)
    os._exit(0)  # To free, object by object, what was imported takes a second.


if __name__ == "__main__":
    main()
