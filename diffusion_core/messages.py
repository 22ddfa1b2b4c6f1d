"""Words for messages: errors in one line and without secrets, lengths of time, sizes."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NoReturn

from diffusion_core import __version__
from diffusion_core.redact import redact
from diffusion_core.terminal.wrapping import filled, width_of_terminal, wrapped

MOST_CHARACTERS = 300


class UserError(ValueError):
    """An error whose text is for the user. The text names wrong values, but shows no secrets."""

    def __str__(self) -> str:
        return redact(super().__str__())


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help that fits the terminal, also its description, whose examples stay lines of their own."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=width_of_terminal())

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return wrapped(text, width)

    def _split_lines(self, text: str, width: int) -> list[str]:
        """Wrap what an option does; a word in quotes stays in one line."""
        whole = QUOTED.sub(lambda word: word[0].replace(" ", NO_BREAK), " ".join(text.split()))
        return [line.replace(NO_BREAK, " ") for line in filled(whole, width, "")]


QUOTED = re.compile(r"(?<!\w)'[^']*'(?!\w)")
NO_BREAK = "\N{NO-BREAK SPACE}"


class Parser(argparse.ArgumentParser):
    """A parser of the command line: its help fits the terminal, and its errors are one line without secrets.

    Takes the arguments of ``argparse.ArgumentParser``. Options are never abbreviated.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named | {"formatter_class": HelpFormatter, "allow_abbrev": False})
        self.add_argument("--version", action="version", version=VERSION, help="print the version and exit")

    def error(self, message: str) -> NoReturn:
        """Print the message in one line, as all other errors, and exit with status 2."""
        self.exit(2, f"error: {redact(self._in_our_words(message))}\n")

    def _in_our_words(self, message: str) -> str:
        """Return an error of argparse as ``KEY = VALUE: what is wrong; what to do``."""
        unknown, _, word = message.partition("unrecognized arguments: ")
        if word and not unknown:
            word = word.split()[0]
            near = suggested(word, self._option_string_actions) if word.startswith("-") else ""
            return f"{word}: unknown {'option' if word[0] == '-' else 'word'}; {near or '--help lists all options'}"
        for pattern, words in OUR_WORDS:
            message = re.sub(pattern, words, message)
        return message


def joined(words: Sequence[str], option: str) -> list[str]:
    """Return words with the one after an option joined to it: argparse takes ``--partition=gpu`` for an option."""
    found: list[str] = []
    for word in words:
        if found and found[-1] == option:
            found[-1] = f"{option}={word}"
        else:
            found.append(word)
    return found


def positive(text: str) -> int:
    """Parse an integer >= 1; raises argparse.ArgumentTypeError, which argparse reports."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer >= 1")
    return int(text)


def seed(text: str) -> int:
    """Parse a seed, an integer from 0 to 2**63 - 1 as the knob ``seed``, as :func:`positive` does."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer >= 0 and < {2**63}")
    return int(text)


def seed_list(text: str) -> list[int]:
    """Parse seeds with commas between them, as :func:`seed` parses one."""
    return [seed(word.strip()) for word in text.split(",")]


def two_seeds(text: str) -> tuple[int, int]:
    """Parse two seeds with a comma between them."""
    found = seed_list(text)
    if len(found) != 2:
        raise argparse.ArgumentTypeError(f"{text!r}: expected two seeds, such as 0,1")
    return found[0], found[1]


def share(text: str) -> float:
    """Parse a number above 0 and below 1, as :func:`positive` does."""
    try:
        if 0.0 < float(text) < 1.0:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number > 0 and < 1")


def nonempty(text: str) -> str:
    """Parse a word that is not empty, as :func:`positive` does."""
    if not text:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a word that is not empty")
    return text


def out_folder(text: str) -> Path:
    """Parse the path of a folder that can be written, and made if it is missing, as :func:`positive` does."""
    return _out_place(text, "folder")


