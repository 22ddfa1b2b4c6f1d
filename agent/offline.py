"""A sweep without a server: W&B's own search engine suggests, trials run one after another, nothing is lost.

runs/sweeps/NAME/
    sweep.json                   the sweep and the state of its trials
    trials/ID/                   the folder of each trial, with its offline W&B run
    ID-samples.png, ID-diffusion.gif
    results.csv, results.json
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agent import engine
from agent.preemption import forward_signals
from agent.results import TrialRecord, best_first, table, write_results
from agent.run_folder import RESULT_FILE, SAMPLES, best_figures, read_history, write_json
from agent.settings import OFFLINE_SWEEP
from agent.sweep_file import ARGS_MACRO, SweepError, SweepFile

STATE_FILE = "sweep.json"
POLL_SECONDS = 0.5
DONE = frozenset({"finished", "failed", "stopped"})
ENGINE_STATES = {"finished": "finished", "failed": "failed", "stopped": "finished", "running": "running"}


@dataclass
class Trial:
    """A trial that the search engine asked for."""

    id: str
    parameters: dict[str, Any]
    state: str = "running"


class OfflineSweep:
    """Drives the trials of a sweep on this machine.

    Args:
        sweep: a checked sweep file.
        folder: where everything goes; a sweep that is there already goes on.

    Raises:
        SweepError: if the folder holds a sweep of another file.
    """

    def __init__(self, sweep: SweepFile, folder: Path) -> None:
        self.sweep = sweep
        self.folder = folder
        self.trials: list[Trial] = []
        state_file = folder / STATE_FILE
        if state_file.is_file():
            stored = json.loads(state_file.read_text(encoding="utf-8"))
            if stored["sweep"] != engine.plain(sweep.config):
                raise SweepError(
                    f"{str(folder)!r} holds a sweep of another content; give this one another --name, or delete it"
                )
            self.trials = [Trial(**trial) for trial in stored["trials"]]

    def run(self, count: int | None) -> list[TrialRecord]:
        """Run trials until the search is exhausted, ``run_cap`` is reached, or ``count`` more have been run.

        Returns:
            All trials of the sweep, best first.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        caps = [cap for cap in (self.sweep.run_cap, self.sweep.grid_size()) if cap is not None]
        started = 0
        while count is None or started < count:
            trial = next((trial for trial in self.trials if trial.state not in DONE), None)
            if trial is None:
                if self.sweep.run_cap is not None and len(self.trials) >= self.sweep.run_cap:
                    break
                trial = self._suggest()
                if trial is None:
                    break
                self.trials.append(trial)
            started += 1
            self._save()
            total = f" of {min(caps)}" if caps else ""
            shown = " ".join(f"{key}={trial.parameters[key]}" for key in self.sweep.varied)
            print(f"\ntrial {self.trials.index(trial) + 1}{total}, {trial.id}: {shown}", flush=True)
            trial.state = self._run_trial(trial)
            self._save()
            self._copy_pictures(trial)
        records = self.records()
        write_results(self.folder, records)
        return records

    def _suggest(self) -> Trial | None:
        parameters = engine.suggest(self.sweep.engine_config(), [self._engine_run(trial) for trial in self.trials])
        if parameters is None:
            return None
        return Trial(f"{self.sweep.name}-{len(self.trials) + 1:03d}-{secrets.token_hex(2)}", parameters)

    def _engine_run(self, trial: Trial) -> Any:
        history = read_history(self._trial_folder(trial))
        return engine.past_run(trial.id, trial.parameters, ENGINE_STATES[trial.state], best_figures(history), history)

    def _given_up(self, trial: Trial) -> bool:
        """Whether early termination gives up on a running trial."""
        if "early_terminate" not in self.sweep.config:
            return False
        return trial.id in engine.doomed(self.sweep.engine_config(), [self._engine_run(trial) for trial in self.trials])

    def _run_trial(self, trial: Trial) -> str:
        """Run a trial in a process of its own; returns the state in which it ended.

        Raises:
            KeyboardInterrupt: if this process was told to stop; the trial has then written its checkpoint.
        """
        folder = self._trial_folder(trial)
        arguments = [f"--{key}={value}" for key, value in trial.parameters.items()] + [f"--log.dir={folder}"]
        environment = dict(os.environ) | {
            "WANDB_MODE": "disabled" if os.environ.get("WANDB_MODE") == "disabled" else "offline",
            "WANDB_RUN_ID": trial.id,
            "WANDB_RUN_GROUP": self.sweep.name,
            OFFLINE_SWEEP: self.sweep.name,
            "WANDB_SILENT": os.environ.get("WANDB_SILENT", "true"),
        }
        command = expand_command(self.sweep.config["command"], arguments)
        # In a process group of its own, or Ctrl-C would reach it twice: from the terminal and from here.
        process = subprocess.Popen(command, env=environment, process_group=0)
        stopped = False
        with forward_signals(process) as forwarded:
            while True:
                try:
                    exit_code = process.wait(POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    if not stopped and self._given_up(trial):
                        stopped = True
                        print(f"\n{trial.id}: stopped early, by {self.sweep.config['early_terminate']['type']}")
                        process.send_signal(signal.SIGTERM)
        if forwarded and exit_code:
            raise KeyboardInterrupt
        if stopped and exit_code:
            return "stopped"
        return "finished" if exit_code == 0 else "failed"

    def _trial_folder(self, trial: Trial) -> Path:
        return self.folder / "trials" / trial.id

    def _save(self) -> None:
        write_json(
            self.folder / STATE_FILE,
            {"sweep": engine.plain(self.sweep.config), "trials": [asdict(trial) for trial in self.trials]},
        )

    def _copy_pictures(self, trial: Trial) -> None:
        """Put the newest pictures of a trial beside the results."""
        samples = self._trial_folder(trial) / SAMPLES
        for kind, suffix in (("samples", "png"), ("diffusion", "gif")):
            newest = max(samples.glob(f"{kind}-*.{suffix}"), default=None)
            if newest is not None:
                shutil.copyfile(newest, self.folder / f"{trial.id}-{kind}.{suffix}")

    def records(self) -> list[TrialRecord]:
        """All trials of the sweep, best first."""
        records = []
        for trial in self.trials:
            folder = self._trial_folder(trial)
            result: dict[str, Any] = {}
            if (folder / RESULT_FILE).is_file():
                result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
            records.append(
                TrialRecord(
                    id=trial.id,
                    state=trial.state,
                    parameters=trial.parameters,
                    figures=result.get("figures") or best_figures(read_history(folder)),
                    config=result.get("config", {}),
                    best_checkpoint=result.get("best_checkpoint"),
                    seconds=result.get("seconds"),
                )
            )
        return best_first(records, self.sweep.metric)


def run_offline(sweep: SweepFile, folder: Path, count: int | None) -> int:
    """Run an offline sweep and print its table; returns the exit status."""
    coordinator = OfflineSweep(sweep, folder)
    try:
        records = coordinator.run(count)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from here ({folder})", file=sys.stderr)
        return 130
    print(f"\n{sweep.name}: {len(records)} trials" + (f", best {sweep.metric} first" if sweep.metric else ""))
    print(table(records, sweep.varied))
    print(f"\nresults.csv, results.json, sample grids and GIFs: {folder}/")
    print(f"to put it all on W&B: wandb sync {folder}/trials/*/wandb/offline-run-*")
    return 0 if all(record.state != "failed" for record in records) else 1


def expand_command(command: list[Any], arguments: list[str]) -> list[str]:
    """A sweep's command with its macros filled in, as ``wandb agent`` does."""
    macros = {"${env}": ["/usr/bin/env"], "${interpreter}": [sys.executable], ARGS_MACRO: arguments}
    words: list[str] = []
    for word in command:
        words += macros.get(str(word), [str(word)])
    return words
