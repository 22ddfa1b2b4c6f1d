"""Call a function in a short-lived child process. Memory of its imports is freed when the child exits."""

from __future__ import annotations

import io
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from typing import TypeVar

from diffusion_core.machine.processes import end_with_parent
from diffusion_core.messages import one_line
from diffusion_core.signals import ignore_interrupts

T = TypeVar("T")


class ChildDied(RuntimeError):
    """A child process ended without an answer."""


def in_child(function: Callable[[], T]) -> T:
    """Call a function in a fork of this process. What it prints, this process prints when the child has ended.

    The child ends with this process, also if that is killed. No other thread of this process may hold a lock that the
    function needs.

    Returns:
        What the function returns, which is pickled.

    Raises:
        ChildDied: if the child ended without an answer, for example because the system killed it, or if its answer
            cannot be pickled.
        Exception: whatever the function raises.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with suppress(BaseException):
            _answer(function, writing, parent)
        os._exit(1)
    os.close(writing)
    try:
        with open(reading, "rb") as pipe:
            answer = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException:  # An interrupt: nobody waits for the answer.
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    if status != 0:
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        raise ChildDied(f"a child process of {os.path.basename(sys.argv[0])} ended with {how}; is there enough memory?")
    result, error, printed, warned = pickle.loads(answer)
    sys.stdout.write(printed)
    sys.stdout.flush()
    sys.stderr.write(warned)
    if error is not None:
        raise error
    return result


def _answer(function: Callable[[], T], pipe: int, parent: int) -> None:
    """Call the function in the child, write the answer, and exit."""
    ignore_interrupts()
    end_with_parent(parent, signal.SIGKILL)
    result: T | None = None
    error: BaseException | None = None
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            result = function()
        except Exception as raised:
            error = raised
            error.add_note("".join(traceback.format_exception(raised)))
    try:
        content = pickle.dumps((result, error, out.getvalue(), err.getvalue()))
        pickle.loads(content)
    except Exception as failed:
        reason = one_line(failed) if error is None else "".join(traceback.format_exception(error))
        content = pickle.dumps((None, ChildDied(f"no answer from a child process: {reason}"), "", ""))
    with open(pipe, "wb") as file:
        file.write(content)
    os._exit(0)