def out_file(text: str) -> Path:
    """Parse the path of a file that can be written, and its folder made if it is missing, as :func:`positive` does."""
    if os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a file; a folder has this name")
    return _out_place(text, "file")


def _out_place(text: str, kind: str) -> Path:
    path = Path(text)
    folders = [path, *path.parents] if kind == "folder" else path.parents
    nearest = next((folder for folder in folders if os.path.exists(folder)), path)
    if not text or (os.path.exists(nearest) and not os.path.isdir(nearest)):
        reason = f"; a file has the name {str(nearest)!r}" if text else ""
        raise argparse.ArgumentTypeError(f"{text!r}: expected a {kind}{reason}")
    if reason := why_unwritable(path, nearest):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a {kind} that can be written ({reason})")
    return path


def why_unwritable(path: Path, folder: Path) -> str:
    """Return why nothing can be written at ``path`` in ``folder``, which exists; empty if something can.

    Permissions do not tell: a disk may be read-only, and an administrator has all permissions. So a file without a name
    is made in the folder.
    """
    try:
        with suppress(FileNotFoundError):
            path.stat()  # Its name may be too long.
        with TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return reason_of(error)


VERSION = f"diffusion-sweeps {__version__}"

OUR_WORDS = (
    (r"^argument (\S+): invalid choice: (.*) \(choose from (.*)\)$", r"\1 = \2: expected one of \3"),
    (r"^argument (\S+): invalid int value: (.*)$", r"\1 = \2: expected an integer"),
    (r"^argument (\S+): invalid float value: (.*)$", r"\1 = \2: expected a number"),
    (r"^argument (\S+): ('.*'): (expected .*)$", r"\1 = \2: \3"),
    (r"^argument (\S+): (.*)$", r"\1: \2"),
    (r"^the following arguments are required: (.*)$", r"\1: needed; --help describes it"),
    (r"^one of the arguments (.*) is required$", r"\1: one of them is needed; --help describes them"),
)
"""Errors of argparse, by pattern, and how this project says them."""


def suggested(word: str, known: Iterable[str]) -> str:
    """Return the question whether another word was meant; empty if none is near."""
    # Hyphens hide how near words are, as in --dryrun.
    spelled = {one.replace("-", "").replace("_", ""): one for one in known}
    near = difflib.get_close_matches(word.replace("-", "").replace("_", ""), spelled, n=1, cutoff=0.7)
    return f"did you mean {spelled[near[0]]}?" if near else ""


def one_line(error: object) -> str:
    """Return an error's text in one line of at most ``MOST_CHARACTERS``, without secrets; its type without a text."""
    return redact(" ".join(str(error).split()))[:MOST_CHARACTERS] or type(error).__name__


def reason_of(error: BaseException) -> str:
    """Return why an operation failed: the system's words for an ``OSError``, else the error in one line."""
    return (isinstance(error, OSError) and error.strerror) or one_line(error)


def shortened(value: object) -> str:
    """Return a value for a message, without secrets and cut to ``MOST_CHARACTERS``."""
    text = redact(repr(value))
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."


def printable(text: str) -> str:
    """Escape the characters of a name that a terminal cannot show on one line."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def listed(words: Iterable[str], most: int) -> str:
    """Return words with commas between them, and the number of those after the first ``most``."""
    known = list(words)
    return ", ".join(known[:most]) + (f" and {len(known) - most:,} more" if len(known) > most else "")


def counted(number: int, what: str) -> str:
    """Return a number and what it counts, whose plural takes an s: ``1 image``, ``1,200 images``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a length of time in words: ``34 s``, ``5 min``, ``7.5 h``, ``12 days``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 100 * 3600 else f"{seconds / 86400:,.0f} days"


def size_in_words(number: float) -> str:
    """Return bytes in words: ``12 MB``, ``3.4 GB``."""
    for unit in ("kB", "MB", "GB"):
        number /= 1000
        if number < 1000:
            return f"{number:.3g} {unit}"
    return f"{number / 1000:,.3g} TB"
