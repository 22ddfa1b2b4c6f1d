"""scripts/sample_images.py: its modes, its folder, several processes, and wrong input."""

from __future__ import annotations

import json
import os
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_images as script
from forks import Forks
from image_files import frame_count
from PIL import Image
from tiny import lively_run
from torch import Tensor

from diffusion_core.checkpoint import read_checkpoint, write_checkpoint
from diffusion_core.model.unet import UNet

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "sample_images.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_run(tmp_path_factory.mktemp("other"), model__channels=16, diffusion__schedule="linear", seed=1)


def sample(run: Path, out: Path, *words: str) -> int:
    return script.main(["--checkpoint", str(run), "--out", str(out), "--device", "cpu", *words])


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*-*.png")}


def test_images_are_named_dealt_out_and_kept(run: Path, tmp_path: Path) -> None:
    assert sample(run, tmp_path / "a", "--labels", "3,7", "--num-images", "5", "--gif") == 0
    first = images(tmp_path / "a")
    assert set(first) == {"3-0.png", "7-0.png", "3-1.png", "7-1.png", "3-2.png"}
    assert Image.open(tmp_path / "a" / "3-0.png").size == (8, 8)
    assert len(set(first.values())) == 5
    # Asked for more: what is there stays, also if somebody else's tool touched the times.
    stamps = {name: (tmp_path / "a" / name).stat().st_mtime_ns for name in first}
    assert sample(run, tmp_path / "a", "--labels", "3,7", "--num-images", "8") == 0
    assert {name: (tmp_path / "a" / name).stat().st_mtime_ns for name in first} == stamps
    # Other labels, order and batches: the same images.
    assert sample(run, tmp_path / "b", "--labels", "all", "--num-images", "40", "--micro-batch", "4") == 0
    for name, content in images(tmp_path / "a").items():
        here, there = (np.asarray(Image.open(folder / name), int) for folder in (tmp_path / "a", tmp_path / "b"))
        assert np.abs(here - there).max() <= 1, name
        assert content
    # Another seed: other images.
    assert sample(run, tmp_path / "c", "--labels", "3", "--num-images", "1", "--seed", "9") == 0
    assert images(tmp_path / "c")["3-0.png"] != first["3-0.png"]


def test_images_that_were_cut_off_are_made_again(run: Path, tmp_path: Path, capfd: Any) -> None:
    words = ["--labels", "3", "--num-images", "3"]
    assert sample(run, tmp_path / "a", *words) == 0
    before = images(tmp_path / "a")
    for name, size in (("3-0.png", 0), ("3-2.png", len(before["3-2.png"]) - 1)):
        os.truncate(tmp_path / "a" / name, size)
    capfd.readouterr()
    assert sample(run, tmp_path / "a", *words) == 0
    assert "3 images (2 new)" in capfd.readouterr().out
    assert images(tmp_path / "a") == before


def test_images_of_other_settings_are_not_mixed(run: Path, other: Path, tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "a"
    assert sample(run, out, "--num-images", "2") == 0
    before = images(out)
    for words in (
        ["--steps", "3"],
        ["--seed", "1"],
        ["--guidance", "2"],
        ["--weights", "model"],
        ["--mode", "denoise"],
    ):
        capfd.readouterr()
        assert sample(run, out, "--num-images", "2", *words) == 2
        assert "holds images of other settings" in capfd.readouterr().err
    assert sample(other, out, "--num-images", "2") == 2
    assert images(out) == before
    (tmp_path / "mine").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "mine" / "0-0.png")
    assert sample(run, tmp_path / "mine", "--num-images", "2") == 2
    assert not (tmp_path / "mine" / "samples.json").exists()


def test_precisions_are_not_mixed(run: Path, tmp_path: Path, capfd: Any) -> None:
    assert sample(run, tmp_path, "--num-images", "2", "--precision", "fp32") == 0
    assert sample(run, tmp_path, "--num-images", "3", "--precision", "bf16") == 2
    assert "holds images of other settings" in capfd.readouterr().err


