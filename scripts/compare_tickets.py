"""Compare lottery tickets with their controls on the built-in digits at 80%, 90% and 95% sparsity.

  python scripts/compare_tickets.py --seeds 0,1,2 --out runs/tickets-table

For each seed, and for weights ranked globally and by layer: a chain of rounds that each prune 20.5% of the remaining
weights (80% are pruned after 7 rounds, 90% after 10, 95% after 13), and two controls at each level: the ticket's mask
over reinitialised weights, and a random mask with as many weights in each layer. Class agreement is the share of 500
generated images in which a classifier of real digits sees the requested label. Writes results.json, table.md and
plots. Stop it and run it again: finished rounds are kept, and the interrupted one continues.
"""

from __future__ import annotations

if __name__ == "__main__":
    from diffusion_core.signals import leave_at_once

    leave_at_once()  # Until main handles signals: the imports take seconds.

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from studies.command import numbers, parser_of, status_of
from studies.study import stoppable
from studies.table import write_table

from agent.command import run_and_leave
from agent.config import TrialConfig, build_config
from agent.lottery import run_chain
from diffusion_core.data.datasets import load_data
from diffusion_core.files import write_json
from diffusion_core.messages import seed_list, share
from diffusion_core.tables import markdown_table, mean_and_range
from diffusion_core.tracking import NullTracker
from pruning.lottery.report import LABELS, Trained, plot_spread, read_stages

PER_ROUND = 0.2054
"""Close to the usual 20%, and 80%, 90% and 95% are whole numbers of rounds: each keeps 0.2 ** (1 / 7)."""

SCOPES = {"global": "ranked together", "layer": "ranked by layer"}
CONTROLS = ("reinit", "random_mask")
FIXED: dict[str, Any] = {
    "preset": "digits",
    "train.device": "cpu",
    "log.progress": False,
    "sample.every": 0,
    "sample.per_class": 1,
    "eval.every": 0,
    "eval.num_images": 500,
    "checkpoint.every": 0,
    "checkpoint.upload": False,
    "prune.method": "lottery",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = parser_of(__doc__, "runs/compare-tickets")
    parser.add_argument("--seeds", type=seed_list, default=[0], metavar="A,B,...", help="training seeds (0)")
    parser.add_argument("--steps", type=int, default=500, metavar="N", help="optimizer steps per round (500)")
    parser.add_argument("--sparsities", default="80,90,95", metavar="A,B,...", help="levels in %% (80,90,95)")
    parser.add_argument("--per-round", type=share, default=PER_ROUND, metavar="P", help=f"pruned share ({PER_ROUND})")
    arguments = parser.parse_args(argv)
    return status_of(lambda: compare(arguments), arguments.out)


def compare(arguments: argparse.Namespace) -> int:
    """Train what is missing, and write table and plots."""
    folder: Path = arguments.out
    seeds, steps, per_round = arguments.seeds, arguments.steps, arguments.per_round
    expected = "percentages above 0 and below 100, such as 80,90,95"
    levels = numbers("--sparsities", arguments.sparsities, float, lambda level: 0.0 < level < 100.0, expected)
    rounds = [max(1, round(math.log(1.0 - level / 100.0) / math.log(1.0 - per_round))) for level in sorted(levels)]
    chains: dict[str, list[list[Trained]]] = {scope: [] for scope in SCOPES}
    for scope in SCOPES:
        for seed in seeds:
            run = folder / f"{scope}-{steps}-{seed}"
            settings = FIXED | {"seed": seed, "train.steps": steps, "prune.per_round": per_round, "prune.scope": scope}
            train(settings, rounds, run)
            chains[scope].append(read_stages(run))
    described = {scope: [[asdict(stage) for stage in chain] for chain in chains[scope]] for scope in SCOPES}
    write_json(folder / "results.json", {"seeds": seeds, "steps": steps, "rounds": rounds, "chains": described})
    for key in LABELS:
        for scope, title in SCOPES.items():
            plot_spread(chains[scope], key, f"magnitude {title}", folder / f"{key.replace('/', '-')}-{scope}.png")
    write_table(folder / "table.md", table_lines(chains, rounds, seeds, steps))
    return 0


def train(settings: Mapping[str, Any], rounds: Sequence[int], run: Path) -> None:
    """Train a chain to the last level, and the controls at each level; skip finished rounds."""
    wanted = [(rounds[-1], "none"), *((number, control) for number in rounds for control in CONTROLS)]
    configs: list[TrialConfig] = [
        build_config(settings, {"prune.rounds": number, "prune.control": control, "log.dir": str(run)})
        for number, control in wanted
    ]
    dataset = load_data(configs[0].data)
    for config in configs:
        with stoppable() as stop:
            run_chain(config, NullTracker(), dataset=dataset, folder=run, run_id=run.name, stop=stop)


def table_lines(
    chains: Mapping[str, Sequence[Sequence[Trained]]], rounds: Sequence[int], seeds: Sequence[int], steps: int
) -> list[str]:
    """Return a table per figure: a row per method, a column per level, mean and range over the seeds."""
    remaining = {stage.round_number: stage.remaining for stage in chains["global"][0] if stage.kind == "ticket"}
    levels = [f"{1.0 - remaining[number]:.1%} pruned" for number in rounds]
    lines = [f"{steps} optimizer steps a round, seeds {', '.join(map(str, seeds))} (mean, and range in brackets).", ""]
    for key, label in LABELS.items():
        form = ".1%" if key == "eval/class_agreement" else ".4f"

        def cell(scope: str, number: int, kind: str, key: str = key, form: str = form) -> str:
            stages = [stage for chain in chains[scope] for stage in chain]
            shown = [stage.figures[key] for stage in stages if (stage.kind, stage.round_number) == (kind, number)]
            return mean_and_range(shown, form)

        rows = [["dense", *[cell("global", 0, "ticket")] * len(rounds)]]
        for scope, title in SCOPES.items():
            for kind in dict.fromkeys(stage.kind for stage in chains[scope][0]):
                rows.append([f"{kind}, {title}", *(cell(scope, number, kind) for number in rounds)])
        lines += [*markdown_table([label, *levels], rows), ""]
    return lines


if __name__ == "__main__":
    run_and_leave(main, interruptible=True)
