"""Find lottery tickets in a diffusion model: train, prune the smallest weights, rewind, and train again."""

from __future__ import annotations

if __name__ == "__main__":
    from diffusion_core.signals import leave_at_once, remember_if_handed_out

    remember_if_handed_out()
    leave_at_once()  # Until main handles signals: the imports take seconds.

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from agent.__main__ import main as run_trial
from agent.command import fail, run_and_leave
from diffusion_core.checkpoint import CheckpointError
from diffusion_core.choice import announce, choose
from diffusion_core.config import ConfigError, split_argv
from diffusion_core.messages import Parser, out_folder
from pruning.lottery.report import plot_overlap, ticket_masks
from pruning.masks.mask import MASKS_PART

USAGE = """\
usage: python scripts/lottery_ticket.py --out DIR [--KNOB=VALUE ...]
       python scripts/lottery_ticket.py --overlap TICKET TICKET --out DIR

A dense network holds small subnetworks, winning tickets, that train as well from where the dense one started (Frankle &
Carbin 2019; in diffusion models, Jiang et al. 2023). They are found by iterative magnitude pruning. Round 0 trains the
dense network. Every further round takes the smallest 20% of what is left away, goes back to the weights of step
prune.rewind_step (with averages, optimizer, learning rate and order of the data as they were then), and trains to
train.steps again. After 35 rounds 0.04% of the weights are left; after 8, 17%.

  python scripts/lottery_ticket.py --preset=digits --prune.rounds=8 --out runs/tickets        about five minutes
  python scripts/lottery_ticket.py --preset=digits --prune.rounds=8 --out runs/tickets --prune.control=reinit
  python scripts/lottery_ticket.py --preset=digits --prune.rounds=8 --out runs/tickets --prune.control=random_mask
  python scripts/lottery_ticket.py --preset=cifar10 --prune.rewind_step=2000 --out runs/cifar-tickets  for GPUs

The controls train, in place of the last ticket, its mask over weights drawn anew, or a random mask over its weights: a
ticket wins if it beats both. In the folder of a chain they find its rounds finished and train the last one alone.

  --prune.rounds=1 --prune.per_round=0.8       one shot: 80% at once
  --prune.rewind_step=100                      larger networks need some steps before there is a ticket
  --prune.scope=layer [--prune.profile=erk]    rank each layer by itself: at 95%, ranking all together empties layers
  python scripts/lottery_ticket.py --overlap runs/tickets/rounds/08 runs/other/rounds/08 --out runs/overlap
                                               which weights two tickets share, by block

Stop it (Ctrl-C) and run it again: finished rounds are skipped, the one that was stopped goes on. With more rounds, the
chain grows. DIR holds summary.md, summary.json, plots of quality against remaining weights and of sparsity by block,
and in rounds/ a folder a round that sample_images.py and evaluate.py take for --checkpoint. Each keeps checkpoint.keep
checkpoints and the best. In W&B a chain is a group; each round is a run, made from the one before.

  --out DIR            the chain's folder (the same as --log.dir)"""

OVERLAP = "--overlap"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if OVERLAP in words:
        return compare(words)
    words = [re.sub(r"^--out(?==|$)", "--log.dir", word) for word in words]
    if (method := method_of(words)) != "lottery":
        return fail(f"prune.method = {method!r}: expected lottery; other methods: python -m agent --prune.method=NAME")
    return run_trial(words, usage=USAGE, defaults=["--prune.method=lottery"])


def method_of(words: Sequence[str]) -> str:
    """Return ``prune.method`` as the words set it."""
    try:
        return str(split_argv(list(words)).get("prune.method", "lottery"))
    except ConfigError:  # The trial reports it.
        return "lottery"


def compare(words: Sequence[str]) -> int:
    """Plot and print which weights two tickets share."""
    parser = Parser(description="Which weights two tickets share, by block.")
    parser.add_argument(
        OVERLAP, type=Path, nargs=2, required=True, metavar="TICKET", help="a checkpoint, or a round's folder"
    )
    parser.add_argument("--out", type=out_folder, required=True, metavar="DIR", help="where overlap.png goes")
    arguments = parser.parse_args(words)
    first, second = arguments.overlap
    try:
        tickets = [choose(path, parts=(MASKS_PART,)) for path in (first, second)]
        masks = [ticket_masks(ticket) for ticket in tickets]
        shares = plot_overlap(masks[0], masks[1], (str(first), str(second)), arguments.out)
    except (CheckpointError, ValueError) as error:
        return fail(f"{OVERLAP}: {error}")
    announce(*tickets)
    for block, share in shares.items():
        print(f"{block:10s} {share:.4f}")
    return 0


if __name__ == "__main__":
    run_and_leave(main)
