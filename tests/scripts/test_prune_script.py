"""scripts/prune.py: what it writes and prints, and that it refuses in one line and writes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import evaluate
import prune
import pytest
import torch
from tiny import TINY, digits
from wandb_client import ROOT

from agent.config import build_config
from agent.trial import run_trial
from diffusion_core.checkpoint import list_checkpoints, read_checkpoint
from diffusion_core.model.cost import count_cost
from diffusion_core.model.depth import removable_blocks, removed_blocks
from diffusion_core.tracking import MemoryTracker
from pruning.channels.removal import Removal, remove

SCRIPT = ROOT / "scripts" / "prune.py"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "dense"
    quiet = {"eval.every": 0, "eval.classifier": "none", "sample.every": 0, "checkpoint.every": 0, "train.steps": 3}
    config = build_config(TINY, quiet, {"model.channels": 16})
    run_trial(config, MemoryTracker(), dataset=digits(), folder=folder, run_id="dense")
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def call(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert prune.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_prunes_a_checkpoint_and_what_it_wrote(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The result is a checkpoint: it samples, says what was done, names its parent, and is pruned again."""
    source = read_checkpoint(dense)
    result = call(capsys, "--checkpoint", str(dense), "--target", "macs=0.5", "--out", str(tmp_path / "once"))
    written = read_checkpoint(tmp_path / "once")
    assert result["checkpoint"] == str(written.path)
    small, big = written.network(), source.network()
    for key, network in (("before", big), ("after", small)):
        cost = count_cost(network)
        assert (result[key]["channels"], result[key]["params"], result[key]["macs"]) == (
            cost.channels,
            cost.params,
            cost.macs,
        )
        assert result[key]["latency"] > 0.0
    assert result["kept"] == result["after"]["macs"] / result["before"]["macs"] == pytest.approx(0.5, rel=0.02)
    parent = written.metadata["extra"]["parent"]
    assert parent == result["parent"]
    assert parent["sha256"] == source.metadata["files"]["ema.safetensors"]["sha256"]
    (record,) = written.metadata["extra"]["pruning"]
    again = remove(big, Removal(**record["details"]))
    assert all(torch.equal(tensor, small.state_dict()[name]) for name, tensor in again.state_dict().items())

    words = ["--importance", "diff_pruning", "--prune.calibration_batches=2", "--prune.scope=global", "--seed=3"]
    out = str(tmp_path / "twice")
    twice = call(capsys, "--checkpoint", str(tmp_path / "once"), "--target", "params=0.6", "--out", out, *words)
    assert twice["before"]["params"] == result["after"]["params"]
    assert twice["kept"] == pytest.approx(0.6, rel=0.02)
    assert twice["consistency"]["seed"] == 3
    records = read_checkpoint(tmp_path / "twice").metadata["extra"]["pruning"]
    assert [entry["knobs"]["importance"] for entry in records] == ["l2", "diff_pruning"]
    assert records[1]["seed"] == 3


