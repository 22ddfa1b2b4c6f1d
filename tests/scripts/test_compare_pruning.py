"""The comparison of prunings: every training is made once, and the table holds what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import compare_pruning
import pytest
import torch
from studies import runs, structured, study
from studies.study import FIGURES, SAMPLING_SEED, Results

from agent.config import build_config
from diffusion_core.checkpoint import read_checkpoint
from diffusion_core.evaluation.consistency import consistency_of_models
from diffusion_core.hardware import pick_precision
from diffusion_core.sampling.generation import Generator
from diffusion_core.tables import mean_and_range


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is as small as can be: how good it is does not matter here."""
    for key, value in {
        "sample.steps": 3,
        "eval.val_images": 32,
        "train.batch_size": 16,
        "model.num_res_blocks": 1,
        "model.channels": 32,
    }.items():
        monkeypatch.setitem(study.QUIET, key, value)
    for module in (runs, structured):
        monkeypatch.setattr(module, "BATCHES", 1)


def test_it_measures_once_and_writes_table_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(structured, "IMPORTANCES", ("random",))
    words = ["--seeds", "0", "--steps", "2", "--tune-steps", "1", "--images", "10", "--out", str(tmp_path)]
    assert compare_pruning.main(words) == 0
    trained = {line.split()[1] for line in capsys.readouterr().err.splitlines() if line.startswith("run ")}
    assert trained == {"dense-2-seed0", "dense-2-1-seed0", "random-0.5-2-1-seed0"}
    measured = json.loads((tmp_path / "structured-2-1.json").read_text())
    assert set(measured) == {
        f"{name} {stage}, seed 0" for name in ("dense", "random-0.5") for stage in ("before", "after")
    }
    dense, pruned = measured["dense after, seed 0"], measured["random-0.5 after, seed 0"]
    assert pruned["macs"] / dense["macs"] == pytest.approx(0.5, rel=0.02)
    table = (tmp_path / "structured-2-1.md").read_text()
    before = measured["random-0.5 before, seed 0"]
    macs, agreements = f"{pruned['macs'] / 1e6:.2f} M", f"{before['agreement']:.1%} | {pruned['agreement']:.1%}"
    assert f"| random | {macs} | {agreements} |" in table
    assert (tmp_path / "structured-2-1.png").read_bytes()[:4] == b"\x89PNG"

    assert (tmp_path / "structured-2-1-ssim.png").read_bytes()[:4] == b"\x89PNG"

    assert compare_pruning.main(words) == 0
    assert not [line for line in capsys.readouterr().err.splitlines() if line.startswith("run ")]
    assert json.loads((tmp_path / "structured-2-1.json").read_text()) == measured

    assert compare_pruning.main([*words, "--", "--train.lr=0.1"]) == 2
    assert "holds results of {'knobs': {}}" in capsys.readouterr().err

    # Images of the dense model are compared with themselves; of the others, with those of the same dense model.
    itself = measured["dense before, seed 0"]
    assert (itself["ssim"], itself["mse"]) == (pytest.approx(1.0), 0.0)
    checkpoints = [read_checkpoint(tmp_path / "runs" / f"{name}-seed0") for name in ("dense-2", "random-0.5-2-1")]
    config = checkpoints[0].config()
    precision = pick_precision(config.train, torch.device("cpu"))
    generators = [Generator(checkpoint.network(), checkpoint.config(), precision) for checkpoint in checkpoints]
    alike = consistency_of_models(generators[0], generators[1], 10, config.sample, SAMPLING_SEED)
    assert (pruned["ssim"], pruned["mse"]) == pytest.approx((alike.ssim, alike.mse))
    assert f"| {itself['mse']:.4f} | {dense['mse']:.4f} |" in table
    assert f"{before['ssim']:.3f} | {pruned['ssim']:.3f} |" in table


