"""Weights that are not numbers are refused by whatever reads them, in one line that names the file."""

from __future__ import annotations

import ast
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import convert_diffusers
import evaluate
import numpy as np
import prune
import pytest
import sample_images
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import TINY, cpu, digits, metadata, tiny_batches, tiny_config, tiny_network, tiny_state
from torch import nn

from agent.__main__ import main
from agent.config import build_config
from diffusion_core.checkpoint import METADATA_FILE, Checkpoint, CheckpointError, read_checkpoint, write_checkpoint
from diffusion_core.config import flatten
from diffusion_core.data.datasets import DataError
from diffusion_core.evaluation import reference
from diffusion_core.evaluation.classifier.classifier import make_classifier, read_classifier
from diffusion_core.evaluation.classifier.training import Recipe
from diffusion_core.evaluation.extractors.find import read_extractor
from diffusion_core.evaluation.extractors.inception import build_inception, read_inception
from diffusion_core.evaluation.features import ExtractorError
from diffusion_core.files import first_not_finite, sha256_of_file
from diffusion_core.model.unet import build_network
from diffusion_core.training.trainer import TrainState, train

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
CONFIG = build_config(TINY, {"train.steps": 4, "sample.every": 0, "eval.every": 0, "eval.classifier": "none"})
WORDS = [f"--{key}={','.join(map(str, value)) if isinstance(value, list) else value}"
         for key, value in flatten(CONFIG).items() if value is not None and not key.startswith("log.dir")]  # fmt: skip