def test_folders_of_earlier_versions_do_not_say_in_which_precision(run: Path, tmp_path: Path) -> None:
    assert sample(run, tmp_path, "--num-images", "2") == 0
    file = tmp_path / "samples.json"
    stored = json.loads(file.read_text())
    assert stored.pop("precision") in ("fp32", "bf16")
    file.write_text(json.dumps(stored))
    assert sample(run, tmp_path, "--num-images", "3") == 0
    assert len(images(tmp_path)) == 3


def test_images_that_are_not_finite_are_not_kept(run: Path, tmp_path: Path, capfd: Any) -> None:
    """Weights that overflow in fp16 only: black images would stay, also when the command is repeated in fp32."""
    broken = tmp_path / "run"
    state = read_checkpoint(run)
    parts = {name: dict(state.tensors(name)) for name in state.parts}
    for part in ("model", "ema"):
        name = next(key for key in parts[part] if key.endswith("conv1.weight"))
        parts[part][name] = parts[part][name] * 1e7
    write_checkpoint(broken / "checkpoints", state.step, state.metadata, parts)
    out = tmp_path / "images"
    assert sample(broken, out, "--num-images", "2", "--precision", "fp16") == 2
    assert (
        "not finite; lower sample.guidance, or sample in fp32 (train.precision; --precision of scripts)"
        in capfd.readouterr().err
    )
    assert not images(out)