def test_it_says_how_alike_the_images_are_before_and_after(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same figures as scripts/evaluate.py has for the two checkpoints; more change where more goes."""
    words = ["--checkpoint", str(dense), "--num-images", "12"]
    found = {
        keep: call(capsys, *words, "--target", f"params={keep}", "--out", str(tmp_path / keep))["consistency"]
        for keep in ("0.9", "0.2")
    }
    small = str(tmp_path / "0.2")
    against = ["--against", str(dense), "--num-images", "12", "--seed", "0", "--device", "cpu"]
    assert evaluate.main(["--checkpoint", small, *against, "--json", str(tmp_path / "judged.json")]) == 0
    judged = json.loads((tmp_path / "judged.json").read_text())["figures"]
    assert found["0.2"] == {
        "ssim": pytest.approx(judged["eval/consistency_ssim_12"]),
        "mse": pytest.approx(judged["eval/consistency_mse_12"]),
        "num_images": 12,
        "seed": 0,
    }
    assert 1.0 > found["0.9"]["ssim"] > found["0.2"]["ssim"]
    assert 0.0 < found["0.9"]["mse"] < found["0.2"]["mse"]
    written = read_checkpoint(tmp_path / "0.2")
    assert written.metadata["figures"]["prune/consistency_ssim_12"] == found["0.2"]["ssim"]
    assert len(written.tensors("dense_images")["images"]) == 16  # What a run that starts from it compares with.

    assert prune.main(["--checkpoint", str(dense), "--target", "macs=0.5", "--out", str(tmp_path / "shown")]) == 0
    assert "images before and after: SSIM 0." in capsys.readouterr().out
    words[-1] = "0"
    assert call(capsys, *words, "--target", "macs=0.5", "--out", str(tmp_path / "none"))["consistency"] is None


def test_it_prunes_an_untrained_preset_and_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "digits", "--model.channels=16", "--target", "channels=0.75", "--out", "small", "--batch", "2"]
    assert prune.main(words) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[2:5]] == ["channels", "params", "nonzero"]
    assert "ms for 2 images" in out
    assert "SSIM" not in out
    assert read_checkpoint(tmp_path / "small").metadata["extra"]["pruning"][0]["method"] == "structured"


def test_it_removes_blocks_and_says_which(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--checkpoint", str(dense), "--num-images", "0", "--prune.depth=0.5", "--prune.calibration_batches=1"]
    result = call(capsys, *words, "--target", "macs=0.4", "--out", str(tmp_path / "small"))
    assert result["kept"] == pytest.approx(0.4, rel=0.02)
    assert result["blocks"]
    assert removed_blocks(read_checkpoint(tmp_path / "small").network()) == sorted(
        result["blocks"], key=removable_blocks(read_checkpoint(dense).network()).index
    )
    assert prune.main([*words, "--target", "macs=0.4", "--out", str(tmp_path / "shown")]) == 0
    assert f"removed blocks: {', '.join(result['blocks'])}" in capsys.readouterr().out


def test_sensitivity_proposes_shares_that_can_be_used(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", str(dense), "--target", "macs=0.5"]
    measuring = [*words, "--sensitivity", "--prune.calibration_batches=2", "--out", str(tmp_path / "shares")]
    result = call(capsys, *measuring)
    assert list(result["proposed"]) == ["down.0", "down.1", "middle", "up.0", "up.1"]
    assert json.loads((tmp_path / "shares" / "sensitivity.json").read_text()) == result
    assert (tmp_path / "shares" / "sensitivity.png").read_bytes()[:4] == b"\x89PNG"
    assert not list_checkpoints(tmp_path / "shares")
    assert prune.main(measuring) == 0
    assert result["knob"] in capsys.readouterr().out.splitlines()
    used = call(capsys, *words, "--out", str(tmp_path / "small"), "--num-images", "0", result["knob"])
    assert used["kept"] == pytest.approx(0.5, rel=0.02)


REFUSED = [
    (["--target", "macs"], "--target = 'macs': expected one of channels, params, macs, latency"),
    (["--target", "weights=0.5"], "--target = 'weights=0.5': expected one of"),
    (["--target", "macs=1"], "--target macs = '1': expected a number > 0 and < 1"),
    (["--target", "params=1.5"], "--target params = '1.5': expected a number > 0 and < 1"),
    (["--target", "macs=0"], "--target macs = '0': expected a number > 0 and < 1"),
    (["--target", "macs=half"], "--target macs = 'half': expected a number"),
    (["--target", "macs=0.5", "--prune.keep=2"], "prune.keep = '2': expected a number > 0 and < 1"),
    (["--target", "macs=0.0001"], "--target macs = 0.0001: out of reach; at least"),
    (["--target", "macs=0.5", "--importance", "best"], "--importance = 'best': expected one of random, l1"),
    (["--target", "macs=0.5", "--prune.threshold=0.1"], "prune.threshold = 0.1: has no effect with"),
    (["--target", "macs=0.5", "--prune.block_keep=0.5,1"], "prune.block_keep = [0.5, 1.0]: expected 5 shares"),
    (["--target", "macs=0.5", "--model.channels=32"], "model.channels = 32: expected 16, as in"),
    (["--target", "macs=0.5", "--modle.channels=32"], "modle.channels = '32': unknown key"),
    (
        ["--target", "macs=0.5", "--prune.method=magnitude"],
        "prune.method = 'magnitude': expected structured; masks: python",
    ),
    (
        ["--target", "macs=0.5", "--prune.method=lottery"],
        "prune.method = 'lottery': expected structured; masks: python",
    ),
    (["--target", "macs=0.5", "--upload"], "--upload: no W&B API key"),
    (["--target", "macs=0.5", "--sensitivity", "--num-images", "4"], "--sensitivity: prunes nothing; leave out"),
    (
        ["--target", "macs=0.5", "--sensitivity", "--prune.depth=1"],
        "--sensitivity: proposes prune.block_keep for channels of free",
    ),
    (["--target", "macs=0.5", "--prune.blocks=conv_in"], "prune.blocks = ['conv_in']: 'conv_in' is no block"),
    (["--target", "latency=0.5", "--batch", "4"], "--batch = 4: --target latency is that of 16 images; leave it out"),
    (["--target", "macs=0.5", "--num-images=-1"], "--num-images = -1: expected an integer >= 0"),
    (["--target", "macs=0.5", "--num-images=300000000"], "--num-images = 300000000: expected an integer >= 0"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_wrong_input_is_refused_and_nothing_is_written(
    words: list[str], message: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune.main(["--checkpoint", str(dense), "--out", str(tmp_path / "out"), *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    last = printed.err.splitlines()[-1].split("\r")[-1].strip()  # After bars, if there were any.
    assert last.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_a_batch_has_images(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--checkpoint", str(dense), "--out", str(tmp_path / "out"), "--target", "macs=0.5", "--batch", "0"]
    with pytest.raises(SystemExit, match="2"):
        prune.main(words)
    assert capsys.readouterr().err.splitlines()[-1].endswith("--batch = '0': expected an integer >= 1")


def test_images_of_an_untrained_model_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "digits", "--target", "macs=0.5", "--out", "small", "--num-images", "4"]
    assert prune.main(words) == 2
    assert capsys.readouterr().err.startswith("error: --num-images = 4: images of an untrained model say nothing")


def test_a_folder_that_holds_a_checkpoint_and_a_checkpoint_that_is_none(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = ["--target", "macs=0.5"]
    assert prune.main(["--checkpoint", str(dense), "--out", str(dense / "checkpoints"), *target]) == 2
    assert "holds a checkpoint already" in capsys.readouterr().err
    assert prune.main(["--checkpoint", str(tmp_path), "--out", str(tmp_path / "out"), *target]) == 2
    assert "no checkpoint here" in capsys.readouterr().err
    assert prune.main(["--artifact", "model-x", "--out", str(tmp_path / "out"), *target]) == 2
    assert "--artifact = 'model-x': no W&B API key" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_real_command_teaches_its_use(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    for word in (
        "--checkpoint PATH",
        "--artifact",
        "--preset",
        "--importance",
        "--target",
        "--out",
        "--json",
        "macs=0.56",
    ):
        assert word in done.stdout
    assert list(tmp_path.iterdir()) == []
