"""Many trials through fake commands of Slurm that fail, lose jobs and forget them: none is lost, none is run twice."""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from clusters import fake_slurm
from clusters.terminal import in_terminal

from agent.sweep import __main__ as command
from agent.sweep.file import SweepFile, check_sweep
from agent.sweep.offline import offline_sweep
from diffusion_core.machine import leases
from diffusion_core.machine.child import in_child
from diffusion_core.machine.slurm import launcher
from diffusion_core.machine.slurm.queue import POLL
from diffusion_core.registries import LAUNCHERS
from diffusion_core.search import engine, offline
from diffusion_core.search.offline import OfflineSweep
from diffusion_core.search.sweep import SweepError

ROOT = Path(__file__).resolve().parents[3]


def sweep_of(trials: int, method: str = "grid") -> SweepFile:
    space = {"seed": {"values": list(range(trials))}} if method == "grid" else {"seed": {"min": 0, "max": 10**6}}
    content = {
        "method": method,
        "metric": {"name": "val/loss", "goal": "minimize"},
        "command": ["${interpreter}", "-m", "agent", "${args}"],
        "parameters": {"preset": {"value": "digits"}, **space},
        "run_cap": trials,
    }
    return check_sweep(content, "x.yaml", "x")


def run_sweep(folder: Path, trials: int, at_once: int) -> OfflineSweep:
    coordinator = offline_sweep(
        sweep_of(trials), folder / "sweep", launcher=LAUNCHERS["slurm"].make([{}] * at_once, "")
    )
    coordinator.run()
    return coordinator


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in {**fake_slurm.install(tmp_path / "bin"), POLL: "0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(offline, "POLL_SECONDS", 0.01)
    return tmp_path / "bin"


def test_no_trial_is_lost_or_run_twice_on_a_bad_day(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = 20
    coordinator = run_sweep(tmp_path, trials, at_once=10)
    assert [trial.state for trial in coordinator.state.trials] == ["finished"] * trials
    assert {trial.failures for trial in coordinator.state.trials} == {0}, "what the cluster does is no failure"
    happened = Counter(event["event"] for event in events(fake))
    assert happened["doubled"] == 0
    assert happened["finished"] == trials
    assert Counter(e["name"] for e in events(fake) if e["event"] == "finished") == Counter(
        trial.id for trial in coordinator.state.trials
    )
    assert happened["started"] > trials, "some were run again"
    captured = capsys.readouterr()
    assert "Slurm does not answer (Unable to contact slurm controller (connect failure)); asking again" in captured.err
    assert captured.err.count("Slurm does not answer") == 1
    assert "sbatch: Batch job submission failed: Job violates accounting/QOS policy; trying again" in captured.err


@pytest.mark.parametrize("method", ["grid", "random"])
def test_suggestions_are_those_of_the_engine_one_by_one(method: str) -> None:
    trials = 40
    config = sweep_of(trials, method).engine_config()
    search = engine.Search(config)
    past: list[dict[str, Any]] = []
    runs: list[Any] = []
    for _ in range(trials):
        suggested = search.suggest(past, lambda: pytest.fail("only bayes needs runs"))
        assert suggested is not None
        assert suggested == engine.suggest(config, runs)
        past.append(suggested)
        runs.append(engine.past_run("", suggested, "running", {}, []))
    if method == "grid":
        assert search.suggest(past, list) is None
        assert engine.Search(config).suggest(past[:-1], list) == past[-1], "resumed"


WRONG = {
    ("--slurm", "--array=1-3"): "--slurm = '--array=1-3': --array is set here; leave it out",
    ("--slurm", "gpu"): "--slurm = 'gpu': expected options of sbatch, such as --partition=gpu",
    ("--slurm", "'"): '--slurm = "\'": No closing quotation; close the quotation',
    ("--detach",): "--detach: for sweeps on W&B; offline, jobs go on when this command is stopped",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_words_are_refused_in_one_line(
    words: tuple[str, ...], fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused([*words, "--launcher", "slurm"], tmp_path, capsys) == f"error: {WRONG[words]}"


def refused(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which the command refuses a sweep."""
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps(sweep_of(2).config))
    assert command.main([str(file), "--offline", "--out", str(tmp_path / "out"), *words]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    assert not (tmp_path / "out").exists()
    return line


def test_without_sbatch_or_a_launcher_of_that_name_the_sweep_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(["--launcher", "slrum"], tmp_path, capsys)
    assert line == "error: --launcher = 'slrum': expected one of local, slurm; did you mean slurm?"
    line = refused(["--slurm", "--partition=gpu"], tmp_path, capsys)
    assert line == "error: --slurm, --detach: for jobs of Slurm; add --launcher slurm"
    monkeypatch.setenv("PATH", str(tmp_path))
    line = refused(["--launcher", "slurm"], tmp_path, capsys)
    assert line == "error: --launcher = 'slurm': no sbatch here; run it on a login node of the cluster"


@pytest.mark.parametrize(
    ("words", "hours"),
    [
        ("--cpus-per-task=4", r"about [\d.]+ core hours in all"),
        ("--gpus=2", "GPU hours unknown, as there is no GPU here to measure a step on"),
    ],
)
def test_a_dry_run_prints_the_jobs_script_and_what_the_sweep_takes(
    words: str,
    hours: str,
    fake: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep_of(50).config))
    options = ["--offline", "--out", str(tmp_path / "out"), "--launcher", "slurm", "--slurm", words, "--dry-run"]
    assert command.main([str(tmp_path / "sweep.yaml"), *options]) == 0
    said = capfd.readouterr().out
    assert re.search(rf"^estimate: 50 trials, 8 at a time; .*; {hours}$", said, re.MULTILINE)
    script = said[said.index("#!/bin/bash") :].splitlines()
    assert "#SBATCH --requeue" in script
    assert script[-3].startswith(f"exec {sys.executable} -m diffusion_core.machine.job ")
    assert script[-2] == f"# sbatch {words}"
    assert not (tmp_path / "out").exists()
    assert not (fake / "events.jsonl").exists()


def test_a_plugin_adds_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of docs/extending.md, as it stands."""
    (example,) = re.findall(r"```py\n(.*?)```", (ROOT / "docs/extending.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "polite_plugin.py").write_text(example, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    priority = "import os, sys; sys.exit(0 if os.nice(0) >= 7 else 1)"
    content = {
        "method": "grid",
        "command": ["${interpreter}", "-S", "-c", priority, "${args}"],
        "parameters": {"preset": {"value": "digits"}, "plugins": {"value": ["polite_plugin"]}},
    }
    (tmp_path / "sweep.yaml").write_text(json.dumps(content))
    words = [str(tmp_path / "sweep.yaml"), "--offline", "--out", str(tmp_path / "out"), "--launcher"]
    try:
        assert command.main([*words, "polite"]) == 0
    finally:
        LAUNCHERS.pop("polite", None)


def test_a_sweep_on_a_full_disk_ends_in_one_line(fake: Path, tmp_path: Path) -> None:
    def run() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # Files cannot grow beyond it, as on a full disk.
        with pytest.raises(SweepError) as caught:
            run_sweep(tmp_path, 2, at_once=1)
        return str(caught.value)

    said = "File too large; free some space, then repeat the command"
    assert in_child(run) == f"{str(tmp_path / 'sweep/sweep.json')!r}: {said}"


def test_a_sweep_that_another_process_took_over_ends_and_its_jobs_go_on(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after its machine slept for longer than a lease lasts."""
    monkeypatch.setattr(leases, "BEAT_S", 0.05)
    lease = tmp_path / "sweep/.lease"

    def take_over() -> None:
        while not (fake / "events.jsonl").exists():
            time.sleep(0.01)
        taken = lease.with_name("taken")
        taken.write_text(json.dumps({"job": None, "host": "elsewhere", "pid": 1, "token": "theirs"}))
        taken.replace(lease)

    threading.Thread(target=take_over, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_sweep(tmp_path, 40, at_once=4)
    said = capsys.readouterr().err
    assert f"{str(tmp_path / 'sweep')!r}: another process took the sweep over; this one ends" in said
    assert json.loads(lease.read_text())["token"] == "theirs"
    assert "cancelled" not in [event["event"] for event in events(fake)]
    assert not (tmp_path / "sweep/results.csv").exists(), "the other process writes from now on"


def test_a_sweep_process_reads_what_another_one_wrote_until_it_had_the_lease(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked, trials = launcher.SlurmLauncher.locked, 3

    @contextmanager
    def locked_after_another(self: launcher.SlurmLauncher, folder: Path) -> Iterator[Any]:
        monkeypatch.setattr(launcher.SlurmLauncher, "locked", locked)
        (folder / ".lock").unlink()  # Another node does not see the system's lock.
        run_sweep(tmp_path, trials, at_once=1)
        with locked(self, folder) as lost:
            yield lost

    monkeypatch.setattr(launcher.SlurmLauncher, "locked", locked_after_another)
    last = run_sweep(tmp_path, trials, at_once=1)
    assert [trial.state for trial in last.state.trials] == ["finished"] * trials
    assert [event["event"] for event in events(fake)].count("finished") == trials


@pytest.mark.slow
def test_in_a_terminal_a_table_shows_the_jobs_and_ctrl_c_asks_once_and_then_cancels(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(POLL, "1.0")
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep_of(200).config))
    words = ["sweep.yaml", "--offline", "--out", "out", "--launcher", "slurm", "--jobs", "3"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30", "PYTHONPATH": str(ROOT)}
    with in_terminal([sys.executable, "-m", "agent.sweep", *words], tmp_path, environment) as terminal:
        terminal.wait_for(r"name +job +state +node +for\b.*sweep-001-\w+ +1 +running +n1 +\d s")
        terminal.write(b"\x03")
        terminal.wait_for(r"Ctrl-C again within 10 s cancels 3 jobs; else they go on")
        terminal.write(b"\x03")
        terminal.wait_for(r"cancelled 3 jobs")
        assert terminal.process.wait(60) == 130
    assert terminal.text.count("Ctrl-C again") == 1
    assert "the same command goes on from here" in terminal.text
    assert terminal.text.rindex("\x1b[?25h") > terminal.text.rindex("\x1b[?25l"), "the cursor is shown again"
    assert [event["event"] for event in events(fake)].count("cancelled") == 3
    stored = json.loads((tmp_path / "out/sweep/sweep.json").read_text())["trials"]
    assert {trial["state"] for trial in stored} <= {"waiting", "finished"}
    assert {trial["failures"] for trial in stored} == {0}


if __name__ == "__main__":  # Time and memory of a coordinator: python test_fake_slurm.py FOLDER 50 500
    for count in map(int, sys.argv[2:]):
        place = Path(sys.argv[1]) / str(count)
        place.mkdir(parents=True)
        os.environ |= {**fake_slurm.install(place / "bin"), POLL: "0.1"}
        offline.POLL_SECONDS = 0.01
        sweep_of(count)  # Imports are counted for none.
        start, cpu = time.monotonic(), time.process_time()
        done = run_sweep(place, count, at_once=16)
        finished = sum(trial.state == "finished" for trial in done.state.trials)
        doubled = sum(event["event"] == "doubled" for event in events(place / "bin"))
        cpu, wall = (time.process_time() - cpu) / count, (time.monotonic() - start) / count
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(f"{finished}/{count} finished, {doubled} doubled, peak {peak} MB")
        print(f"{1000 * cpu:.1f} ms CPU and {1000 * wall:.0f} ms a trial")
