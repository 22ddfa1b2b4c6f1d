"""Compare ways of pruning on the built-in digits: a table of quality before and after fine-tuning, beside the cost.

  python scripts/compare_pruning.py --seeds 0,1,2 --keep 0.5,0.25 --out runs/pruning
  python scripts/compare_pruning.py --tables structured --steps 50 --tune-steps 20 --out runs/try     # a quick look
  python scripts/compare_pruning.py --tables depth,shares                     # blocks, channels; shares by sensitivity
  python scripts/compare_pruning.py --tables sparse --keep 0.1,0.05           # RigL, gradual pruning, random masks
  python scripts/compare_pruning.py --tables depth --out runs/mnist -- --preset=mnist      # knobs: other images

Writes for each table NAME.json and NAME.md; structured also NAME.png and NAME-ssim.png (quality against cost).
Stop it and run it again:
every training has a run folder below --out and is not repeated once it has a result. A figure that an older folder
lacks is measured with the stored networks.
"""

from __future__ import annotations

if __name__ == "__main__":
    from diffusion_core.signals import leave_at_once

    leave_at_once()  # Until main handles signals: the imports take seconds.

import argparse
from collections.abc import Callable, Sequence

from studies import runs, structured
from studies.command import at_least, numbers, parser_of, some_of, status_of
from studies.study import Study, check_settings

from agent.command import run_and_leave
from diffusion_core.config import split_argv
from diffusion_core.messages import seed_list

TABLES: dict[str, Callable[[Study], None]] = {
    "structured": structured.compare,
    "depth": runs.depth,
    "sparse": runs.sparse,
    "shares": runs.shares,
}
"""The function of each table: measures what is missing, and writes the table."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = parser_of(__doc__, "runs/pruning")
    parser.add_argument(
        "--tables", metavar="A,B,...", default="structured", help=f"of {', '.join(TABLES)} (structured)"
    )
    parser.add_argument("--seeds", type=seed_list, default=[0, 1, 2], metavar="A,B,...", help="training seeds (0,1,2)")
    parser.add_argument("--keep", default="0.5", metavar="A,B,...", help="kept shares of the MACs (0.5)")
    parser.add_argument("--steps", type=int, default=500, metavar="N", help="optimizer steps of a dense model (500)")
    parser.add_argument("--tune-steps", type=int, default=150, metavar="N", help="of fine-tuning (150)")
    parser.add_argument("--images", type=int, default=500, metavar="N", help="generated images per model (500)")
    parser.add_argument("knobs", nargs="*", metavar="--KNOB=VALUE", help="after --: knobs of all runs")
    arguments = parser.parse_args(argv)
    return status_of(lambda: compare(arguments), arguments.out)


def compare(arguments: argparse.Namespace) -> int:
    names = some_of("--tables", arguments.tables, list(TABLES), ",")
    between = "shares between 0 and 1, such as 0.5,0.25"
    study = Study(
        arguments.out,
        tuple(arguments.seeds),
        tuple(numbers("--keep", arguments.keep, float, lambda keep: 0.0 < keep < 1.0, between)),
        at_least("--steps", arguments.steps, 2),
        at_least("--tune-steps", arguments.tune_steps, 1),
        at_least("--images", arguments.images, 10),
        split_argv(arguments.knobs),
    )
    check_settings(study.folder, {"knobs": dict(study.knobs)})
    for name in names:
        TABLES[name](study)
    return 0


if __name__ == "__main__":
    run_and_leave(main, interruptible=True)
