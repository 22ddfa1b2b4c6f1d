"""``python -m agent.report``: real folders become studies and pages; sweeps and chains write theirs by themselves."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent import report
from agent.sweep.file import check_sweep
from agent.sweep.offline import offline_sweep, run_offline
from diffusion_core.config import ConfigError
from diffusion_core.report import watching
from diffusion_core.report.folders import read_study, read_trial, words_of
from diffusion_core.report.study import CHAIN, RUNS, SWEEP
from diffusion_core.report.uploaded import uploaded_sweep, uploaded_trial
from diffusion_core.run_folder import SWEEP_LOCK, held, read_history
from diffusion_core.search.offline import OfflineSweep

HOUSE = Path(__file__).parents[2] / "fixtures" / "house"
STUB = Path(__file__).parents[2] / "stub_trial.py"
FINISHED, STOPPED = "house-001-dfd3", "house-002-7e12"


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A half-finished sweep, a chain and a run, as an earlier version wrote them."""
    for name in ("sweeps", "lottery", "half"):
        shutil.copytree(HOUSE / name, tmp_path / name)
    return tmp_path


def test_a_sweep_is_read_with_the_figures_of_its_checkpoints(house: Path) -> None:
    study = read_study([house / "sweeps" / "house"])
    assert (study.kind, study.title, study.metric, study.method) == (SWEEP, "house", "val/loss", "grid search")
    assert study.goals["val/loss"] == "minimize"
    assert not study.running
    assert study.searched == {"seed": "0, 1, 2"}
    assert [(trial.name, trial.state, trial.seed) for trial in study.trials] == [
        (FINISHED, "finished", 0),
        (STOPPED, "waiting", 1),
    ]
    first, second = study.trials
    trials = house / "sweeps" / "house" / "trials"
    (row,) = [row for row in read_history(trials / FINISHED) if row["step"] == 400]
    assert (first.step, first.figures["val/loss"]) == (400, row["val/loss"])
    losses = [row["train/loss"] for row in read_history(trials / STOPPED)]
    assert (second.step, second.figures["train/loss"]) == (None, min(losses)), "no checkpoint of it is the best"
    assert first.settings["model.channels"] == second.settings["model.channels"] == 4
    assert str(trials / FINISHED) in first.sample
    assert study.trials[0].figures["model/params"] == 927
    assert study.trials[0].figures["remaining"] == pytest.approx(1 - 0.6886126973463218)
    assert "model/params" not in study.trials[1].figures


def test_a_chain_a_run_and_a_folder_of_runs_are_read(house: Path) -> None:
    chain = read_study([house / "lottery"])
    assert (chain.kind, [trial.figures["remaining"] for trial in chain.trials]) == (CHAIN, [1.0])
    run = read_study([house / "half"])
    assert (run.kind, len(run.trials), run.trials[0].state) == (RUNS, 1, "unfinished")
    everything = read_study([house])
    assert len(everything.trials) == 4, "the chain itself is not a run that trains"
    pair = read_study([house / "half", house / "sweeps" / "house" / "trials" / FINISHED])
    assert "prune.method" in pair.varied
    assert "log.dir" not in pair.varied


def test_what_runs_is_known_whatever_the_clocks_say(house: Path) -> None:
    """The file system's clock is that of a file server, or a machine's clock was set meanwhile."""
    lock = house / "half" / "lock"
    lock.write_text(str(os.getpid()))
    os.utime(lock, (0, 0))
    (run,) = read_study([house / "half"]).trials
    assert run.state == "unfinished", "another process had this one's number"
    with held(lock):
        os.utime(lock, (0, 0))
        (run,) = read_study([house / "half"]).trials
        assert run.state == "running"


def test_rounds_of_a_chain_have_parents_and_controls(house: Path) -> None:
    rounds = house / "lottery" / "rounds"
    for name, control, sparsity in (("01", "none", 0.2), ("02", "none", 0.36), ("02-random-mask", "random_mask", 0.36)):
        shutil.copytree(rounds / "00", rounds / name)
        (rounds / name / "run.json").write_text(json.dumps({"id": f"chain-{name}"}))
        result = {"figures": {"val/loss": 0.5, "prune/sparsity": sparsity}, "config": {"prune.control": control}}
        (rounds / name / "result.json").write_text(json.dumps(result))
    study = read_study([house / "lottery"])
    first = study.trials[0].name
    found = {trial.name: (trial.parent, trial.settings["prune.control"]) for trial in study.trials}
    assert found == {first: (None, "none"), "chain-01": (first, "none"), "chain-02": ("chain-01", "none"),
                     "chain-02-random-mask": ("chain-01", "random_mask")}  # fmt: skip
    assert [round(trial.figures["remaining"], 3) for trial in study.trials] == [1.0, 0.8, 0.64, 0.64]
    assert [trial.state for trial in study.trials] == ["unfinished", "finished", "finished", "finished"]
    (house / "lottery" / "lock").write_text(str(os.getpid()))
    live = read_study([house / "lottery"])
    assert live.running
    assert live.trials[0].state == "running"


