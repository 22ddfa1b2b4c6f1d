"""The file of a checkpoint's evaluations, beside it: their figures and how these were measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusion_core.data.datasets import DataError
from diffusion_core.evaluation.suite import Judgement
from diffusion_core.files import new_file, write_json
from diffusion_core.messages import listed, why_unwritable
from diffusion_core.tables import text_table
from diffusion_core.terminal.progress import say
from diffusion_core.tracking import STEP

EVALUATION_FILE = "evaluation.json"
OF_IMAGES = "sample/"
"""Prefix of the names of figures that say what it costs to sample an image."""


def merged(file: Path, found: Judgement, step: int) -> Judgement:
    """Return the figures that a file has of a checkpoint, and those of its newest evaluation in place of older ones.

    The file of another step is passed over. So is a damaged one, in one line.

    Args:
        file: where earlier evaluations were written; it need not exist.
        found: the newest evaluation.
        step: step of the checkpoint.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        before, of_step = _checked(content), content.get(STEP, step)
    except FileNotFoundError:
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        say(f"{file}: damaged; it is replaced, with the figures of this evaluation only")
        return found
    if of_step != step:
        return found
    # Files of earlier versions do not say which sampling their costs are of.
    kept = {
        name: value
        for name, value in before.figures.items()
        if name in before.protocols or not name.startswith(OF_IMAGES)
    }
    lines = {name: line for name, line in before.protocols.items() if name in kept and name not in found.figures}
    return Judgement(kept | found.figures, lines | found.protocols)


def _checked(content: Any) -> Judgement:
    """Return figures and protocols that were read from a file; an error says that they are none."""
    figures, protocols = dict(content["figures"]), dict(content["protocols"])
    if not all(isinstance(value, int | float) for value in figures.values()):
        raise ValueError("a figure that is no number")
    if not all(isinstance(line, str) for line in protocols.values()):
        raise ValueError("a protocol that is no text")
    return Judgement(figures, protocols)


def check_place(checkpoint: Path) -> None:
    """Check that the file of a checkpoint's evaluations can be written, before they are measured.

    Raises:
        DataError: if not.
    """
    file = checkpoint / EVALUATION_FILE
    if reason := why_unwritable(file, checkpoint):
        raise DataError(f"--json = {str(file)!r}: {reason}; choose another file")


def show(found: Judgement) -> None:
    """Print figures as a table, and protocols below it."""
    print(text_table(["figure", "value"], [[name, f"{value:.6g}"] for name, value in found.figures.items()]))
    for line in dict.fromkeys(found.protocols.values()):
        names = [name for name, other in found.protocols.items() if other == line]
        print(f"\n{listed(names, 3)}:\n  {line}")


def write(file: Path, found: Judgement, step: int | None) -> None:
    """Write figures and protocols as JSON, with the step of the checkpoint if they are of one.

    Raises:
        UserError: if the file cannot be written.
    """
    of_checkpoint = {} if step is None else {STEP: step}
    with new_file(file, "--json") as temporary:
        write_json(temporary, {**of_checkpoint, "figures": found.figures, "protocols": found.protocols})
    print(f"\nwritten to {file}")
