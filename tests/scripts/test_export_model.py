"""scripts/export_model.py: its files draw the same images in a process without this project."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import export_model as script
import numpy as np
import pytest
import torch
from commands import run_command
from tiny import lively_run

from diffusion_core.checkpoint import read_checkpoint
from diffusion_core.config import build, flatten
from diffusion_core.sampling.generation import Generator
from diffusion_core.sampling.samplers import build_sampler, start_scale, steps_of

START, END = "  import json", ".astype(np.uint8)"
EXAMPLE = script.__doc__[script.__doc__.index(START) : script.__doc__.index(END) + len(END)].replace("\n  ", "\n")[2:]
TORCH = EXAMPLE.replace("onnxruntime", "torch").replace(
    'torch.InferenceSession("exported/model.onnx")', 'torch.export.load("exported/model.pt2").module()'
).replace(
    "x0, = model.run(None, inputs)",
    'x0 = model(*(torch.from_numpy(inputs[key]) for key in ("x", "t", "labels") if key in inputs)).detach().numpy()',
)  # fmt: skip


def test_the_example_in_the_help_can_be_copied_at_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run_command("export_model", "--help") == 0
    block = capsys.readouterr().out.split("alone:\n\n")[1].split("\n\n")[0]
    assert textwrap.dedent(block) == EXAMPLE
    compile(EXAMPLE, "example.py", "exec")


def export(source: Path, folder: Path, *words: str) -> int:
    return script.main(["--checkpoint", str(source), "--out", str(folder / "exported"), *words])


def drawn(folder: Path, program: str) -> np.ndarray:
    """What a program draws from the exported files, alone in a folder with them."""
    code = f"{program}\nassert 'diffusion_core' not in __import__('sys').modules\nnp.save('images.npy', images)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return np.load(folder / "images.npy")


def expected(source: Path, **knobs: Any) -> np.ndarray:
    """The same images by the project's own sampler."""
    checkpoint = read_checkpoint(source)
    given = {f"sample.{key}": value for key, value in knobs.items()} | {"sample.eta": 0.0}
    config = build(type(checkpoint.config()), flatten(checkpoint.config()), given)
    generator = Generator(checkpoint.network(), config, "fp32")
    denoiser = generator.denoiser()
    steps = steps_of(config.sample, denoiser.schedule)
    normal = np.random.default_rng(0).standard_normal

    def noise() -> torch.Tensor:
        return torch.from_numpy(normal((8, *checkpoint.shape_CHW), np.float32))

    start = noise() * start_scale(denoiser.schedule, steps)
    labels = torch.arange(8) % max(1, len(checkpoint.class_names))
    with torch.no_grad():
        images = build_sampler(config.sample, denoiser)(
            generator.guided(denoiser, config.sample), start, steps, labels, noise=noise
        )
    return ((images + 1.0) * 127.5).round().clamp(0, 255).byte().numpy()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_run(tmp_path_factory.mktemp("dense"), diffusion__prediction="v", sample__guidance=1.5)


def check(images: np.ndarray, wanted: np.ndarray) -> None:
    assert len({image.tobytes() for image in wanted}) == len(wanted)
    assert np.abs(images.astype(int) - wanted.astype(int)).max() <= 2


@pytest.mark.slow
@pytest.mark.extra("onnx")
def test_an_onnx_file_draws_the_same_images(dense: Path, tmp_path: Path, capsys: Any) -> None:
    assert export(dense, tmp_path) == 0
    assert "guidance 1.5" in capsys.readouterr().out
    check(drawn(tmp_path, EXAMPLE), expected(dense))


@pytest.mark.slow
@pytest.mark.extra("onnx")
@pytest.mark.parametrize("depth", [0.0, 0.5])
def test_an_onnx_file_of_a_pruned_network_draws_the_same_images(depth: float, tmp_path: Path) -> None:
    pruning = {"prune__method": "structured", "prune__step": 1, "prune__depth": depth, "prune__calibration_batches": 1}
    pruned = lively_run(tmp_path / "run", model__norm_groups=1, **pruning)
    assert ({"removed": 1} in read_checkpoint(pruned).metadata["structure"].values()) == (depth > 0)
    assert export(pruned, tmp_path, "--format", "onnx", "--steps", "3", "--which", "newest", "--weights", "ema") == 0
    check(drawn(tmp_path, EXAMPLE), expected(pruned, steps=3))


