"""``python -m agent.sweep FILE.yaml``: check a sweep, then run it online through W&B, or offline without a server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.command import UNUSABLE, fail, run_and_leave
from agent.sweep.file import SweepFile, check_places, load_sweep, plugins_of_trials
from agent.sweep.offline import offline_sweep, run_offline
from agent.sweep.online import OnlineSweep, agent_tasks, create_sweep, find_sweep, online_sweep, run_agents
from agent.tracking.environment import load_environment, wandb_mode
from diffusion_core.config import ConfigError
from diffusion_core.config.metrics import Goal, given_goals, goals
from diffusion_core.machine.child import in_child
from diffusion_core.machine.jobs import Launcher, LauncherRecord
from diffusion_core.machine.sharing import shares, threads_each, visible_gpus
from diffusion_core.messages import Parser, joined, nonempty, out_folder, positive
from diffusion_core.registries import LAUNCHERS
from diffusion_core.run_folder import check_recorded
from diffusion_core.search.offline import OfflineSweep
from diffusion_core.search.sweep import SweepError
from pruning.checks import PARENTS, unnamed_parents

DESCRIPTION = """\
Check every parameter of a W&B sweep file, then run its trials: online (create the sweep on W&B, and run W&B's agents
here, one per GPU), or offline, with no account, which sweeps with several objectives need. To resume a stopped sweep,
repeat the command offline, or use --attach online. With --launcher slurm, trials and agents are jobs of Slurm."""

JOBS_AT_ONCE = 8
"""Number of jobs of a cluster that an offline sweep submits at once unless --jobs says another."""

SHOWN_TRIALS = 5
"""Number of trials that --dry-run lists."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line. Exits with an error if flags contradict each other."""
    parser = Parser("python -m agent.sweep", description=DESCRIPTION)
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="sweep file, such as sweeps/quickstart.yaml")
    parser.add_argument("--count", type=positive, metavar="N", help="run at most N trials now")
    parser.add_argument("--dry-run", action="store_true", help="list the first trials and what they cost, and stop")
    parser.add_argument("--name", help="name of the sweep and its folder (default: from the file)")
    parser.add_argument("--launcher", default="local", metavar="NAME", help="where trials run: local, slurm (local)")
    words = "options of sbatch, in one word, such as '--partition=gpu --time=08:00:00' (also DIFFUSION_SWEEPS_SLURM)"
    parser.add_argument("--slurm", metavar="OPTIONS", help=words)
    online = parser.add_argument_group("online")
    online.add_argument("--agents", type=positive, metavar="N", help="agents at once (one per GPU, or one)")
    online.add_argument("--attach", type=nonempty, metavar="[[ENTITY/]PROJECT/]ID", help="join a sweep that is on W&B")
    online.add_argument("--detach", action="store_true", help="with Slurm: submit the agents, and do not wait")
    offline = parser.add_argument_group("offline")
    offline.add_argument("--offline", action="store_true", help="use no server; the default if there is no API key")
    offline.add_argument("--jobs", type=positive, metavar="N", help="trials at once (one per GPU, or one)")
    offline.add_argument("--out", type=out_folder, metavar="DIR", help="parent of the sweep's folder (runs/sweeps)")
    offline.add_argument("--retry-failed", action="store_true", help="run trials again that have failed for good")
    arguments = parser.parse_args(joined(sys.argv[1:] if argv is None else argv, "--slurm"))
    if arguments.file is None and arguments.attach is None:
        parser.error("FILE: a sweep file is needed, such as sweeps/quickstart.yaml (or --attach ID)")
    return arguments


@dataclass(frozen=True)
class Plan:
    """What to run. Plain data: it is made in a child process, so that this one imports neither PyTorch nor W&B.

    Attributes:
        sweep: the checked sweep.
        goals: which way each figure is better.
        shares: environment variables of each trial or agent, with which they share this machine.
        online: the sweep on W&B; None: run it without a server.
    """

    sweep: SweepFile
    goals: dict[str, Goal]
    shares: list[dict[str, str]]
    online: OnlineSweep | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0, 1 if a trial failed, 2 if the sweep cannot be run, 130 if it was stopped."""
    arguments = parse_arguments(argv)
    load_environment()
    try:
        plan = in_child(lambda: make_plan(arguments))
        if arguments.dry_run:
            return 0
        with given_goals(plan.goals):
            launcher = launcher_record(arguments, plan.sweep).make(plan.shares, arguments.slurm)
            if plan.online is not None:
                return run_agents(plan.online, plan.sweep, launcher, arguments.count, wait=not arguments.detach)
            return run_offline(coordinator_of(plan.sweep, arguments, launcher), arguments.count)
    except ConfigError as error:
        for line in str(error).splitlines():
            fail(line)
        return UNUSABLE


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Check the sweep, print what it will cost, and create it on W&B if it is to run there.

    Raises:
        ConfigError: if it cannot be run.
    """
    sweep = None if arguments.file is None else load_sweep(arguments.file)
    if sweep is not None and arguments.name is not None:
        sweep = sweep.renamed(arguments.name)
    if sweep is not None:
        places = {"--name": sweep.name, "--out": str(arguments.out)}
        check_recorded({**sweep.config, **places}, "a sweep is recorded as it is")
        parents = [line for _, trial in sweep.trials(*PARENTS) for line in unnamed_parents(trial.init, trial.distill)]
        if parents:
            raise SweepError("\n".join(dict.fromkeys(parents)))
    if arguments.offline or (wandb_mode() != "online" and not (arguments.agents or arguments.attach)):
        return plan_offline(sweep, arguments)
    return plan_online(sweep, arguments)


