"""The main job through the real tools: `wandb sweep`, `wandb agent`, artifacts pulled and sampled from; nothing mocked.

The server is the in-memory one of tests/server; client, Go core and agent are W&B's own, unmodified.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from forks import Forks
from image_files import frame_count
from PIL import Image
from server import Run, Sweep, WandbServer
from wandb_client import ROOT, Client, finish

from agent.config import TrialConfig
from diffusion_core.config import list_knobs

TINY: dict[str, Any] = {
    "preset": "digits",
    "model.channels": 16,
    "model.channel_multipliers": [1, 1],
    "model.norm_groups": 2,
    "train.steps": 6,
    "train.warmup_steps": 2,
    "log.every": 2,
    "eval.every": 2,
    "eval.val_images": 20,
    "eval.num_images": 20,
    "sample.every": 6,
    "sample.steps": 4,
    "sample.per_class": 2,
    "checkpoint.every": 3,
    "checkpoint.best_metric": "val/loss",
}
COMMAND = ["${env}", "${interpreter}", "-m", "agent", "${args}"]
METRIC = {"name": "val/loss", "goal": "minimize"}


def sweep_config(method: str, parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
    fixed = {key: {"value": value} for key, value in TINY.items()}
    return {"method": method, "metric": METRIC, "command": COMMAND, "parameters": fixed | parameters, **more}


SWEEPS = {
    "grid": sweep_config(
        "grid",
        {"diffusion.schedule": {"values": ["linear", "cosine"]}, "prune.method": {"values": ["none", "magnitude"]}},
    ),
    "random": sweep_config(
        "random",
        {"train.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}, "data.horizontal_flip":
         {"values": [True, False]}, "prune.method": {"value": "structured"}, "prune.keep": {"value": 0.5},
         "prune.depth": {"values": [0.5, "auto"]}, "prune.calibration_batches": {"value": 2}},
        run_cap=2,
    ),
    "bayes": sweep_config(
        "bayes", {"train.lr": {"min": 1e-4, "max": 1e-2}, "train.grad_clip": {"value": None}}, run_cap=3
    ),
}  # fmt: skip
TRIALS = {"grid": 4, "random": 2, "bayes": 3}


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server
        assert server.errors == []


@pytest.fixture(scope="module")
def swept(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Client, Sweep]]:
    """Each sweep created by `wandb sweep` and run to its end by `wandb agent`, all three agents at once."""
    done = {}
    agents = []
    for method, config in SWEEPS.items():
        client = Client(server, tmp_path_factory.mktemp(method))
        (client.directory / "sweep.yaml").write_text(yaml.safe_dump(config))
        before = set(server.sweeps)
        client.wandb("sweep", "sweep.yaml")
        (sweep_id,) = set(server.sweeps) - before
        done[method] = client, server.sweeps[sweep_id]
        agents.append(client.agent(server.sweeps[sweep_id]))
    for agent in agents:
        finish(agent)
    return done


def points(run: Run, key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in run.history if key in row]


@pytest.mark.slow
@pytest.mark.parametrize("method", list(SWEEPS))
def test_every_trial_of_a_sweep_arrives_whole(method: str, swept: dict[str, tuple[Client, Sweep]]) -> None:
    _, sweep = swept[method]
    assert [run.state for run in sweep.runs] == ["finished"] * TRIALS[method]
    for run in sweep.runs:
        assert run.exit_code == 0
        # Configuration: every knob, by its dotted key, with the sweep's values.
        assert set(run.config) >= {key for key, _ in list_knobs(TrialConfig)}
        assert run.suggested is not None
        for key, value in TINY.items():
            assert run.config[key] == value, key
        # History: losses at each interval, at our own steps, without gap or repeat.
        pruned_at = [3] if run.config["prune.method"] != "none" else []  # One row more, right before pruning.
        assert [step for step, _ in points(run, "train/loss")] == sorted([2, 4, 6, *pruned_at])
        # What was measured before the pruning has names of its own: no pruned network is ranked by it.
        assert [step for step, _ in points(run, "val/loss")] == ([4, 6] if pruned_at else [2, 4, 6])
        assert [step for step, _ in points(run, "dense/val/loss")] == ([2] if pruned_at else [])
        steps = [row["step"] for row in run.history]
        assert steps == sorted(set(steps))
        assert all(math.isfinite(loss) for key in ("train/loss", "val/loss") for _, loss in points(run, key))
        assert all(0 <= share <= 1 for _, share in points(run, "eval/class_agreement"))
        assert {"train/lr", "train/images_per_second"} <= set(run.history[0])
        # Summary: the lowest loss, not the last; what the network costs.
        assert run.summary["val/loss"]["min"] == pytest.approx(min(loss for _, loss in points(run, "val/loss")))
        assert run.summary["model/params"] >= run.summary["model/nonzero_params"] > 0


@pytest.mark.slow
def test_the_trials_differ_as_the_sweep_says(swept: dict[str, tuple[Client, Sweep]]) -> None:
    grid = swept["grid"][1].runs
    chosen = {(run.config["diffusion.schedule"], run.config["prune.method"]) for run in grid}
    assert chosen == {(s, p) for s in ("linear", "cosine") for p in ("none", "magnitude")}
    for run in grid:
        if run.config["prune.method"] == "magnitude":
            assert run.summary["prune/sparsity"] == pytest.approx(0.5, abs=1e-4)
            assert run.summary["model/nonzero_params"] < run.summary["model/params"]
        else:
            assert "prune/sparsity" not in run.summary
    dense = grid[0].summary["model/macs"]
    for run in swept["random"][1].runs:
        assert 1e-4 <= run.config["train.lr"] <= 1e-2
        assert run.summary["model/macs"] == pytest.approx(0.5 * dense, rel=0.1)
    rates = [run.config["train.lr"] for run in swept["bayes"][1].runs]
    assert len(set(rates)) == 3
    assert all(run.config["train.grad_clip"] is None for run in swept["bayes"][1].runs)


@pytest.mark.slow
def test_pictures_arrive(swept: dict[str, tuple[Client, Sweep]]) -> None:
    for _, sweep in swept.values():
        for run in sweep.runs:
            row = next(row for row in run.history if "samples" in row)
            assert row["step"] == 6
            grid = Image.open(io.BytesIO(run.files[row["samples"]["path"]]))
            assert grid.format == "PNG"
            assert len(np.unique(np.asarray(grid))) > 10
            animation = Image.open(io.BytesIO(run.files[row["diffusion"]["path"]]))
            assert animation.format == "GIF"
            # The noisy images of four steps, and the finished one; GIF has no two equal frames in a row.
            assert frame_count(animation) in (4, 5)


@pytest.mark.slow
def test_checkpoints_arrive_as_artifacts(server: WandbServer, swept: dict[str, tuple[Client, Sweep]]) -> None:
    for _, sweep in swept.values():
        for run in sweep.runs:
            made = {kind: [a for a in run.output_artifacts if a.type == kind] for kind in ("model", "training-state")}
            for kind, versions in made.items():
                assert [a.name for a in versions] == [f"{kind}-{run.id}"] * 2
                aliases = [alias for a in versions for alias in a.aliases]
                assert sorted(aliases) == sorted(set(aliases))
                assert {"latest", "best", "step-3", "step-6"} <= set(aliases)
            final = next(a for a in made["model"] if "step-6" in a.aliases)
            assert "latest" in final.aliases
            # Who samples downloads neither the optimizer nor a second copy of the weights.
            assert set(final.files) == {"checkpoint.json", "ema.safetensors"}
            assert final.metadata["step"] == 6
            assert final.metadata["config"]["train.lr"] == run.config["train.lr"]
            assert final.metadata["figures"]["val/loss"] == pytest.approx(points(run, "val/loss")[-1][1])
            assert {"model.safetensors", "optimizer.safetensors"} <= set(made["training-state"][0].files)


@pytest.mark.slow
def test_another_machine_samples_from_the_best_model(
    server: WandbServer, swept: dict[str, tuple[Client, Sweep]], tmp_path: Path
) -> None:
    _, sweep = swept["grid"]
    best = min(sweep.runs, key=lambda run: run.summary["val/loss"]["min"])
    elsewhere = Client(server, tmp_path)
    script = str(ROOT / "scripts" / "sample_images.py")
    settings = ["--labels", "0,3,7", "--num-images", "7", "--steps", "3", "--seed", "5"]
    elsewhere.python(script, "--artifact", f"model-{best.id}:best", *settings, "--out", "pulled", "--gif")
    names = {f"{label}-{index}.png" for label, index in [(0, 0), (3, 0), (7, 0), (0, 1), (3, 1), (7, 1), (0, 2)]}
    pulled = tmp_path / "pulled"
    assert {path.name for path in pulled.glob("*.png")} == names | {"grid.png"}
    assert frame_count(Image.open(pulled / "diffusion.gif")) in (3, 4)

    # The same images as from the checkpoint on the disk of the machine that trained it.
    version = server.artifact(f"model-{best.id}:best")
    home = swept["grid"][0].directory / "runs" / best.id / "checkpoints" / f"step-{version.metadata['step']:08d}"
    elsewhere.python(script, "--checkpoint", str(home), *settings, "--out", "local")
    for name in names:
        assert (pulled / name).read_bytes() == (tmp_path / "local" / name).read_bytes()

    output = elsewhere.python(script, "--artifact", "model-nobody:best", code=2)
    assert output.strip().splitlines()[-1].startswith("error: --artifact = 'model-nobody:best'")


@pytest.mark.slow
def test_agent_sweep_online_in_one_command(server: WandbServer, tmp_path: Path) -> None:
    client = Client(server, tmp_path)
    config = sweep_config("grid", {"seed": {"values": [0, 1]}})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    # The key comes from .env in the working directory, as a user would have it.
    (tmp_path / ".env").write_text(f"WANDB_API_KEY={client.env.pop('WANDB_API_KEY')}\nWANDB_MODE=\n")
    output = client.command(client.interpreter, "-m", "agent.sweep", "mine.yaml")
    sweep = next(
        sweep for sweep in server.sweeps.values() if sweep.display_name == "mine" or "mine" in sweep.config_yaml
    )
    assert [run.state for run in sweep.runs] == ["finished", "finished"]
    assert [run.config["seed"] for run in sweep.runs] == [0, 1]
    first = min(sweep.runs, key=lambda run: run.summary["val/loss"]["min"])
    rows = [line for line in output.splitlines() if re.match(r"^\d +\S+ +finished", line)]
    assert rows[0].split()[1] == first.id
    assert len(rows) == 2


@pytest.mark.slow
def test_no_key_ever_leaves_the_environment(server: WandbServer, swept: dict[str, tuple[Client, Sweep]]) -> None:
    key = server.api_key.encode()
    assert server.received
    assert not [path for path, body in server.received if key in body]
    for client, _ in swept.values():
        for path in (client.directory / "runs").rglob("*"):
            assert not (path.is_file() and key in path.read_bytes()), path


def offline_environment(home: Path) -> dict[str, str]:
    """A machine without any W&B account."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    own = {"HOME": str(home), "NETRC": str(home / "none"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return environment | own


