"""Compare ways of pruning on the built-in digits: a table of quality before and after fine-tuning, beside the cost.

  python scripts/compare_pruning.py --seeds 0,1,2 --keep 0.5,0.25 --out runs/pruning
  python scripts/compare_pruning.py --tables structured --steps 50 --tune-steps 20 --out runs/try     # a quick look

Writes, for each table, NAME.json, NAME.md, NAME.png and NAME-ssim.png (quality against cost). Stop it and run it again:
every training is a run of its own below --out, and is not repeated once its result is there. A figure that an older
folder lacks is measured on the networks that it holds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from studies import structured
from studies.study import Study

from diffusion_core.config import ConfigError

T = TypeVar("T", int, float)

TABLES: dict[str, Callable[[Study], None]] = {"structured": structured.compare}
"""Each table's function: measures what is missing, and writes the table."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tables", default=",".join(TABLES), metavar="A,B,...", help=f"of {', '.join(TABLES)} (all)")
    parser.add_argument("--seeds", default="0,1,2", metavar="A,B,...", help="seeds to train with (0,1,2)")
    parser.add_argument("--keep", default="0.5", metavar="A,B,...", help="shares of the MACs that stay (0.5)")
    parser.add_argument("--steps", type=int, default=500, metavar="N", help="optimizer steps of a dense model (500)")
    parser.add_argument("--tune-steps", type=int, default=150, metavar="N", help="of a fine-tuning (150)")
    parser.add_argument("--images", type=int, default=500, metavar="N", help="images judged a model (500)")
    parser.add_argument("--out", type=Path, default=Path("runs/pruning"), metavar="DIR", help="where it all goes")
    arguments = parser.parse_args(argv)
    names = arguments.tables.split(",")
    seeds, keeps = numbers(arguments.seeds, int), numbers(arguments.keep, float)
    wrong = [
        f"--tables = {arguments.tables!r}: expected some of {', '.join(TABLES)}" if set(names) - set(TABLES) else None,
        f"--seeds = {arguments.seeds!r}: expected integers >= 0, such as 0,1,2" if min(seeds) < 0 else None,
        f"--keep = {arguments.keep!r}: expected shares between 0 and 1, such as 0.5,0.25"
        if not 0.0 < min(keeps) <= max(keeps) < 1.0
        else None,
        *(
            f"--{name.replace('_', '-')} = {getattr(arguments, name)}: expected an integer >= {least}"
            for name, least in (("steps", 2), ("tune_steps", 1), ("images", 10))
            if getattr(arguments, name) < least
        ),
    ]
    for problem in filter(None, wrong):
        print(f"error: {problem}", file=sys.stderr)
        return 2
    study = Study(arguments.out, seeds, keeps, arguments.steps, arguments.tune_steps, arguments.images)
    try:
        for name in names:
            TABLES[name](study)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def numbers(text: str, kind: Callable[[str], T]) -> tuple[T, ...]:
    """What stands between commas; where that is no number, one that is out of every range."""
    try:
        return tuple(kind(word) for word in text.split(","))
    except ValueError:
        return (kind("-1"),)


if __name__ == "__main__":
    sys.exit(main())
