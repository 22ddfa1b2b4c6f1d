"""``python -m agent.report``: write what a sweep, a chain of tickets or some runs found as one page.

The page is one file that loads nothing from elsewhere. ``--format md`` writes Markdown with PNG pictures instead.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from agent.command import fail, run_and_leave
from diffusion_core.config import ConfigError
from diffusion_core.machine.child import in_child
from diffusion_core.messages import Parser, out_file, reason_of
from diffusion_core.report.folders import complete, read_study
from diffusion_core.report.markdown import plot_front
from diffusion_core.report.page import write_page
from diffusion_core.report.study import Study
from diffusion_core.report.watching import FOLDER_SECONDS, SERVER_SECONDS, watch

NAME = "report.html"
FORMATS = ("html", "md")


def study_of(sources: Sequence[str], metric: str | None = None) -> Study:
    """Read folders, or a sweep or run on W&B, ``ENTITY/PROJECT/ID``.

    Raises:
        ConfigError: if there is no such thing, or no trial has the metric.
    """
    if _on_server(sources):
        from agent.tracking.environment import load_environment
        from agent.tracking.sweeps import study

        load_environment()
        return complete(study(sources[0]), metric)
    return read_study([Path(source) for source in sources], metric)


def _on_server(sources: Sequence[str]) -> bool:
    source = sources[0]
    return len(sources) == 1 and source.count("/") == 2 and all(source.split("/")) and not Path(source).exists()


def write_ended(source: Path | str, out: Path, *, plot: Path | None = None, forked: bool = True) -> None:
    """Write the report of a sweep or chain that has ended, and print its path. A failure is one line of warning.

    The page of a sweep on W&B is also logged to its best run.

    Args:
        source: what has ended: a folder, or ``ENTITY/PROJECT/ID``.
        out: the page.
        plot: PNG file for quality against cost, if that is wanted and both are known.
        forked: work in a child process, whose memory is freed at once.
    """

    def write() -> None:
        study = replace(study_of([str(source)]), running=False)
        write_page(study, out)
        if plot is not None:
            plot_front(study.without_secrets(), plot)
        if _on_server([str(source)]):
            from agent.tracking.reports import log_page

            try:
                log_page(str(source), study, out)
            except ConfigError as error:  # The page is there nevertheless.
                print(f"warning: {error}", file=sys.stderr)

    try:
        call = in_child if forked else lambda function: function()
        call(write)
    except Exception as error:
        print(f"warning: {str(out)!r}: no report: {reason_of(error)}", file=sys.stderr)
    else:
        print(f"report: {out}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 0, or 2 if there is nothing to report or it cannot be written."""
    parser = Parser("python -m agent.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="a folder of runs, a run, a sweep, a chain, or "
                        "several; or ENTITY/PROJECT/ID of a sweep or run on W&B")  # fmt: skip
    parser.add_argument("--out", type=out_file, metavar="FILE", help="default: report.html in the folder")
    parser.add_argument("--format", choices=FORMATS, help="html, or md: Markdown and PNG (default: as FILE ends)")
    parser.add_argument("--metric", metavar="NAME", help="figure to rank by (default: that of the sweep)")
    parser.add_argument("--wandb", action="store_true", help="for a sweep on W&B: also make a report there (needs the "
                        "extra `reports`), and log the HTML page to its best run")  # fmt: skip
    parser.add_argument("--watch", action="store_true", help="write it again as trials end, until none runs")
    given = parser.parse_args(argv)
    sources, on_server = given.sources, _on_server(given.sources)
    folder = Path(sources[0]) if len(sources) == 1 and not on_server else Path()
    out = given.out or (folder / NAME).with_suffix(f".{given.format or 'html'}")
    markdown = (given.format or out.suffix) in ("md", ".md")
    try:
        if given.wandb and (not on_server or markdown):
            raise ConfigError(
                f"--wandb: {sources[0]!r} is no sweep on W&B; expected ENTITY/PROJECT/ID, without --format md"
            )
        read = partial(study_of, sources, given.metric)
        write_page(study := read(), out, markdown=markdown)
        print(f"report: {out}", flush=True)
        if given.wandb:
            from agent.tracking.reports import publish

            publish(sources[0], study, out)
        if given.watch and study.running:
            watch(read, out, SERVER_SECONDS if on_server else FOLDER_SECONDS, markdown=markdown)
    except ConfigError as error:
        return fail(str(error))
    except OSError as error:
        return fail(f"--out = {str(out)!r}: {reason_of(error)}; choose another file")
    return 0


if __name__ == "__main__":
    run_and_leave(main)
