"""Measure speed, side by side with peers."""

from __future__ import annotations

if __name__ == "__main__":
    from diffusion_core.signals import leave_at_once

    leave_at_once()  # Until main handles signals: the imports take seconds.

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict

from benchmarks.measurement.machine import machine
from benchmarks.measurement.options import Options
from benchmarks.measurement.rows import HEADER, Row

from agent.command import fail, run_and_leave
from diffusion_core.files import new_file, write_json
from diffusion_core.messages import Parser, UserError, out_file
from diffusion_core.tables import text_table

DESCRIPTION = """\
Measure speed against peers that do the same work in the same process, in turns; medians. Run it on a quiet machine.
Needs the optional extra: pip install -e ".[bench]"

subjects:
  all             everything below
  training-step   a step of the 35.7 M parameter network, against diffusers' example loop
  training-loop   the whole loop on digits with W&B offline, against a bare loop around the same network
  sampling        DDIM, against diffusers' DDIMPipeline with the same weights
  loading         images a second from a folder, against denoising-diffusion-pytorch's loader
  ema             the update of the averaged weights, against ema-pytorch
  pruned          a network of half the multiply-accumulates, against the dense one
  fid             Frechet distance and features, against pytorch-fid
  cold-trial      import to first step, and a whole trial of one step
  accuracy        that bf16 and the compiler change no result
  contention      training on digits beside other busy processes, against a fair share
  scaling         cost against batch, width, image size, steps and processes: a table and a plot
  gpu             matrix rate and bandwidth of the GPU; training, sampling, FID and pruning against them"""

Measure = Callable[[Options], list[Row]]

SUBJECTS = (
    "training-step",
    "training-loop",
    "sampling",
    "loading",
    "ema",
    "pruned",
    "fid",
    "cold-trial",
    "accuracy",
    "contention",
    "scaling",
    "gpu",
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("benchmark.py", description=DESCRIPTION)
    parser.add_argument(
        "subject", nargs="+", choices=["all", *SUBJECTS], metavar="SUBJECT", help="one or more of these"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="repetitions; the median counts (5)")
    parser.add_argument("--short", action="store_true", help="tiny work, to see that it runs; no figures to publish")
    parser.add_argument("--json", action="store_true", help="print JSON (machine, versions, commit, rows) on stdout")
    parser.add_argument("--out", type=out_file, metavar="FILE", help="write that JSON there too, and plots beside it")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error(f"--rounds = {arguments.rounds}: expected an integer >= 1")
    return arguments


def measures() -> dict[str, Measure]:
    """What measures each subject."""
    # Slow to import, and --help does without them.
    from benchmarks import (
        accuracy,
        cold_trial,
        contention,
        ema,
        fid,
        gpu,
        loading,
        pruned,
        sampling,
        scaling,
        training_loop,
        training_step,
    )

    modules = [training_step, training_loop, sampling, loading, ema, pruned, fid, cold_trial, accuracy]
    modules += [contention, scaling, gpu]
    return {module.SUBJECT: module.measure for module in modules}


def measure(subject: str, options: Options) -> list[Row]:
    """The rows of one subject; one that cannot run here says why."""
    try:
        return measures()[subject](options)
    except ModuleNotFoundError as error:
        return [Row(subject, "-", None, note=f'needs {error.name}: pip install -e ".[bench]"')]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    arguments = parse_arguments(argv)
    options = Options(arguments.rounds, arguments.short, plots=arguments.out.parent if arguments.out else None)
    subjects = SUBJECTS if "all" in arguments.subject else dict.fromkeys(arguments.subject)
    described = machine()
    rows: list[Row] = []
    for subject in subjects:
        print(f"{subject}:", file=sys.stderr, flush=True)
        rows += measure(subject, options)
        report = {"machine": described, "short": options.short, "rounds": options.rounds,
                  "rows": [asdict(row) | {"holds": row.holds} for row in rows]}  # fmt: skip
        if arguments.out:  # After each subject: what was measured stays, whatever happens to the next.
            try:
                with new_file(arguments.out, "--out") as temporary:
                    write_json(temporary, report)
            except UserError as error:
                return fail(str(error))
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        print(", ".join(f"{key}: {value}" for key, value in described.items() if key != "versions"))
        if options.short:
            print("SHORT: these figures say that the benchmark runs, and nothing else")
        print(text_table(HEADER, [row.cells() for row in rows]))
    return 0


if __name__ == "__main__":
    run_and_leave(main, interruptible=True)