def launcher_record(arguments: argparse.Namespace, sweep: SweepFile | None) -> LauncherRecord:
    """Return the launcher that the command names. A plugin of the sweep's trials may have added it.

    Raises:
        SweepError: if no launcher has that name, or an option does not fit the launcher.
    """
    if arguments.launcher not in LAUNCHERS and sweep is not None:
        plugins_of_trials(sweep)
    try:
        record: LauncherRecord = LAUNCHERS[arguments.launcher]
    except KeyError as error:
        raise SweepError(error.args[0]) from None
    if record.shares_machine and (arguments.slurm or arguments.detach):
        raise SweepError("--slurm, --detach: for jobs of Slurm; add --launcher slurm")
    return record


def plan_offline(sweep: SweepFile | None, arguments: argparse.Namespace) -> Plan:
    """Plan to run a sweep on this machine without a server."""
    if sweep is None or arguments.attach or arguments.agents:
        raise SweepError("--attach, --agents: for sweeps on W&B; leave --offline out (offline there is --jobs)")
    check_places(sweep)
    if arguments.detach:
        raise SweepError("--detach: for sweeps on W&B; offline, jobs go on when this command is stopped")
    record = launcher_record(arguments, sweep)
    jobs = arguments.jobs or (one_per_gpu() if record.shares_machine else JOBS_AT_ONCE)
    parts = shares_for(record, jobs)
    coordinator = coordinator_of(sweep, arguments, record.make(parts, arguments.slurm))
    preview = coordinator.preview()
    tell_cost(sweep, arguments, jobs, coordinator)
    if arguments.dry_run and preview:
        print(preview)
    return Plan(sweep, goals(), parts)


def shares_for(record: LauncherRecord, count: int) -> list[dict[str, str]]:
    """Return the environment variables of each of ``count`` tasks: their shares of this machine, if they run here."""
    return shares(count) if record.shares_machine else [{} for _ in range(count)]


def coordinator_of(sweep: SweepFile, arguments: argparse.Namespace, launcher: Launcher) -> OfflineSweep:
    """Return an offline sweep as the command asks for it."""
    folder = (arguments.out or Path("runs/sweeps")) / sweep.name
    return offline_sweep(sweep, folder, launcher=launcher, retry_failed=arguments.retry_failed)


def plan_online(sweep: SweepFile | None, arguments: argparse.Namespace) -> Plan:
    """Plan to create a sweep on W&B, or to join one, and to run agents on this machine."""
    if arguments.jobs or arguments.out or arguments.retry_failed:
        raise SweepError("--jobs, --out, --retry-failed: for sweeps without a server; add --offline, or use --agents")
    if wandb_mode() != "online":
        raise SweepError("--attach, --agents: W&B is needed: set WANDB_API_KEY (see .env.example), or `wandb login`")
    path = None
    if arguments.attach:
        path, sweep = find_sweep(arguments.attach, sweep)
    assert sweep is not None
    sweep.check_on_server()
    record = launcher_record(arguments, sweep)
    if arguments.count and not record.shares_machine:
        raise SweepError("--count: counts anew when a job is requeued; set run_cap in the sweep file")
    agents = arguments.agents or (one_per_gpu() if record.shares_machine else 1)
    parts = shares_for(record, agents)
    preview = record.make(parts, arguments.slurm).preview(agent_tasks(path or sweep.name, agents, None, {}, wait=True))
    if arguments.dry_run and preview:
        print(preview)
    if path is None or arguments.dry_run:  # Some trials of an existing sweep may be done.
        tell_cost(sweep, arguments, agents)
    online = None if arguments.dry_run else online_sweep(path or create_sweep(sweep), sweep)
    return Plan(sweep, goals(), parts, online)


def one_per_gpu() -> int:
    """Return the number of visible GPUs, at least one."""
    return max(1, len(visible_gpus()))


def tell_cost(sweep: SweepFile, arguments: argparse.Namespace, jobs: int, begun: OfflineSweep | None = None) -> None:
    """Print what the sweep will cost, and with --dry-run its first trials.

    Args:
        sweep: the sweep.
        arguments: the command's options.
        jobs: trials at once.
        begun: the offline sweep, some of whose trials may have ended.
    """
    from agent.sweep.advice import advice
    from agent.sweep.estimate import describe_sweep, list_trials
    from pruning.estimate import Estimator

    ended = [] if begun is None else begun.ended_trials()
    limits = [arguments.count, None if sweep.total is None else max(0, sweep.total - len(ended))]
    trials = min((limit for limit in limits if limit is not None), default=None)
    if trials == 0:
        print("estimate: no trials are left")
        return
    estimator = Estimator(
        offline=begun is not None,
        threads=threads_each(jobs),
        past_seconds=[trial.seconds for trial in ended],
    )
    if arguments.dry_run:
        print(list_trials(sweep, estimator, arguments.count or SHOWN_TRIALS))
    folder = Path("runs") if begun is None else begun.folder
    size_of = launcher_record(arguments, sweep).size
    size = None if size_of is None else size_of(jobs, arguments.slurm)
    print(describe_sweep(sweep, estimator, jobs=jobs, trials=trials, folder=folder, size=size), flush=True)
    for line in advice(sweep, trials, offline=begun is not None):
        print(f"warning: {line}", file=sys.stderr)


if __name__ == "__main__":
    run_and_leave(main)
