"""``python -m agent.report``: write what a sweep, a chain of tickets or some runs found as one page.

The page is one file that loads nothing from elsewhere: winner and uncertainty, quality against cost, all trials, learning
curves, which settings matter, and samples. ``--format md`` writes Markdown with PNG pictures instead.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from agent.command import fail, run_and_leave
from diffusion_core.config import ConfigError
from diffusion_core.machine.child import in_child
from diffusion_core.messages import Parser, reason_of
from diffusion_core.report.folders import complete, read_study
from diffusion_core.report.page import write_page
from diffusion_core.report.study import Study

NAME = "report.html"
FORMATS = {"html": ".html", "md": ".md"}
FOLDER_SECONDS, SERVER_SECONDS = 10.0, 60.0
"""Seconds between two looks with --watch: at folders, and at W&B."""


def study_of(sources: Sequence[str], metric: str | None = None) -> Study:
    """Read folders, or a sweep or run on W&B, ``ENTITY/PROJECT/ID``.

    Raises:
        ConfigError: if there is no such thing, or no trial has the metric.
    """
    if _on_server(sources):
        from agent.tracking.environment import load_environment  # PyTorch comes along.
        from agent.tracking.sweeps import study

        load_environment()
        return complete(study(sources[0]), metric)
    return read_study([Path(source) for source in sources], metric)


def _on_server(sources: Sequence[str]) -> bool:
    return (
        len(sources) == 1
        and sources[0].count("/") == 2
        and all(sources[0].split("/"))
        and not Path(sources[0]).exists()
    )


def write_ended(source: Path | str, out: Path, *, forked: bool = True) -> None:
    """Write the report of a sweep or a chain whose end the caller reports, and print its path.

    A failure is one line of warning: what was trained is there without a report.

    Args:
        source: its folder, or its path on W&B.
        out: the file to write.
        forked: work in a child process, whose memory is freed at once.
    """

    def write() -> None:
        write_page(replace(study_of([str(source)]), running=False), out)

    try:
        in_child(write) if forked else write()
    except Exception as error:
        print(f"warning: {str(out)!r}: no report: {reason_of(error)}", file=sys.stderr)
    else:
        print(f"report: {out}", flush=True)


def watch(read: Callable[[], Study], out: Path, seconds: float) -> None:
    """Write a report, and again whenever a trial has a new state or figure, until no trial runs any more."""
    written: object = None
    while True:
        study = read()
        now = study.running, [(trial.name, trial.state, dict(trial.figures)) for trial in study.trials]
        if now != written:
            write_page(study, out)
            written = now
        if not study.running:
            return
        time.sleep(seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 0, or 2 if there is nothing to report or it cannot be written."""
    parser = Parser("python -m agent.report", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="folders of runs, of one sweep or chain, or ENTITY/PROJECT/ID on W&B",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"file to write (default: {NAME} in the folder)")
    parser.add_argument("--format", choices=FORMATS, help="html, or md: Markdown and PNG (default: as FILE ends)")
    parser.add_argument("--metric", metavar="NAME", help="figure to rank by (default: that of the sweep)")
    parser.add_argument("--watch", action="store_true", help="write it again as trials end, until none runs")
    arguments = parser.parse_args(argv)
    sources, on_server = arguments.sources, _on_server(arguments.sources)
    place = Path(sources[0]) if len(sources) == 1 and not on_server else Path()
    out = arguments.out or (place / NAME).with_suffix(FORMATS[arguments.format or "html"])
    if out.suffix not in FORMATS.values() or arguments.format and out.suffix != FORMATS[arguments.format]:
        return fail(f"--out = {str(out)!r}: expected a name that ends in {FORMATS[arguments.format or 'html']}")
    try:
        study = study_of(sources, arguments.metric)
        write_page(study, out)
        print(f"report: {out}", flush=True)
        if arguments.watch:
            watch(lambda: study_of(sources, arguments.metric), out, SERVER_SECONDS if on_server else FOLDER_SECONDS)
    except ConfigError as error:
        return fail(str(error))
    except OSError as error:
        return fail(f"--out = {str(out)!r}: {reason_of(error)}; choose another file")
    return 0


if __name__ == "__main__":
    run_and_leave(main)
