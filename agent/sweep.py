"""``python -m agent.sweep FILE.yaml``: check a sweep, then run it, online through W&B or offline on this machine."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from agent.preemption import forward_signals
from agent.results import TrialRecord, best_first, table
from agent.settings import DEFAULT_PROJECT, load_environment, wandb_mode
from agent.sweep_file import SweepError, SweepFile, load_sweep
from diffusion_core.config_io import ConfigError

DESCRIPTION = """\
Check every parameter of a W&B sweep file, then run its trials: online (the sweep is created on W&B and an agent of
W&B's runs it here; start more with `wandb agent`), or offline, with W&B's own search engine and no account."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m agent.sweep", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("file", type=Path, metavar="FILE", help="sweep file, such as sweeps/quickstart.yaml")
    parser.add_argument("--offline", action="store_true", help="no server; the default where there is no API key")
    parser.add_argument("--count", type=int, metavar="N", help="run at most N trials now")
    parser.add_argument("--name", help="name of the sweep and its folder (default: from the file)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/sweeps"), metavar="DIR", help="offline: where NAME/ goes (runs/sweeps)"
    )
    arguments = parser.parse_args(argv)
    if arguments.count is not None and arguments.count < 1:
        parser.error(f"--count = {arguments.count}: expected an integer >= 1")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if a trial failed, 2 if the file cannot be run."""
    arguments = parse_arguments(argv)
    load_environment()
    try:
        sweep = load_sweep(arguments.file)
        if arguments.name:
            sweep = SweepFile(arguments.name, sweep.config | {"name": arguments.name}, sweep.parameters)
        if Path(sweep.name).name != sweep.name:
            raise SweepError(f"name = {sweep.name!r}: expected a name that a folder can have")
        if arguments.offline or wandb_mode() != "online":
            from agent.offline import run_offline

            return run_offline(sweep, arguments.out / sweep.name, arguments.count)
        return run_online(sweep, arguments.count)
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2


def run_online(sweep: SweepFile, count: int | None) -> int:
    """Create the sweep on W&B, run W&B's agent here, and print the table of trials at the end."""
    import wandb

    project = sweep.config.get("project") or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT
    entity = sweep.config.get("entity") or os.environ.get("WANDB_ENTITY")
    sweep_id = wandb.sweep(sweep.config | {"name": sweep.name}, entity=entity, project=project)
    api = wandb.Api()
    path = f"{entity or api.default_entity}/{project}/{sweep_id}"
    print(f"to go on later, and on other machines: wandb agent --forward-signals {path}", flush=True)
    # `${interpreter}` is `python` to W&B's agent: make that the one that runs this.
    environment = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    command = [sys.executable, "-m", "wandb", "agent", "--forward-signals", *(["--count", str(count)] if count else [])]
    # In a process group of its own: it is sent every signal once, and passes it on to its trial.
    process = subprocess.Popen([*command, path], env=environment, process_group=0)
    with forward_signals(process):
        status = process.wait()
    records = [
        TrialRecord(
            id=run.id,
            state=run.state,
            parameters={key: run.config.get(key) for key in sweep.parameters},
            figures=_flat_summary(dict(run.summary)),
            seconds=run.summary.get("_runtime"),
        )
        for run in api.sweep(path).runs
    ]
    print(table(best_first(records, sweep.metric), sweep.varied))
    return status or (1 if any(record.state in ("failed", "crashed") for record in records) else 0)


def _flat_summary(summary: dict[str, object]) -> dict[str, float]:
    """Numbers of a run's summary; W&B nests those with a goal, as in ``{"val/loss": {"min": 0.1}}``."""
    flat: dict[str, float] = {}
    for key, value in summary.items():
        nested = getattr(value, "items", None)
        if nested is not None:
            value = next((number for kind, number in nested() if kind in ("min", "max")), None)
        if isinstance(value, int | float):
            flat[key] = value
    return flat


if __name__ == "__main__":
    sys.exit(main())