def test_a_refused_interpolation_leaves_no_mark(run: Path, tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "out"
    assert sample(run, out, "--mode", "interpolate", "--labels", "3") == 2
    assert "interpolate needs two labels" in capfd.readouterr().err
    assert not out.exists()


def test_denoise_shows_the_noise_and_progressive_what_is_expected(run: Path, tmp_path: Path) -> None:
    single = ["--labels", "4", "--num-images", "1", "--steps", "4"]
    assert sample(run, tmp_path / "s", *single) == 0
    finished = np.asarray(Image.open(tmp_path / "s" / "4-0.png"))
    for mode in ("denoise", "progressive"):
        assert sample(run, tmp_path / mode, *single, "--mode", mode) == 0
        with Image.open(tmp_path / mode / f"{mode}.gif") as animation:
            # The frames of four steps and the image; GIF keeps equal neighbours once.
            assert (2 if mode == "denoise" else 1) <= frame_count(animation) <= 5
        strip = np.asarray(Image.open(tmp_path / mode / f"{mode}.png").convert("L"))
        cells = tiles(strip, count=5)
        assert np.array_equal(cells[-1], finished)  # Both end in the image itself.
    noisy, expected = (
        tiles(np.asarray(Image.open(tmp_path / mode / f"{mode}.png").convert("L")), count=5)
        for mode in ("denoise", "progressive")
    )
    assert not np.array_equal(noisy[0], expected[0])


def tiles(strip: np.ndarray, count: int, factor: int = 6, gap: int = 2, size: int = 8) -> list[np.ndarray]:
    """The images of a one-row strip, from the right, without their enlargement."""
    pitch = factor * size + gap
    right = strip.shape[1] - gap
    lefts = [right - (count - i) * pitch + gap for i in range(count)]
    return [strip[gap : gap + factor * size : factor, left : left + factor * size : factor] for left in lefts]


@pytest.mark.parametrize("mode", ["denoise", "progressive", "interpolate", "sample"])
def test_no_more_images_are_sampled_at_once_than_asked_for(
    mode: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, forward = [], UNet.forward

    def seen(network: UNet, x_BCHW: Tensor, *others: Any) -> Tensor:
        sizes.append(len(x_BCHW))
        return forward(network, x_BCHW, *others)

    words = ["--mode", mode, "--labels", "0,1", "--num-images", "7", "--steps", "2", *(["--gif"] * (mode == "sample"))]
    assert sample(run, tmp_path / "at once", *words) == 0
    monkeypatch.setattr(UNet, "forward", seen)
    assert sample(run, tmp_path / "in batches", *words, "--micro-batch", "3") == 0
    assert max(sizes) == 3
    pictures = [path.name for path in (tmp_path / "at once").glob("*.png")]
    assert pictures
    for name in pictures:
        one, other = (np.asarray(Image.open(tmp_path / out / name), int) for out in ("at once", "in batches"))
        assert np.abs(one - other).max() <= 1, name


def test_every_flag_reaches_the_sampler(run: Path, tmp_path: Path) -> None:
    few = ["--num-images", "10", "--steps", "6", "--precision", "fp32", "--compile", "none"]
    flags: dict[str, list[str]] = {
        "plain": [],
        "eta": ["--eta", "0.5"],
        "spacing": ["--spacing", "trailing"],
        "start": ["--start-level", "2"],
        "small": ["--sampler", "ddpm", "--variance", "fixed_small"],
        "large": ["--sampler", "ddpm", "--variance", "fixed_large"],
        "guided": ["--guidance", "3"],
        "interval": ["--guidance", "3", "--guidance-interval", "0.0,1.0"],
        "model": ["--weights", "model"],
    }
    for name, words in flags.items():
        assert sample(run, tmp_path / name, *few, *words) == 0
    drawn = [images(tmp_path / name) for name in flags]
    assert all(one != other for one, other in combinations(drawn, 2))
    # bf16 changes the image a little; whether it changes a pixel depends on the processor.
    assert sample(run, tmp_path / "bf16", *few, "--precision", "bf16") == 0
    exact, coarse = (np.asarray(Image.open(tmp_path / name / "4-0.png")).astype(int) for name in ("plain", "bf16"))
    assert np.abs(exact - coarse).mean() < 16


def test_interpolation_ends_where_it_should(run: Path, tmp_path: Path) -> None:
    exact = ["--steps", "4", "--sampler", "ddim"]
    for seed in (0, 1):
        assert (
            sample(run, tmp_path / f"s{seed}", "--labels", "2,5", "--num-images", "2", "--seed", str(seed), *exact) == 0
        )
    assert sample(run, tmp_path / "seeds", "--mode", "interpolate", "--labels", "2", "--seeds", "0,1", *exact) == 0
    assert sample(run, tmp_path / "labels", "--mode", "interpolate", "--labels", "2,5", *exact) == 0

    def ends(folder: str) -> tuple[np.ndarray, np.ndarray]:
        cells = tiles(np.asarray(Image.open(tmp_path / folder / "interpolate.png").convert("L")).astype(int), 10)
        return cells[0], cells[-1]

    def image(folder: str, name: str) -> np.ndarray:
        return np.asarray(Image.open(tmp_path / folder / name)).astype(int)

    many = ["--mode", "interpolate", "--labels", "2,5", "--num-images", "3", *exact]
    assert sample(run, tmp_path / "rows", *many) == 0  # Three of them, a row each.
    one, three = (Image.open(tmp_path / folder / "interpolate.png").height for folder in ("labels", "rows"))
    assert three - one == 2 * 50
    start, end = ends("seeds")
    assert np.abs(start - image("s0", "2-0.png")).max() <= 1
    assert np.abs(end - image("s1", "2-0.png")).max() <= 1
    start, end = ends("labels")
    assert np.abs(start - image("s0", "2-0.png")).max() <= 1
    assert np.abs(end - image("s0", "5-0.png")).max() > 1  # The other label, but the first one's noise.
    with Image.open(tmp_path / "labels" / "interpolate.gif") as animation:
        assert frame_count(animation) > 10


def test_a_weaker_model_guides(run: Path, other: Path, tmp_path: Path) -> None:
    few = ["--labels", "1", "--num-images", "1"]
    assert sample(run, tmp_path / "plain", *few) == 0
    assert sample(run, tmp_path / "guided", *few, "--guidance", "2", "--guide-checkpoint", str(other)) == 0
    assert sample(run, tmp_path / "free", *few, "--guidance", "2") == 0
    assert len({images(tmp_path / name)["1-0.png"] for name in ("plain", "guided", "free")}) == 3
    # Guiding away from itself changes nothing.
    assert sample(run, tmp_path / "self", *few, "--guidance", "2", "--guide-checkpoint", str(run)) == 0
    plain, own = (np.asarray(Image.open(tmp_path / name / "1-0.png")).astype(int) for name in ("plain", "self"))
    assert np.abs(plain - own).max() <= 1


def test_a_model_without_labels_can_be_guided_too(tmp_path: Path, run: Path, capfd: Any) -> None:
    unlabelled = lively_run(tmp_path / "run", model__class_conditional=False)
    few = ["--num-images", "1", "--guidance", "2"]
    assert sample(unlabelled, tmp_path / "alone", *few) == 2
    assert "needs model.class_conditional=true" in capfd.readouterr().err
    assert sample(unlabelled, tmp_path / "guided", *few, "--guide-checkpoint", str(run)) == 2
    assert "--guide-checkpoint: knows 10 classes, the model 0" in capfd.readouterr().err
    assert sample(unlabelled, tmp_path / "guided", *few, "--guide-checkpoint", str(unlabelled)) == 0
    assert sample(run, tmp_path / "labelled", *few, "--guide-checkpoint", str(unlabelled)) == 0


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["--labels", "0,33"], ["--labels = '33'", "0, 1, 2"]),
        (["--labels", "cat"], ["--labels = 'cat'"]),
        (["--num-images", "0"], ["--num-images = '0'", "integer >= 1"]),
        (["--num-images", "many"], ["--num-images = 'many'"]),
        (["--num-images", "300000000"], ["--num-images = '300000000'", "<= 1,000,000"]),
        *(
            (["--mode", mode, "--labels", "0,1", "--num-images", "328"], ["--num-images = '328'", "<= 327"])
            for mode in ("denoise", "progressive", "interpolate")
        ),
        (["--seed", "x"], ["--seed = 'x'", "integer >= 0"]),
        (["--steps", "51"], ["sample.steps = 51", "50"]),
        (["--sampler", "magic"], ["sample.sampler = 'magic'", "heun"]),
        (["--variance", "learned"], ["sample.variance", "model.learned_variance"]),
        (["--guidance-interval", "1,2"], ["sample.guidance_interval", "sample.guidance = 1.0"]),
        (["--weights", "sharp"], ["--weights = 'sharp'", "ema, model"]),
        (["--mode", "interpolate", "--labels", "1"], ["two labels"]),
        (["--mode", "interpolate", "--seeds", "1"], ["--seeds = '1'", "two seeds"]),
        (["--mode", "interpolate", "--seeds", "ü,x"], ["--seeds = 'ü'", "integer >= 0"]),
        (["--seeds", "0,1"], ["--seeds = '0,1'", "only for --mode interpolate"]),
        (["--seeds", "0,1", "--mode", "denoise"], ["--seeds = '0,1'", "only for --mode interpolate"]),
        (["--guide-checkpoint", "nowhere", "--guidance", "2"], ["'nowhere'", "no checkpoint"]),
    ],
)
def test_wrong_input_is_one_line(run: Path, tmp_path: Path, capfd: Any, words: list[str], fragments: list[str]) -> None:
    try:
        status: Any = sample(run, tmp_path / "out", *words)
    except SystemExit as leaving:  # The parser's.
        status = leaving.code
    assert status == 2
    out, err = capfd.readouterr()
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert all(fragment in err for fragment in fragments), err
    assert out == ""
    assert not list(tmp_path.rglob("*.png"))


def test_no_checkpoint_there(tmp_path: Path, capfd: Any) -> None:
    assert script.main(["--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert capfd.readouterr().err.startswith(f"error: --checkpoint = {str(tmp_path)!r}: no checkpoint here")


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(run: Path, tmp_path: Path, forks: Forks) -> None:
    words = ["--checkpoint", str(run), "--num-images", "13", "--device", "cpu", "--micro-batch", "4"]
    launch = [str(forks.interpreter), "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run(
        [*launch, str(SCRIPT), *words, "--out", "two"], cwd=tmp_path, capture_output=True, text=True, timeout=180,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("13 images (13 new)") == 1  # One process speaks.
    assert script.main([*words, "--out", str(tmp_path / "one")]) == 0
    one, two = tmp_path / "one", tmp_path / "two"
    assert set(images(one)) == set(images(two))
    assert len(images(one)) == 13
    for name in images(one):
        here, there = (np.asarray(Image.open(folder / name)).astype(int) for folder in (one, two))
        assert np.abs(here - there).max() <= 1, name
    assert json.loads((one / "samples.json").read_text()) == json.loads((two / "samples.json").read_text())