def spoil(file: Path, value: float = math.nan, name: str | None = None) -> str:
    """Put a value into one place of a safetensors file, and its new hash beside it; returns the tensor's name."""
    tensors = load_file(file)
    name = name or next(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.ndim > 1)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file)
    described = file.with_name(METADATA_FILE)
    if described.is_file():
        content = json.loads(described.read_text())
        content["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)}
        described.write_text(json.dumps(content))
    return name


def a_run(folder: Path, bad_part: str | None = None, value: float = math.nan) -> Path:
    """The folder of a run that trained two steps, with a value that is no number in one part."""
    config = tiny_config(train__steps=2)
    state = tiny_state(config)
    train(state, tiny_batches(config), config, accelerator=cpu())
    state.extra_parts["masks"] = {"conv_in.weight": torch.ones(8, 1, 3, 3, dtype=torch.bool)}
    described = metadata(state.network, CONFIG) | state.metadata() | {"config": flatten(CONFIG)}
    written = write_checkpoint(folder / "checkpoints", 2, described, state.parts())
    if bad_part is not None:
        spoil(written.path / f"{bad_part}.safetensors", value)
    return folder


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("part", ["ema", "model", "optimizer"])
def test_every_part_of_a_checkpoint(tmp_path: Path, part: str, value: float) -> None:
    checkpoint = read_checkpoint(a_run(tmp_path / "run", part, value))
    with pytest.raises(CheckpointError) as refused:
        checkpoint.tensors(part)
    assert str(checkpoint.path) in str(refused.value)
    assert "not finite" in str(refused.value)
    assert "\n" not in str(refused.value)
    for other in set(checkpoint.parts) - {part}:
        checkpoint.tensors(other)


def test_a_state_to_resume_from(tmp_path: Path) -> None:
    for part in ("ema", "model", "optimizer"):
        checkpoint = read_checkpoint(a_run(tmp_path / part, part))
        with pytest.raises(CheckpointError, match="not finite"):
            TrainState.restore(checkpoint, CONFIG.train, CONFIG.ema, CPU)


def agent(*words: str) -> Callable[[Path], int]:
    return lambda bad: main([*WORDS, *(word.format(bad=bad) for word in words)])


COMMANDS: dict[str, Callable[[Path], int]] = {
    "sample_images": lambda bad: sample_images.main(["--checkpoint", str(bad), "--device", "cpu"]),
    "sample_images, guide": lambda bad: sample_images.main(
        ["--checkpoint", str(a_run(bad.parent / "good")), "--guide-checkpoint", str(bad), "--guidance", "2",
         "--device", "cpu"]),
    "evaluate": lambda bad: evaluate.main(["--checkpoint", str(bad), "--device", "cpu", "--num-images", "4"]),
    "evaluate, against": lambda bad: evaluate.main(
        ["--checkpoint", str(a_run(bad.parent / "good")), "--against", str(bad), "--device", "cpu"]),
    "prune": lambda bad: prune.main(["--checkpoint", str(bad), "--target", "macs=0.5", "--out", "small"]),
    "init": agent("--init.checkpoint={bad}", "--log.dir=new"),
    "distill": agent("--distill.checkpoint={bad}", "--distill.output=1", "--log.dir=new"),
    "resume": agent("--log.dir={bad}"),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    bad = a_run(tmp_path / "bad", "ema")
    assert COMMANDS[command](bad) in (1, 2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("error: ")
    assert "not finite" in line
    assert str(bad) in line
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.extra("diffusers")
def test_both_directions_of_diffusers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*words: str) -> str:
        assert convert_diffusers.main([*words, str(tmp_path / "converted")]) == 2
        assert not (tmp_path / "converted").exists()
        return capsys.readouterr().err

    assert "not finite" in refusal("export", str(a_run(tmp_path / "bad", "ema")))
    assert convert_diffusers.main(["export", str(a_run(tmp_path / "good")), str(tmp_path / "theirs")]) == 0
    weights = tmp_path / "theirs" / "unet" / "diffusion_pytorch_model.safetensors"
    for value in BAD.values():
        tensor = spoil(weights, value)
        assert f"{str(weights)!r}: {tensor!r} holds values that are not finite" in refusal(
            "import", str(tmp_path / "theirs")
        )


def test_classifiers_and_feature_networks(tmp_path: Path) -> None:
    quick = Recipe(width=4, epochs=1, batch_size=64, lr=0.1)
    make_classifier(digits(), "digits", quick, mirrored=False, device=CPU).save(tmp_path / "c.safetensors")
    whole = (tmp_path / "c.safetensors").read_bytes()
    with safe_open(tmp_path / "c.safetensors", framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    for value in BAD.values():
        for name in (name for name, tensor in tensors.items() if tensor.is_floating_point()):
            spoilt = {key: tensor.clone() for key, tensor in tensors.items()}
            spoilt[name].view(-1)[0] = value
            save_file(spoilt, tmp_path / "c.safetensors", metadata=header)
            for read in (read_classifier, read_extractor):
                with pytest.raises(ExtractorError, match="not finite"):
                    read(tmp_path / "c.safetensors", CPU)
    (tmp_path / "c.safetensors").write_bytes(whole)
    assert read_extractor(tmp_path / "c.safetensors", CPU).name == "classifier-digits"

    linear = nn.Linear(4, 2)
    torch.nn.init.constant_(linear.bias, math.inf)
    torch.jit.script(nn.Sequential(nn.Flatten(), linear)).save(str(tmp_path / "net.pt"))
    with pytest.raises(ExtractorError, match="not finite"):
        read_extractor(tmp_path / "net.pt", CPU)


@pytest.mark.slow
def test_inception_with_a_weight_that_no_feature_shows(tmp_path: Path) -> None:
    """The classes' weights: features do not pass through them, logits do."""
    torch.manual_seed(0)
    network = build_inception()
    with torch.no_grad():
        network.fc.weight[3, 7] = math.nan
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    with pytest.raises(ExtractorError, match="not finite"):
        read_inception(tmp_path / "inception.pth", CPU)


def test_statistics_and_features_of_images(tmp_path: Path) -> None:
    for value in BAD.values():
        for mu, sigma in ((np.full(2, value), np.eye(2)), (np.zeros(2), np.full((2, 2), value))):
            np.savez(tmp_path / "s.npz", mu=mu, sigma=sigma)
            with pytest.raises(DataError, match="not finite"):
                reference.read_statistics(tmp_path / "s.npz")
    np.savez(tmp_path / "s.npz", mu=np.zeros(2), sigma=np.eye(2))
    features = {"features": torch.zeros(3, 2)}
    save_file(features, tmp_path / "f.safetensors")
    assert reference._kept(tmp_path / "s.npz", tmp_path / "f.safetensors") is not None
    features["features"][1, 1] = math.nan
    save_file(features, tmp_path / "f.safetensors")
    assert reference._kept(tmp_path / "s.npz", tmp_path / "f.safetensors") is None  # Computed again.


READ = {"load_file", "safe_open", "torch.load", "torch.jit.load", "np.load"}
"""Calls that read tensors from files."""
FREE = {
    "scripts/benchmarks/fid.py": "hands pytorch-fid a file",
    "diffusion_core/data/decoded.py": "takes bytes alone, which are always finite",
}
"""Modules that need no check, and why."""


@pytest.mark.parametrize("package", ["diffusion_core", "pruning", "agent", "scripts"])
def test_whatever_reads_tensors_checks_them(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        if path.relative_to(ROOT).as_posix() in FREE:
            continue
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef):
                calls = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
                if calls & READ:
                    assert calls & {"first_not_finite", "check_weights"}, f"{path}: {function.name}"


def test_the_check_itself() -> None:
    fine = {
        "empty": torch.empty(0, 3),
        "bits": torch.tensor([True]),
        "counts": torch.tensor([2**60]),
        "large": torch.full((70_000,), torch.finfo(torch.float32).max),  # Their sum would not be finite.
        "half": torch.full((9,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16),
        "byte": torch.ones(3).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(1e-45),
        "complex": torch.ones(2, dtype=torch.complex64),
    }
    assert first_not_finite(fine) is None
    for value in BAD.values():
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            for place in (0, 17, 99):
                tensor = torch.zeros(10, 10, dtype=dtype)
                tensor.view(-1)[place] = value
                assert first_not_finite(fine | {"bad": tensor.T}) == "bad"
    assert first_not_finite({"bad": torch.tensor([1.0, math.nan]).to(torch.float8_e4m3fn)}) == "bad"
    assert first_not_finite({"bad": torch.tensor(complex(0.0, math.inf))}) == "bad"


def test_it_costs_little_beside_the_hash_of_the_file(tmp_path: Path) -> None:
    tensors = {str(i): torch.randn(512, 512, 3, 3) for i in range(4)}
    save_file(tensors, tmp_path / "w.safetensors")
    hashing, checking = [], []
    for _ in range(5):
        started = time.perf_counter()
        sha256_of_file(tmp_path / "w.safetensors")
        hashed = time.perf_counter()
        assert first_not_finite(tensors) is None
        hashing.append(hashed - started)
        checking.append(time.perf_counter() - hashed)
    assert min(checking) < min(hashing)


def test_checkpoints_with_finite_weights_are_read(tmp_path: Path) -> None:
    checkpoint: Checkpoint = read_checkpoint(a_run(tmp_path))
    assert {part for part in checkpoint.parts if checkpoint.tensors(part)} == set(checkpoint.parts)
    assert first_not_finite(dict(build_network(CONFIG, 10).state_dict())) is None
    assert first_not_finite(dict(tiny_network().state_dict())) is None