@pytest.mark.slow
def test_the_same_file_runs_without_an_account(tmp_path: Path, forks: Forks) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(SWEEPS["grid"]))
    command = [str(forks.interpreter), "-m", "agent.sweep", "mine.yaml", "--offline"]
    environment = offline_environment(tmp_path / "home")

    def sweep(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    part = sweep("--count", "3")
    assert part.returncode == 0, part.stderr
    whole = sweep()  # Goes on where the first call stopped.
    assert whole.returncode == 0, whole.stderr

    folder = tmp_path / "runs" / "sweeps" / "mine"
    results = json.loads((folder / "results.json").read_text())
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [trial["id"] for trial in results]
    assert len(results) == 4
    assert {trial["state"] for trial in results} == {"finished"}
    losses = [trial["figures"]["val/loss"] for trial in results]
    assert losses == sorted(losses)  # Best first.
    combinations = {(row["diffusion.schedule"], row["prune.method"]) for row in rows}
    assert len(combinations) == 4
    printed = [line.split()[1] for line in whole.stdout.splitlines() if re.match(r"^\d +mine-", line)]
    assert printed == [trial["id"] for trial in results]
    for trial in results:
        assert (tmp_path / trial["best_checkpoint"] / "ema.safetensors").is_file()
        assert Image.open(folder / f"{trial['id']}-samples.png").format == "PNG"
        assert Image.open(folder / f"{trial['id']}-diffusion.gif").format == "GIF"

    # W&B's own viewer finds losses, grids, GIF and figures in the offline run.
    run = next((folder / "trials" / results[0]["id"] / "wandb").glob("offline-run-*"))
    shown = subprocess.run(
        [forks.interpreter, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(run)],
        env=environment, capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    for name in ("train/loss", "val/loss", "samples", "diffusion", "eval/class_agreement", "model/macs"):
        assert name in shown, name

    # Another sweep under the same name is refused, and harms nothing.
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(SWEEPS["random"]))
    other = sweep()
    assert other.returncode == 2
    assert other.stderr.startswith("error: ")
    assert len(other.stderr.splitlines()) == 1
    assert json.loads((folder / "results.json").read_text()) == results


@pytest.mark.slow
def test_an_offline_sweep_synced_later_is_complete_on_the_server(
    server: WandbServer, tmp_path: Path, forks: Forks
) -> None:
    (tmp_path / "later.yaml").write_text(yaml.safe_dump(sweep_config("grid", {"seed": {"values": [7, 8]}})))
    subprocess.run(
        [forks.interpreter, "-m", "agent.sweep", "later.yaml", "--offline"],
        cwd=tmp_path, env=offline_environment(tmp_path / "home"), check=True, timeout=300, capture_output=True,
    )  # fmt: skip
    client = Client(server, tmp_path)
    folders = sorted(str(path) for path in tmp_path.glob("runs/sweeps/later/trials/*/wandb/offline-run-*"))
    assert len(folders) == 2
    client.wandb("sync", *folders)
    runs = [run for run in server.runs.values() if run.group == "later"]
    assert sorted(run.config["seed"] for run in runs) == [7, 8]
    for run in runs:
        assert run.state == "finished"
        assert [step for step, _ in points(run, "val/loss")] == [2, 4, 6]
        assert {"best", "step-6"} <= {alias for a in run.output_artifacts for alias in a.aliases}
        assert any(name.endswith(".gif") for name in run.files)


def test_a_failed_download_names_the_alternatives(tmp_path: Path, forks: Forks) -> None:
    unreachable = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = offline_environment(tmp_path) | unreachable
    done = subprocess.run(
        [forks.interpreter, str(ROOT / "scripts" / "train_cifar.py"), "--train.steps=1"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "data.name = 'cifar10'" in line
    assert "data.name=digits" in line
    assert "data.name=folder" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
