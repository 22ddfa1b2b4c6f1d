"""`python` for programs that start processes themselves, as agents do: it runs as a fork, which starts at once.

This process is what the program sees: it has the words, variables and output, passes signals on, ends as the fork does,
and the fork ends when it is killed. The fork is no child of it, though: programs that look for processes above or below
need a real one. Commands other than ours and W&B's start Python itself.

The folder of this file holds the name of the real one in ``real``; the file next to it is the server's socket.
"""

import array
import json
import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
COMMANDS = ("agent", "wandb", "accelerate", "diffusion_core")


def is_ours(words: list[str]) -> bool:
    """Whether a command line is ``-m MODULE ...`` or ``SCRIPT.py ...``, perhaps after ``-u``."""
    words = words[1:] if words[:1] == ["-u"] else words
    if words[:1] == ["-m"]:
        return len(words) > 1 and words[1].partition(".")[0] in COMMANDS
    return bool(words) and words[0].endswith(".py")


def main() -> None:
    words = sys.argv[1:]
    folder = os.path.dirname(os.path.abspath(sys.argv[0]))
    if not is_ours(words):
        with open(os.path.join(folder, "real")) as file:
            real = file.read()
        os.execv(real, [real, *words])

    fork = 0
    early: list[int] = []

    def pass_on(number: int, _: object) -> None:
        if fork:
            try:
                os.kill(fork, number)
            except ProcessLookupError:
                return  # It has just ended.
        else:
            early.append(number)

    ignored = [number for number in PASSED_ON if signal.getsignal(number) == signal.SIG_IGN]
    for number in PASSED_ON:
        if number not in ignored:
            signal.signal(number, pass_on)

    server = socket.socket(socket.AF_UNIX)
    server.connect(os.path.join(folder, "socket"))
    request = {
        "words": words,
        "folder": os.getcwd(),
        "env": dict(os.environ),
        "ignored": ignored,
        "interpreter": os.path.abspath(sys.argv[0]),
    }
    descriptors = array.array("i", [0, 1, 2])
    server.sendmsg([b"!"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
    answers = server.makefile("rw")
    answers.write(json.dumps(request) + "\n")
    answers.flush()
    fork = int(answers.readline())
    for caught in early:
        pass_on(caught, None)
    status = int(answers.readline())
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main()
