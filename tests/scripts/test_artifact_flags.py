"""Flags of scripts that take a model from W&B by its artifact's name, with the real client and a real run's model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from server import WandbServer
from tiny import TINY
from wandb_client import ROOT, Client

FEW = {"train.steps": 4, "sample.every": 0, "eval.classifier": "none", "checkpoint.best_metric": "val/loss"}


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server
        assert server.errors == []


def trained(server: WandbServer, folder: Path, run_id: str, **knobs: Any) -> str:
    """The id of a finished run, whose model is on the server."""
    client = Client(server, folder)
    (client.directory / "config.yaml").write_text(json.dumps(TINY | FEW | knobs))  # JSON is YAML.
    client.python("-m", "agent", "--config", "config.yaml", WANDB_PROJECT="test", WANDB_RUN_ID=run_id)
    return run_id


@pytest.fixture(scope="module")
def run(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained(server, tmp_path_factory.mktemp("training"), "one")


@pytest.fixture
def client(server: WandbServer, tmp_path: Path) -> Client:
    """Another machine: nothing of the training is on its disk."""
    return Client(server, tmp_path)


@pytest.mark.slow
def test_evaluate_takes_a_model_from_wandb_and_sends_its_figures_there(
    server: WandbServer, run: str, client: Client
) -> None:
    words = ["--artifact", f"test/model-{run}:best", "--num-images", "20", "--figures", "kernel", "--device", "cpu"]
    output = client.python(str(ROOT / "scripts" / "evaluate.py"), *words, "--wandb")
    assert "checkpoint: tester/test/model-one:v" in output
    version = server.artifact(f"model-{run}:best")
    (file,) = client.directory.glob("**/evaluation.json")
    found = json.loads(file.read_text())
    assert {"eval/kd_classifier-digits_20_train", "eval/seconds_per_image"} <= set(found["figures"])
    assert "W&B: tester/test/model-one:v" in output
    for name, value in found["figures"].items():
        assert version.metadata["figures"][name] == value
        assert server.runs[run].summary[name] == value
    for name, line in found["protocols"].items():
        assert version.metadata["protocols"][name] == line
    assert version.metadata["step"] == 4  # What was there stays.


@pytest.mark.slow
def test_evaluate_says_in_one_line_that_an_artifact_is_missing(run: str, client: Client) -> None:
    script = str(ROOT / "scripts" / "evaluate.py")
    output = client.python(script, "--artifact", "test/model-nobody:best", "--device", "cpu", code=2)
    assert output.strip().splitlines()[-1].startswith("error: --artifact = 'test/model-nobody:best'")


@pytest.mark.slow
def test_a_model_from_wandb_guides_sampling(server: WandbServer, run: str, client: Client) -> None:
    script = str(ROOT / "scripts" / "sample_images.py")
    common = ["--artifact", f"test/model-{run}", "--num-images", "2", "--labels", "1,2", "--device", "cpu"]
    guided = ["--guide-artifact", f"test/model-{run}:v0", "--guidance", "3"]
    client.python(script, *common, "--out", "plain")
    client.python(script, *common, *guided, "--out", "guided")
    settings = json.loads((client.directory / "guided" / "samples.json").read_text())
    assert settings != json.loads((client.directory / "plain" / "samples.json").read_text())
    assert len(list((client.directory / "guided").glob("?-0.png"))) == 2


@pytest.mark.slow
def test_a_chain_of_models_from_wandb_is_its_stages(server: WandbServer, run: str, client: Client) -> None:
    knobs = {"upsample.factor": 2, "data.image_size": 16, "model.attention_resolutions": [8]}
    up = trained(server, client.directory / "training", "two", **knobs)
    script, base = str(ROOT / "scripts" / "sample_images.py"), ["--artifact", f"test/model-{run}"]
    few = ["--num-images", "2", "--labels", "1,2", "--device", "cpu"]
    output = client.python(script, *base, *few, "--upsample", f"test/model-{up}:best", "--out", "chain")
    assert "checkpoint: tester/test/model-one:v" in output
    assert "checkpoint: tester/test/model-two:v" in output
    client.python(script, *base, *few, "--out", "small")
    client.python(script, "--artifact", f"test/model-{up}", "--low", "small", "--device", "cpu", "--out", "large")
    for name in ("1-0.png", "2-0.png"):
        one, other = (np.asarray(Image.open(client.directory / folder / name), int) for folder in ("chain", "large"))
        assert one.shape == (16, 16)
        assert np.abs(one - other).max() <= 1


@pytest.mark.slow
def test_a_model_from_wandb_is_exported(run: str, client: Client) -> None:
    script = str(ROOT / "scripts" / "export_model.py")
    client.python(script, "--artifact", f"test/model-{run}", "--format", "torch", "--out", "out")
    assert {path.name for path in (client.directory / "out").iterdir()} == {"model.pt2", "model.json"}