@pytest.mark.slow
def test_a_program_of_torch_draws_the_same_images(dense: Path, tmp_path: Path) -> None:
    words = ["--guidance", "3", "--guidance-interval", "0.1,2", "--spacing", "karras", "--steps", "5"]
    assert export(dense, tmp_path, "--format", "torch", *words) == 0
    knobs = {"guidance": 3.0, "guidance_interval": [0.1, 2.0], "spacing": "karras", "steps": 5}
    check(drawn(tmp_path, TORCH), expected(dense, **knobs))


@pytest.mark.slow
def test_a_program_of_a_network_without_some_blocks_draws_the_same_images(tmp_path: Path) -> None:
    pruning = {"prune__method": "structured", "prune__step": 1, "prune__depth": 1.0, "prune__calibration_batches": 1}
    pruned = lively_run(tmp_path / "run", **pruning)
    assert {"removed": 1} in read_checkpoint(pruned).metadata["structure"].values()
    assert export(pruned, tmp_path, "--format", "torch", "--steps", "3") == 0
    check(drawn(tmp_path, TORCH), expected(pruned, steps=3))


def test_a_model_without_classes_takes_no_labels(tmp_path: Path) -> None:
    knobs = {"model__time_order": "cos_sin", "model__frequency_shift": 0.0, "model__downsample_padding": "both"}
    narrow = {"prune__method": "structured", "prune__step": 1, "prune__widths": "diffusers", "prune__importance": "l1"}
    labels = {"model__class_conditional": False, "eval__classifier": "none"}
    plain = lively_run(tmp_path / "plain", **knobs, **narrow, **labels)
    assert "time_mlp.0" in read_checkpoint(plain).metadata["structure"]
    assert export(plain, tmp_path, "--format", "torch") == 0
    assert json.loads((tmp_path / "exported" / "model.json").read_text())["class_names"] == []
    check(drawn(tmp_path, TORCH), expected(plain))


@pytest.mark.slow
@pytest.mark.extra("onnx")
def test_an_onnx_file_takes_timesteps_between_trained_ones_and_no_labels(tmp_path: Path) -> None:
    plain = lively_run(tmp_path / "plain", model__class_conditional=False, eval__classifier="none")
    assert export(plain, tmp_path, "--spacing", "karras", "--steps", "5") == 0
    check(drawn(tmp_path, EXAMPLE), expected(plain, spacing="karras", steps=5))


def test_a_student_is_sampled_with_new_noise_and_in_other_steps_with_a_warning(tmp_path: Path, capsys: Any) -> None:
    student = lively_run(
        tmp_path / "student", steps__method="consistency", steps__step=1, checkpoint__best_metric="train/loss"
    )
    assert export(student, tmp_path, "--format", "torch", "--steps", "3") == 0
    assert "warning: sample.steps = 3: the student" in capsys.readouterr().err
    check(drawn(tmp_path, TORCH), expected(student, steps=3))


def test_a_file_that_is_less_exact_than_allowed_is_refused_with_a_remedy(
    dense: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusion_core.sampling.portable.TOLERANCE", -1e-9)
    assert export(dense, tmp_path, "--format", "torch", "--guidance", "50") == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert re.search(r"^error: --format = 'torch': .* by up to \S+, more than the tolerance of -1e-09; lower", line)
    assert "--guidance = 50" in line
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "other"], "--weights = 'other': "),
        (["--weights", "optimizer"], "--weights = 'optimizer': "),
        (["--steps", "0"], "sample.steps = '0'"),
        (["--out", "."], "--out = '.': exists already; choose another folder"),
        (["--format", "onnx"], "--format = 'onnx': needs onnxscript: pip install"),
    ],
)
def test_what_is_refused_is_one_line_and_leaves_nothing(
    dense: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept").touch()
    assert script.main(["--checkpoint", str(dense), "--format", "torch", *words]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(("key", "value"), [("model.self_conditioning", True), ("upsample.factor", 2)])
def test_a_network_that_takes_more_is_refused(key: str, value: Any, tmp_path: Path, capsys: Any) -> None:
    taking = lively_run(tmp_path / "run", **{key.replace(".", "__"): value})
    assert export(taking, tmp_path, "--format", "torch") == 2
    assert f"error: {key} = {value}: " in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()
