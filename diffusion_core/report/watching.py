"""Keep a report up to date while trials run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from diffusion_core.report.page import write_page
from diffusion_core.report.study import Study

FOLDER_SECONDS, SERVER_SECONDS = 10.0, 60.0
"""Seconds between two looks at folders, and at W&B."""


def watch(read: Callable[[], Study], out: Path, seconds: float, *, markdown: bool = False) -> None:
    """Write a report, and again whenever a trial has a new state or figure, until no trial runs any more.

    Args:
        read: returns the study as it is now.
        out: the file to write.
        seconds: time between two looks.
        markdown: write Markdown instead of HTML.
    """
    written: object = None
    while True:
        study = read()
        now = study.running, [(trial.name, trial.state, dict(trial.figures)) for trial in study.trials]
        if now != written:
            write_page(study, out, markdown=markdown)
            written = now
        if not study.running:
            return
        time.sleep(seconds)
