"""A sweep as a report on W&B: made by the real client and package, read back through the package's own models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server import Sweep, WandbServer
from wandb_client import Client, finish

from agent import report
from diffusion_core.report.blocks import in_summary

METRIC = "eval/class_agreement"
TRIAL = """
import wandb
from pathlib import Path
from agent.tracking.tracker import WandbTracker
from diffusion_core.tracking import Upload

run = wandb.init()
tracker = WandbTracker(run)
lr = run.config["train.lr"]
for step in (10, 20):
    tracker.log({"val/loss": lr * step, "train/loss": 1.0, "eval/class_agreement": 1.0 - lr * 20 / step}, step)
costs = {"model/macs": int(1000 * lr), "model/params": 5}
tracker.summary(costs | {"protocol/eval/class_agreement": "n=200, sampler=ddim"})
Path("weights.bin").write_bytes(b"12345")
figures = {"val/loss": lr * 20, "eval/class_agreement": 1.0 - lr}
tracker.artifact(Upload(f"model-{run.id}", "model", [Path("weights.bin")], ["best"], {"step": 20, "figures": figures}))
tracker.close(0)
"""
READ = """
import wandb_workspaces.reports.v2 as wr
from wandb_workspaces.reports.v2 import internal
import sys

found = wr.Report.from_url({url!r})
panels = [panel for block in found.blocks if isinstance(block, wr.PanelGrid) for panel in block.panels]
grids = [block for block in found.blocks if isinstance(block, wr.PanelGrid)]
columns = [panel.columns for panel in panels if isinstance(panel, wr.ParallelCoordinatesPlot)][0]
result = {{
    "title": found.title,
    "blocks": [type(block).__name__ for block in found.blocks],
    "panels": [type(panel).__name__ for panel in panels],
    "filters": sorted({{runset.filters for grid in grids for runset in grid.runsets}}),
    "projects": sorted({{(runset.entity, runset.project) for grid in grids for runset in grid.runsets}}),
    "columns": [getattr(column.metric, "name", column.metric) for column in columns],
    "scatter": [[panel.x.name, panel.y.name] for panel in panels if isinstance(panel, wr.ScatterPlot)],
    "importance": [panel.with_respect_to for panel in panels if isinstance(panel, wr.ParameterImportancePlot)],
    "media": [panel.media_keys for panel in panels if isinstance(panel, wr.MediaBrowser)],
    "texts": [block.text for block in found.blocks if isinstance(block, wr.MarkdownBlock)],
}}
"""


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server
        assert server.errors == []


@pytest.fixture(scope="module")
def made(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A sweep of two trials, and what the command printed and made of it."""
    client = Client(server, tmp_path_factory.mktemp("report"))
    metric = {"name": METRIC, "goal": "maximize"}
    parameters = {"train.lr": {"values": [0.1, 0.3]}}
    sweep: Sweep = client.sweep(TRIAL, method="grid", metric=metric, parameters=parameters, name="two/<b>rates</b>")
    finish(client.agent(sweep))
    path = f"tester/test/{sweep.id}"
    printed = client.python("-m", "agent.report", path, "--wandb", "--out", "page.html")
    (url,) = [line.removeprefix("report on W&B: ") for line in printed.splitlines() if line.startswith("report on W&B")]
    read = client.script(READ.format(url=url))
    return {"sweep": sweep, "printed": printed, "read": read, "page": client.directory / "page.html"}


@pytest.mark.slow
def test_the_report_has_all_panels_over_the_runs_of_the_sweep(made: dict[str, Any]) -> None:
    read, sweep = made["read"], made["sweep"]
    assert read["title"] == "two/<b>rates</b>"
    wanted = {"ScatterPlot", "ParallelCoordinatesPlot", "ParameterImportancePlot", "LinePlot", "MediaBrowser"}
    assert wanted <= set(read["panels"])
    assert "WeaveBlockArtifact" in read["blocks"]
    assert read["projects"] == [["tester", "test"]]
    (filters,) = read["filters"]
    assert sweep.id in filters
    assert "weep" in filters
    assert read["columns"] == ["train.lr", f"{METRIC}.max"]
    assert ["model/macs", f"{METRIC}.max"] in read["scatter"]
    assert read["importance"] == [f"{METRIC}.max"]
    assert {"samples", "diffusion", "opinions"} <= set(read["media"][0])
    best = min(sweep.runs, key=lambda run: run.config["train.lr"])
    assert f"{best.id} is the best" in read["texts"][0]
    assert all(run.id in read["texts"][-1] for run in sweep.runs)


@pytest.mark.slow
def test_the_spec_names_settings_as_they_are_stored(made: dict[str, Any], server: WandbServer) -> None:
    (view,) = server.backend.views.views.values()
    text = json.dumps(json.loads(view["spec"]))
    assert '"config:train.lr.value"' in text
    assert '"config:train.value.lr"' not in text


@pytest.mark.slow
def test_the_page_is_in_the_best_run_and_an_artifact(made: dict[str, Any], server: WandbServer) -> None:
    sweep, page = made["sweep"], made["page"].read_bytes()
    best = min(sweep.runs, key=lambda run: run.config["train.lr"])
    other = max(sweep.runs, key=lambda run: run.config["train.lr"])
    assert f"in run {best.id} " in made["printed"]
    (logged,) = [row["report"] for row in best.history if "report" in row]
    assert logged["_type"] == "html-file"
    assert best.files[logged["path"]] == page
    assert not [row for row in other.history if "report" in row]
    assert best.state == "finished"
    assert best.summary[METRIC]["max"] == pytest.approx(0.9)  # What was there stays.
    assert list(server.artifact(f"report-{sweep.id}:latest").files.values()) == [page]


def test_summaries_hold_the_best_value_of_figures_with_a_goal() -> None:
    """What the tracker defines: the wanted names were written by W&B's client into the summary of a run."""
    assert in_summary("val/loss") == "val/loss.min"
    assert in_summary(METRIC) == f"{METRIC}.max"
    assert in_summary("model/macs") == "model/macs"


@pytest.mark.parametrize(
    "words", [["runs/x"], ["entity/project/sweep", "--format", "md"], ["entity/project/a", "entity/project/b"]]
)
def test_what_is_no_sweep_on_wandb_is_one_line(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert report.main([*words, "--wandb"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --wandb: {words[0]!r} is no sweep on W&B; expected ENTITY/PROJECT/ID")
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())