def test_a_folder_of_before_gets_the_figures_that_it_lacks_without_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(structured, "IMPORTANCES", ("taylor",))
    words = ["--tables", "structured", "--keep", "0.6", "--seeds", "0", "--steps", "2", "--tune-steps", "1"]
    words += ["--images", "10", "--out", str(tmp_path)]
    assert compare_pruning.main(words) == 0
    file = tmp_path / "structured-2-1.json"
    whole = json.loads(file.read_text())
    share = whole["taylor-0.6 after, seed 0"]["macs"] / whole["dense after, seed 0"]["macs"]
    assert share == pytest.approx(0.6, rel=0.02)
    old = {key: {name: figures[name] for name in ("loss", "params", "macs")} for key, figures in whole.items()}
    for figures in old.values():
        figures["agreement"] = 0.125  # Of another day's classifier.
    file.write_text(json.dumps(old))
    capsys.readouterr()
    assert compare_pruning.main(words) == 0
    assert not [line for line in capsys.readouterr().err.splitlines() if line.startswith("run ")]
    assert json.loads(file.read_text()) == {key: whole[key] | figures for key, figures in old.items()}


@pytest.mark.slow
def test_tables_of_runs_hold_what_the_runs_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for row in runs.depth_rows() if row.name in ("dense", "both, macs 0.5")]
    monkeypatch.setattr(runs, "depth_rows", lambda: rows)
    monkeypatch.setattr(runs, "TIMED_S", 0.01)
    words = ["--seeds", "0", "--steps", "4", "--tune-steps", "2", "--images", "20", "--out", str(tmp_path)]
    assert compare_pruning.main(["--tables", "depth,sparse,shares", *words, "--", "--train.lr=0.004"]) == 0
    rates = {run.name.split("-")[0]: read_checkpoint(run).config().train.lr for run in (tmp_path / "runs").iterdir()}
    assert rates == {"dense": 0.004, "depth": 0.002, "sparse": 0.004}, "fine-tuning has half the learning rate"
    for name, found in (("depth", {"dense", "both, macs 0.5"}), ("sparse", {"dense", "gradual, 50%", "random, 50%"})):
        measured = json.loads((tmp_path / f"{name}-4-2.json").read_text())
        assert {f"{row}, seed 0" for row in found} <= set(measured)
        table = (tmp_path / f"{name}-4-2.md").read_text()
        for row in found:
            values = measured[f"{row}, seed 0"]
            result = json.loads(
                next(
                    tmp_path.glob(f"runs/{name}-{row.replace(', ', '-').replace(' ', '')}-4-2-seed0/result.json")
                ).read_text()
            )
            assert values["val/loss"] == result["figures"]["val/loss"]
            assert f"| {row} | {values['model/macs'] / 1e6:.2f} M |" in table
            assert f"| {values['val/loss']:.4f} |" in table
    shares = json.loads((tmp_path / "shares-4.json").read_text())["0.5, seed 0"]
    assert f"| 50% | {shares['dense']:.4f} | {shares['uniform']:.4f} |" in (tmp_path / "shares-4.md").read_text()


def test_results_are_kept_as_they_come(tmp_path: Path) -> None:
    results = Results(tmp_path / "deep" / "table.json")
    whole = dict.fromkeys(FIGURES, 1.0)
    results.add("l2 after, seed 0", whole | {"loss": 0.5})
    results.add("l2 after, seed 1", {"loss": 0.7})
    assert "l2 after, seed 1" not in results  # Not with all its figures.
    results.add("l2 after, seed 1", whole)
    again = Results(tmp_path / "deep" / "table.json")
    assert "l2 after, seed 1" in again
    assert "l2 after, seed 2" not in again
    assert again.over_seeds("l2 after", (0, 1), "loss") == [0.5, 0.7]
    assert mean_and_range([0.5, 0.7], ".2f") == "0.60 (0.50 to 0.70)"
    assert mean_and_range([0.5], ".0%") == "50%"


@pytest.mark.parametrize("preset", ["digits", "mnist", "cifar10"])
def test_runs_of_tables_have_every_figure_of_the_columns_on_any_data_set(preset: str) -> None:
    judged = {key.replace("__", "."): value for key, value in runs.JUDGED.items()}
    figures = build_config({"preset": preset}, judged).logged_figures()
    for start, _ in runs.COLUMNS.values():
        assert any(figure.startswith(start) for figure in figures), start
