"""Find out what of a run has not arrived on W&B. W&B's client does not tell: it ends without an error."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.tracking.api import ask, failures
from diffusion_core.messages import one_line

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

ARRIVES_WITHIN_S = 10.0
"""Seconds that the server may take to show what it has received."""

ASK_EVERY_S = 1.0
MOST_PICTURES = 1000
"""Number of pictures to ask for at once. At the end of a run, only its newest ones are looked for."""

QUERY = """
query RunArrival($entity: String!, $project: String!, $run: String!, $names: [String], $count: Int) {
    project(name: $project, entityName: $entity) { run(name: $run) {
        state historyLineCount historyKeys files(names: $names, first: $count) { edges { node { name } } }
    } }
}
"""


def pictures(run: Run) -> dict[str, Path]:
    """Return the pictures that processes of a run have logged on this machine, by their names on W&B, oldest first."""
    folders = Path(run.settings.sync_dir).parent.glob(f"*run-*-{run.id}/files")
    files = [(file, folder) for folder in folders for file in folder.glob("media/**/*.*")]
    files.sort(key=lambda found: found[0].stat().st_mtime)
    return {file.relative_to(folder).as_posix(): file for file, folder in files}


def send_lost_pictures(run: Run) -> None:
    """Send pictures of earlier processes of a run that W&B lacks, though it may have the rows that name them.

    Raises:
        Exception: one of :func:`agent.tracking.api.failures`, if W&B does not answer.
    """
    files = pictures(run)
    names = list(files)
    for start in range(0, len(names), MOST_PICTURES):
        some = names[start : start + MOST_PICTURES]
        arrived = _arrived(ask(run, QUERY, names=some, count=len(some)))
        for name in filter(lambda name: name not in arrived, some):
            run.save(str(files[name]), base_path=str(files[name]).removesuffix(name), policy="now")


def lacking(run: Run, last_step: int | None, rows: int | None = None) -> list[str]:
    """Return what W&B lacks of a run that was finished, in words; empty if nothing.

    Args:
        run: the run.
        last_step: step of its last row; None: it has none.
        rows: number of its rows, or None if that is unknown.
    """
    names = list(pictures(run))[-MOST_PICTURES:]
    end = time.monotonic() + ARRIVES_WITHIN_S
    while True:
        found = _lacking(run, last_step, rows, names)
        if not found or time.monotonic() > end:
            return found
        time.sleep(ASK_EVERY_S)


def _lacking(run: Run, last_step: int | None, rows: int | None, names: list[str]) -> list[str]:
    try:
        there = ask(run, QUERY, names=names or ["-"], count=max(1, len(names)))
    except failures() as error:
        return [f"an answer of the server ({one_line(error)})"]
    found = []
    at = (there["historyKeys"] or {}).get("lastStep", -1)
    if last_step is not None and at < last_step:
        found.append(f"history from step {at + 1} to {last_step}")
    elif rows is not None and (there["historyLineCount"] or 0) < rows:
        found.append(f"{rows - (there['historyLineCount'] or 0)} rows of history")
    if there["state"] == "running":
        found.append("the end of the run")
    if missing := set(names) - _arrived(there):
        found.append(f"{len(missing)} pictures")
    return found


def _arrived(there: Any) -> set[str]:
    return {edge["node"]["name"] for edge in there["files"]["edges"]}
