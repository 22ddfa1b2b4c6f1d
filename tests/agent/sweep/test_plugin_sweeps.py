"""Sweeps with a plugin's sampler, data set and metric: by W&B's agent and offline, then sampled; without the plugin.

A machine is a folder and a search path for modules; the plugin is outside the repository.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from forks import Fork
from server import Run, Sweep, WandbServer
from test_extending import RECIPES
from tiny import TINY
from wandb_client import ROOT, Client, finish

from agent.sweep.file import check_sweep
from diffusion_core.checkpoint import read_checkpoint
from diffusion_core.run_folder import CHECKPOINTS, RESULT_FILE
from diffusion_core.search.sweep import SweepError

SAMPLER = RECIPES["sample.sampler=halfway"][2]
DATA_SET = RECIPES["data.name=stripes"][2]
IMAGE_METRIC = RECIPES["eval.figures=contrast"][2]
METRIC = "eval/contrast_10"
MODULES = {
    "my_plugin": f"{SAMPLER}\n{DATA_SET}\n{IMAGE_METRIC}",
    "raises": f"{SAMPLER}\nraise RuntimeError('no\\nluck')\n",  # After it has added a sampler.
    "exits": "import sys\n\nsys.exit(0)\n",
}
REMEDY = "; install it, or add its folder to PYTHONPATH"
ABSENT = f"plugins = 'my_plugin': cannot import it (No module named 'my_plugin'){REMEDY}"
NOT_LOADED = "it was made with the plugin my_plugin, which is not loaded: install it and give --plugins=my_plugin"
SAMPLE = [str(ROOT / "scripts" / "sample_images.py"), "--num-images", "2", "--device", "cpu"]
COMMAND = ["${env}", "${interpreter}", "-m", "agent", "${args}"]


def content(plugin: str = "my_plugin") -> dict[str, Any]:
    own = {"plugins": [plugin], "data.name": "stripes", "train.steps": 4, "sample.every": 0, "eval.every": 2,
           "eval.figures": ["contrast"], "eval.num_images": 10, "checkpoint.every": 2,
           "checkpoint.best_metric": METRIC}  # fmt: skip
    fixed = {key: {"value": value} for key, value in (TINY | own).items()}
    metric = {"name": METRIC, "goal": "maximize"}
    varied = {"sample.sampler": {"values": ["ddim", "halfway"]}}
    return {"method": "grid", "metric": metric, "command": COMMAND, "parameters": fixed | varied}


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server
        assert server.errors == []


@pytest.fixture(scope="module")
def search_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where a machine with the plugins finds modules; another machine finds those of the repository alone."""
    folder = tmp_path_factory.mktemp("plugins")
    for name, source in MODULES.items():
        (folder / f"{name}.py").write_text(source)
    return os.pathsep.join([str(ROOT), str(folder)])


@pytest.fixture
def bare(server: WandbServer, tmp_path: Path) -> Client:
    """A machine without the plugins."""
    return Client(server, tmp_path)


@pytest.fixture(scope="module")
def swept(
    server: WandbServer, search_path: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Client, dict[str, Run]]:
    """The machine that has run a sweep to its end, and the runs by their sampler."""
    client = Client(server, tmp_path_factory.mktemp("swept"))
    client.env["PYTHONPATH"] = search_path
    sweep = create(client)
    finish(client.agent(sweep))
    return client, {run.config["sample.sampler"]: run for run in sweep.runs}


def create(client: Client) -> Sweep:
    """`wandb sweep`, which checks no values."""
    (client.directory / "mine.yaml").write_text(yaml.safe_dump(content()))
    before = set(client.server.sweeps)
    client.wandb("sweep", "mine.yaml")
    (sweep_id,) = set(client.server.sweeps) - before
    return client.server.sweeps[sweep_id]


def refusal(command: Fork) -> str:
    """The one line that a command which cannot use its input prints."""
    (line,) = command.end(2).splitlines()
    return line


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_wandb_agent_runs_a_sweep_over_a_plugin(swept: tuple[Client, dict[str, Run]]) -> None:
    client, runs = swept
    assert set(runs) == {"ddim", "halfway"}
    for sampler, run in runs.items():
        assert (run.state, run.exit_code) == ("finished", 0)
        given = {"plugins": ["my_plugin"], "data.name": "stripes", "sample.sampler": sampler}
        assert run.config.items() >= given.items()
        assert [row["step"] for row in run.history if math.isfinite(row.get(METRIC, math.nan))] == [2, 4]
        assert run.summary[METRIC]["max"] == max(row[METRIC] for row in run.history if METRIC in row)
        (model,) = [a for a in run.output_artifacts if a.type == "model" and "step-4" in a.aliases]
        assert model.metadata["config"].items() >= given.items()
        newest = read_checkpoint(client.directory / "runs" / run.id)
        assert tuple(newest.class_names) == ("horizontal", "vertical")


