"""Where a model comes from, as anyone can see it in W&B: images, the dense model, the pruned one, the fine-tuned one.

A sweep over pruner, target and fine-tuning budget, by the real `wandb agent`, from a dense model in W&B; then
scripts/prune.py on an artifact; all read back through wandb's public API.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from server import WandbServer
from wandb_client import ROOT, Client, finish

pytestmark = pytest.mark.slow

TINY: dict[str, Any] = {
    "preset": "digits",
    "model.channels": 16,
    "model.channel_multipliers": [1, 1],
    "model.norm_groups": 2,
    "train.warmup_steps": 1,
    "log.every": 2,
    "eval.every": 0,
    "eval.val_images": 20,
    "eval.classifier": "none",
    "sample.every": 0,
    "sample.steps": 2,
    "sample.per_class": 1,
    "checkpoint.every": 0,
    "checkpoint.best_metric": "val/loss",
}
DENSE = "tester/test/model-dense:latest"
LINEAGE = """
import wandb
api = wandb.Api()
def names(artifacts):
    return sorted(artifact.name.split(":")[0] for artifact in artifacts)
result = {}
for run in api.runs("tester/test"):
    result[run.id] = {"used": names(run.used_artifacts()), "logged": names(run.logged_artifacts()),
                      "config": dict(run.config),
                      "summary": {key: run.summary.get(key) for key in ("model/macs", "model/params")}}
for run in [run for run in result if f"pruned-{run}" in result[run]["logged"]]:
    pruned = api.artifact(f"tester/test/pruned-{run}:latest")
    result[run]["pruned by"] = pruned.logged_by().id
    result[run]["goes on from pruned"] = [user.id for user in pruned.used_by()]
    result[run]["parent"] = pruned.metadata["parent"]["artifact"]
result["users of dense"] = sorted(run.id for run in api.artifact("tester/test/model-dense:latest").used_by())
"""


def words(**changes: Any) -> list[str]:
    settings = TINY | {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--{key}={value}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with WandbServer() as server:
        client = Client(server, tmp_path_factory.mktemp("client"))
        client.env |= {"WANDB_PROJECT": "test", "WANDB_ENTITY": "tester"}
        client.python("-m", "agent", *words(train__steps=2), WANDB_RUN_ID="dense")
        sweep = {
            "method": "random",
            "run_cap": 2,
            "command": ["${env}", "${interpreter}", "-m", "agent", "${args}"],
            "parameters": {
                **{key: {"value": value} for key, value in TINY.items()},
                "init.artifact": {"value": DENSE},
                "prune.step": {"value": 0},
                "prune.method": {"values": ["structured"]},
                "prune.importance": {"values": ["l2", "random"]},
                "prune.target": {"values": ["macs", "params"]},
                "prune.keep": {"values": [0.4, 0.6]},
                "train.steps": {"values": [2, 3]},
            },
        }
        (client.directory / "sweep.yaml").write_text(yaml.safe_dump(sweep))
        client.wandb("sweep", "sweep.yaml")
        (created,) = server.sweeps.values()
        finish(client.agent(created))
        client.python(
            str(ROOT / "scripts" / "prune.py"),
            *("--artifact", DENSE, "--target", "macs=0.5", "--out", "smaller", "--upload", "--json"),
        )
        yield client
        assert server.errors == []


@pytest.fixture(scope="module")
def lineage(client: Client) -> dict[str, Any]:
    return client.script(LINEAGE)


def test_a_sweep_prunes_and_fine_tunes_and_its_lineage_shows(client: Client, lineage: dict[str, Any]) -> None:
    (sweep,) = client.server.sweeps.values()
    assert [run.state for run in sweep.runs] == ["finished"] * 2
    for run in sweep.runs:
        seen = lineage[run.id]
        assert {"data-digits", "model-dense", f"pruned-{run.id}"} <= set(seen["used"])
        assert {f"pruned-{run.id}", f"model-{run.id}"} <= set(seen["logged"])
        assert seen["pruned by"] == run.id
        assert seen["goes on from pruned"] == [run.id]
        assert seen["parent"] == "tester/test/model-dense:v0"
        target, keep = seen["config"]["prune.target"], seen["config"]["prune.keep"]
        dense = lineage["dense"]["summary"][f"model/{target}"]
        assert seen["summary"][f"model/{target}"] / dense == pytest.approx(keep, rel=0.03)
    assert lineage["dense"]["used"] == ["data-digits"]
    assert set(lineage["users of dense"]) > {run.id for run in sweep.runs}


def test_the_script_logs_a_child_of_the_artifact(client: Client, lineage: dict[str, Any]) -> None:
    written = json.loads(next(Path(client.directory / "smaller").glob("step-*/checkpoint.json")).read_text())
    assert written["extra"]["parent"]["artifact"] == "tester/test/model-dense:v0"
    by_script = [seen for name, seen in lineage.items() if name != "users of dense" and seen["used"] == ["model-dense"]]
    assert len(by_script) == 1
    (name,) = by_script[0]["logged"]
    assert name.startswith("model-")
