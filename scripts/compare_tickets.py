"""Lottery tickets against their controls on the built-in digits: how good each is at 80%, 90% and 95% sparsity.

  python scripts/compare_tickets.py --seeds 0,1,2 --out runs/tickets-table

For each seed, and for weights ranked all together and by layer: a chain of rounds that each take 20.5% of what is left
(80% are gone after 7, 90% after 10, 95% after 13), and at each of these levels two controls, the ticket's mask over
weights drawn anew and a random mask with as many weights in each layer. Class agreement is the share of 500 generated
images in which a classifier of real digits sees the label that was asked for. Writes results.json, table.md and
plots. Stop it and run it again: finished rounds are kept, and the one that was stopped goes on.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agent.command import fail
from agent.config import TrialConfig, build_config
from agent.lottery import run_chain
from diffusion_core.config import ConfigError
from diffusion_core.data.datasets import load_data
from diffusion_core.files import write_json, write_text
from diffusion_core.tables import markdown_table, mean_and_range
from diffusion_core.tracking import NullTracker
from pruning.lottery.report import LABELS, Trained, plot_spread, read_stages

PER_ROUND = 0.2054
"""Close to the usual 20%, and 80%, 90% and 95% are whole numbers of rounds: 0.2 ** (1 / 7) is left of each."""

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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", default="0", metavar="A,B,...", help="seeds to train with (0)")
    parser.add_argument("--steps", type=int, default=500, metavar="N", help="optimizer steps a round (500)")
    parser.add_argument("--sparsities", default="80,90,95", metavar="A,B,...", help="levels in %% (80,90,95)")
    parser.add_argument("--per-round", type=float, default=PER_ROUND, metavar="P", help=f"share a round ({PER_ROUND})")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compare-tickets"), metavar="DIR", help="where it all goes"
    )
    arguments = parser.parse_args(argv)
    try:
        seeds = [int(word) for word in arguments.seeds.split(",")]
        levels = sorted(float(word) / 100.0 for word in arguments.sparsities.split(","))
        if not 0.0 < levels[0] <= levels[-1] < 1.0:
            raise ValueError
    except ValueError:
        return fail(
            f"--seeds = {arguments.seeds!r}, --sparsities = {arguments.sparsities!r}: expected integers such as 0,1,2, "
            "and percentages above 0 and below 100 such as 80,90,95"
        )
    try:
        compare(seeds, levels, arguments.steps, arguments.per_round, arguments.out)
    except ConfigError as error:
        return fail(str(error))
    return 0


def compare(seeds: Sequence[int], levels: Sequence[float], steps: int, per_round: float, folder: Path) -> None:
    """Train what is not trained yet, and write table and plots."""
    rounds = [max(1, round(math.log(1.0 - level) / math.log(1.0 - per_round))) for level in levels]
    chains: dict[str, list[list[Trained]]] = {}
    for scope in SCOPES:
        chains[scope] = []
        for seed in seeds:
            run = folder / f"{scope}-{steps}-{seed}"
            settings = FIXED | {"seed": seed, "train.steps": steps, "prune.per_round": per_round, "prune.scope": scope}
            train(settings, rounds, run)
            chains[scope].append(read_stages(run))
    described = {scope: [[asdict(stage) for stage in chain] for chain in chains[scope]] for scope in SCOPES}
    write_json(folder / "results.json", {"seeds": list(seeds), "steps": steps, "rounds": rounds, "chains": described})
    text = markdown(chains, rounds, seeds, steps)
    write_text(folder / "table.md", text)
    for key in LABELS:
        for scope, title in SCOPES.items():
            plot_spread(chains[scope], key, f"magnitude {title}", folder / f"{key.replace('/', '-')}-{scope}.png")
    print(text)


def train(settings: Mapping[str, Any], rounds: Sequence[int], run: Path) -> None:
    """A chain to the last level, and the controls at each; what is there already is skipped."""
    wanted = [(rounds[-1], "none"), *((number, control) for number in rounds for control in CONTROLS)]
    configs: list[TrialConfig] = [
        build_config(settings, {"prune.rounds": number, "prune.control": control, "log.dir": str(run)})
        for number, control in wanted
    ]
    dataset = load_data(configs[0].data)
    for config in configs:
        run_chain(config, NullTracker(), dataset=dataset, folder=run, run_id=run.name)


def markdown(
    chains: Mapping[str, Sequence[Sequence[Trained]]], rounds: Sequence[int], seeds: Sequence[int], steps: int
) -> str:
    """The table: mean over seeds, and range where there are several."""
    remaining = {stage.round_number: stage.remaining for stage in chains["global"][0] if stage.kind == "ticket"}
    lines = [
        f"{steps} optimizer steps a round, seeds {', '.join(map(str, seeds))} (mean, and range in brackets).",
        "",
    ]
    for key, label in LABELS.items():
        heads = [f"{1.0 - remaining[number]:.1%} pruned" for number in rounds]
        dense = spread(
            [stage.figures[key] for chain in chains["global"] for stage in chain if not stage.round_number], key
        )
        rows = [["dense", *[dense] * len(rounds)]]
        for scope, title in SCOPES.items():
            for kind in dict.fromkeys(stage.kind for stage in chains[scope][0]):
                cells = []
                for number in rounds:
                    shown = [s for chain in chains[scope] for s in chain if (s.kind, s.round_number) == (kind, number)]
                    cells.append(spread([stage.figures[key] for stage in shown], key))
                rows.append([f"{kind}, {title}", *cells])
        lines += [markdown_table([label, *heads], rows), ""]
    return "\n".join(lines)


def spread(values: Sequence[float], key: str) -> str:
    """Return mean and range of a figure; class agreement is in percent."""
    return mean_and_range(values, ".1%" if key == "eval/class_agreement" else ".4f")


if __name__ == "__main__":
    sys.exit(main())