@pytest.mark.slow
def test_the_same_file_runs_offline(server: WandbServer, bare: Client, search_path: str) -> None:
    (bare.directory / "mine.yaml").write_text(yaml.safe_dump(content()))
    before = set(server.runs)
    bare.python("-m", "agent.sweep", "mine.yaml", "--offline", PYTHONPATH=search_path)
    trials = json.loads((bare.directory / "runs/sweeps/mine/results.json").read_text())
    assert [trial["state"] for trial in trials] == ["finished"] * 2
    best, other = (trial["figures"][METRIC] for trial in trials)
    assert best >= other
    assert {trial["config"]["sample.sampler"] for trial in trials} == {"ddim", "halfway"}
    for trial in trials:
        assert trial["config"]["plugins"] == ["my_plugin"]
        assert trial["config"]["data.name"] == "stripes"
    assert set(server.runs) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plugin", "reason", "mode"),
    [
        ("absent", "No module named 'absent'", "--offline"),
        ("absent", "No module named 'absent'", "--agents=1"),
        ("raises", "no luck", "--offline"),
        ("exits", "it calls sys.exit(0)", "--offline"),
    ],
)
def test_a_plugin_that_cannot_be_imported_stops_a_sweep_before_it_starts(
    plugin: str, reason: str, mode: str, server: WandbServer, bare: Client, search_path: str
) -> None:
    (bare.directory / "mine.yaml").write_text(yaml.safe_dump(content(plugin)))
    before = set(server.sweeps)
    process = bare.fork("-m", "agent.sweep", "mine.yaml", mode, PYTHONPATH=search_path)
    assert refusal(process) == f"error: mine.yaml: plugins = {plugin!r}: cannot import it ({reason}){REMEDY}"
    assert set(server.sweeps) == before
    assert not (bare.directory / "runs").exists()


@pytest.mark.parametrize(
    "spec",
    [3, "json", {}, {"value": "a b"}, {"values": []}, {"min": 0.0, "max": 1.0}, {"parameters": {"a": {"value": 1}}}],
)
def test_a_plugins_parameter_of_another_form_is_refused(spec: Any) -> None:
    sweep = content()
    sweep["parameters"] = {"preset": {"value": "digits"}, "plugins": spec}
    with pytest.raises(SweepError, match=r"^mine\.yaml: plugins"):
        check_sweep(sweep | {"metric": None, "method": "random"}, "mine.yaml", "mine")


@pytest.mark.slow
def test_a_machine_without_the_plugin_joins_no_sweep(bare: Client) -> None:
    sweep = create(bare)
    path = f"tester/test/{sweep.id}"
    assert refusal(bare.fork("-m", "agent.sweep", "--attach", path)) == f"error: {path}: {ABSENT}"
    assert sweep.runs == []
    # W&B's own agent checks nothing: each trial says it.
    output = finish(bare.agent(sweep))
    assert [line for line in output.splitlines() if "error:" in line] == [f"error: {ABSENT}"] * 2
    assert "Traceback" not in output
    assert all(run.state != "finished" and not run.history for run in sweep.runs)
    assert not (bare.directory / "runs").exists()


@pytest.mark.slow
def test_what_a_sweep_trained_is_sampled_where_the_plugin_is(
    swept: tuple[Client, dict[str, Run]], bare: Client, search_path: str
) -> None:
    client, runs = swept
    run = runs["halfway"].id
    common = [*SAMPLE, "--plugins=my_plugin"]
    for out, source in (
        ("disk", f"--checkpoint={client.directory / 'runs' / run}"),
        ("pulled", f"--artifact=model-{run}"),  # By the same rule, the best one.
    ):
        bare.python(*common, source, "--out", out, PYTHONPATH=search_path)
    images = {path.name: path.read_bytes() for path in (bare.directory / "disk").glob("*.png")}
    assert set(images) == {"0-0.png", "1-0.png", "grid.png"}
    assert images == {path.name: path.read_bytes() for path in (bare.directory / "pulled").glob("*.png")}
    settings = json.loads((bare.directory / "disk" / "samples.json").read_text())
    assert settings["sample"]["sampler"] == "halfway"


@pytest.mark.slow
def test_sampling_says_which_plugin_is_missing(
    swept: tuple[Client, dict[str, Run]], bare: Client, search_path: str
) -> None:
    client, runs = swept
    run = runs["ddim"].id
    folder = client.directory / "runs" / run
    on_disk = [*SAMPLE, "--checkpoint", str(folder), "--which=newest"]
    # Not given: neither a machine without the plugin nor one with it imports what a file names.
    for path in (str(ROOT), search_path):
        line = refusal(bare.fork(*on_disk, PYTHONPATH=path))
        assert line.startswith(f"error: {str(folder / CHECKPOINTS / 'step-00000004')!r}: {NOT_LOADED}")
    # Given, and not there.
    assert refusal(bare.fork(*on_disk, "--plugins=my_plugin")) == f"error: {ABSENT}"
    assert {path.name for path in bare.directory.iterdir()} == {"home"}

    pulled = [*SAMPLE, "--artifact", f"model-{run}:best"]
    assert refusal(bare.fork(*pulled, "--plugins=my_plugin")) == f"error: {ABSENT}"
    *_, line = bare.python(*pulled, code=2).splitlines()
    assert line.startswith("error: ")
    assert NOT_LOADED in line
    assert not (bare.directory / "samples").exists()


@pytest.mark.slow
def test_a_run_is_continued_where_the_plugin_is_and_left_alone_elsewhere(
    swept: tuple[Client, dict[str, Run]], bare: Client, search_path: str
) -> None:
    client, runs = swept
    run = runs["halfway"].id
    there = client.directory / "runs" / run
    here = Path(shutil.copytree(there, bare.directory / "runs" / run))
    shutil.rmtree(here / CHECKPOINTS / "step-00000004")  # As if it had been stopped after two steps.
    (here / RESULT_FILE).unlink()
    before = files(here)
    command = ["-m", "agent", "--config", str(here / "config.yaml"), f"--log.dir={here}"]
    assert refusal(bare.fork(*command)) == f"error: {ABSENT}"
    assert files(here) == before
    bare.python(*command, PYTHONPATH=search_path, WANDB_MODE="disabled")
    weights = Path(CHECKPOINTS, "step-00000004", "ema.safetensors")
    assert (here / weights).read_bytes() == (there / weights).read_bytes()