@pytest.mark.parametrize("file", ["result.json", "history.jsonl", "config.yaml", "run.json", "protocols.json",
                                  "checkpoints/step-00000400/checkpoint.json"])  # fmt: skip
@pytest.mark.parametrize("content", ["", "[1]", "\x00\xff", '{"figures": 3, "step": []}'])
def test_a_damaged_file_costs_what_it_held_and_no_more(house: Path, file: str, content: str) -> None:
    sweep = house / "sweeps" / "house"
    (sweep / "trials" / FINISHED / file).write_text(content, encoding="latin-1")
    study = read_study([sweep])
    assert [trial.name for trial in study.trials] == [FINISHED, STOPPED]
    assert study.trials[1].figures["train/loss"] > 0


def test_a_trial_that_starts_from_another_one_has_it_for_a_parent(house: Path) -> None:
    folder = house / "half"
    start = house / "sweeps" / "house" / "trials" / FINISHED / "checkpoints" / "step-00000400"
    (folder / "config.yaml").write_text(f"init.checkpoint: {start}\n")
    study = read_study([folder, house / "sweeps" / "house" / "trials" / FINISHED])
    assert [trial.parent for trial in study.trials] == [FINISHED, None]
    assert read_trial(house / "nowhere", "x", "failed", {"seed": 3}).settings == {"seed": 3}


@pytest.mark.parametrize(
    ("spec", "words"),
    [({"values": ["linear", 2]}, "linear, 2"), ({"min": 0, "max": 1}, "0 to 1"),
     ({"distribution": "log_uniform_values", "min": 1e-4, "max": 0.1}, "0.0001 to 0.1 (log_uniform_values)"),
     ({"distribution": "normal", "mu": 1, "sigma": 2}, "distribution normal, mu 1, sigma 2")],
)  # fmt: skip
def test_parameters_in_words(spec: dict[str, Any], words: str) -> None:
    assert words_of(spec) == words


def test_the_command_writes_a_page_or_markdown(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = house / "sweeps" / "house"
    assert report.main([str(folder)]) == 0
    assert capsys.readouterr().out == f"report: {folder / 'report.html'}\n"
    page = (folder / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    for text in (FINISHED, STOPPED, "val/loss", "seed", f"--checkpoint {folder}/trials/{FINISHED}"):
        assert text in page
    assert 'http-equiv="refresh"' not in page
    assert report.main([str(folder), "--format", "md"]) == 0
    assert report.main([str(folder), "--out", str(house / "sub" / "mine.md"), "--metric", "train/loss"]) == 0
    assert (folder / "report.md").read_text().startswith("# house")
    assert "train/loss" in (house / "sub" / "mine.md").read_text().split("## Trials")[0]
    pair = house / "two.html"
    assert report.main([str(house / "half"), str(folder / "trials" / FINISHED), "--out", str(pair)]) == 0
    assert 'id="pair"' in pair.read_text()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nowhere"], "'nowhere': no such folder"),
        (["empty"], "'empty': no run here"),
        (["sweeps/house", "--metric", "eval/fid"], "--metric = 'eval/fid': no trial has it"),
        (
            ["sweeps/house", "--metric", "model/params"],
            "--metric = 'model/params': no trial has it, or it is no figure",
        ),
        (["sweeps/house", "--out", "empty"], "--out = 'empty': expected a file; a folder has this name"),
        (["broken"], "'broken': its sweep.json is damaged"),
    ],
)
def test_what_cannot_be_reported_is_one_line(
    house: Path, words: list[str], reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(house)
    for name in ("empty", "broken"):
        (house / name).mkdir()
    (house / "broken" / "sweep.json").write_text("{}")
    try:
        status: object = report.main(words)
    except SystemExit as refusal:  # Of the command line.
        status = refusal.code
    assert status == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {reason}")
    assert len(said.err.splitlines()) == 1
    assert said.out == ""
    assert not list((house / "empty").iterdir())


def test_a_watched_page_follows_the_sweep_to_its_end(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "FOLDER_SECONDS", 0.05)
    sweep, page = house / "sweeps" / "house", house / "page.html"
    (sweep / SWEEP_LOCK).write_text(str(os.getpid()))
    watcher = threading.Thread(target=report.main, args=([str(sweep), "--out", str(page), "--watch"],))
    watcher.start()

    def wait_for(text: str, *, gone: bool = False) -> None:
        deadline = time.monotonic() + 120
        while not page.exists() or (text in page.read_text()) == gone:
            assert time.monotonic() < deadline, text
            time.sleep(0.02)

    wait_for('http-equiv="refresh"')
    state = json.loads((sweep / "sweep.json").read_text())
    state["trials"][1]["state"] = "failed"
    (sweep / "sweep.json").write_text(json.dumps(state))
    wait_for("1 failed")
    (sweep / SWEEP_LOCK).unlink()
    watcher.join(120)
    assert not watcher.is_alive()
    wait_for('http-equiv="refresh"', gone=True)


@pytest.mark.parametrize(("age", "running"), [(0.0, True), (1e6, False)])
def test_a_process_that_inherited_the_id_of_a_sweep_does_not_run_it(house: Path, age: float, running: bool) -> None:
    lock = house / "sweeps" / "house" / SWEEP_LOCK
    lock.write_text(str(os.getpid()))
    os.utime(lock, (time.time() - age,) * 2)
    assert read_study([lock.parent]).running == running
    lock.write_text("no number")
    assert not read_study([lock.parent]).running


def test_nothing_is_written_while_nothing_changes(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = read_study([house / "sweeps" / "house"])
    running = iter([True, True, True, False])
    written: list[bool] = []
    monkeypatch.setattr(watching, "write_page", lambda study, out, **more: written.append(study.running))

    def read() -> Any:
        return replace(study, running=next(running))

    watching.watch(read, house / "x.html", 0.0)
    assert written == [True, False]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OfflineSweep:
    """A sweep of two stub trials, before it is run."""
    (tmp_path / "notes").mkdir()
    monkeypatch.setenv("STUB_NOTES", str(tmp_path / "notes"))
    content = {
        "method": "grid",
        "metric": {"name": "val/loss", "goal": "minimize"},
        "command": ["${interpreter}", "-S", str(STUB), "${args}"],
        "parameters": {
            "preset": {"value": "digits"},
            "seed": {"value": 0},
            "train.steps": {"value": 3},
            "train.lr": {"values": [0.3, 0.1]},
            "train.warmup_steps": {"value": 0},
            "prune.step": {"value": None},
        },
    }
    return offline_sweep(check_sweep(content, "stub.yaml", "stub"), tmp_path / "stub", jobs=2)


def test_an_offline_sweep_ends_with_its_report(stub: OfflineSweep, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_offline(stub, None) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == f"report: {stub.folder / 'report.html'}"
    page = (stub.folder / "report.html").read_text()
    assert all(trial.id in page for trial in stub.state.trials)
    assert 'http-equiv="refresh"' not in page, "it is over, though its process still lives"


def test_a_report_that_cannot_be_written_fails_no_sweep(stub: OfflineSweep, capsys: pytest.CaptureFixture[str]) -> None:
    (stub.folder / "report.html").mkdir(parents=True)
    assert run_offline(stub, None) == 0
    said = capsys.readouterr()
    assert "report:" not in said.out
    (line,) = [line for line in said.err.splitlines() if "report" in line]
    assert line == f"warning: {str(stub.folder / 'report.html')!r}: no report: Is a directory"


def test_a_run_on_wandb_has_the_figures_of_its_best_model() -> None:
    summary = {"val/loss": 0.1, "eval/fid50k": 3.0, "model/macs": 5, "_runtime": 12, "protocol/eval/fid50k": "n=50000",
               "system/device": "cpu", "best/val/loss": 0.3, "best/step": 1}  # fmt: skip
    rows = [{"_step": 1, "step": 1, "val/loss": 0.3, "samples": {"_type": "images"}}, {"_step": 2, "val/loss": 0.1}]
    known: dict[str, Any] = {"project": "us/them", "url": "https://wandb.ai/x", "config": {"seed": 4, "train.lr": 0.1},
                             "summary": summary, "rows": rows}  # fmt: skip
    model = {"step": 1, "figures": {"val/loss": 0.3}, "protocols": {"val/loss": "all"}}
    trial = uploaded_trial("abc", "finished", model=model, **known)
    assert trial.figures == {"val/loss": 0.3, "model/macs": 5, "seconds": 12.0}
    assert (trial.step, trial.seed) == (1, 4)
    assert trial.protocols == {"eval/fid50k": "n=50000", "val/loss": "all"}
    assert trial.history == [{"step": 1, "val/loss": 0.3}, {"step": 2, "val/loss": 0.1}]
    assert trial.sample == "python scripts/sample_images.py --artifact us/them/model-abc --out samples"
    bare = uploaded_trial("abc", "running", model={}, **known)
    assert bare.figures == {"val/loss": 0.1, "eval/fid50k": 3.0, "model/macs": 5, "seconds": 12.0}
    parameters = {"train": {"parameters": {"lr": {"min": 0, "max": 1}}}, "seed": {"value": 4}}
    metric = {"name": "val/loss", "goal": "minimize"}
    config = {"method": "bayes", "parameters": parameters, "metric": metric, "name": "mine"}
    study = uploaded_sweep("id", config, "https://wandb.ai/s", [bare])
    assert (study.title, study.metric, study.running, study.method) == ("mine", "val/loss", True, "bayes search")
    assert study.searched == {"train.lr": "0 to 1"}
    assert study.trials[0].reproduce == "python -m agent --train.lr=0.1 --seed=4"


def test_a_path_without_a_folder_and_without_wandb_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="'runs/sweeps/typo': no such folder, and no sweep or run on W&B: ") as raised:
        report.study_of(["runs/sweeps/typo"])
    assert "\n" not in str(raised.value)
