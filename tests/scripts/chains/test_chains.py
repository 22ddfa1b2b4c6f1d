"""Models that upsample, on the command line: chains, folders of small images, evaluation, pruning, and refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import convert_diffusers
import evaluate
import numpy as np
import prune
import pytest
import sample_images as script
import torch
from PIL import Image
from tiny import TINY, digits, lively_run

from agent.config import build_config
from agent.trial import run_trial
from diffusion_core.checkpoint import read_checkpoint
from diffusion_core.config import ConfigError
from diffusion_core.data.datasets import load_data, to_uint8
from diffusion_core.sampling.generation import Generator, requests
from diffusion_core.sampling.lows import HeldOut
from diffusion_core.tracking import NullTracker

SMALL: dict[str, Any] = {
    "model__channel_multipliers": [1],
    "model__attention_resolutions": [],
    "diffusion__prediction": "v",
}
FEW = ("--labels", "3,7", "--num-images", "6")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base of 4 x 4 pixels; models that make 8 x 8 of it, and 16 x 16 of that; and some that do not fit."""
    kinds: dict[str, dict[str, Any]] = {
        "base": {"data__image_size": 4, "sample__guidance": 2.0},
        "up8": {"upsample__factor": 2, "upsample__noise": 0.5, "seed": 1},
        "up16": {"upsample__factor": 2, "data__image_size": 16, "seed": 2, "model__class_conditional": False},
        "by four": {"upsample__factor": 4, "seed": 3},
        "ordinary": {},
    }
    root = tmp_path_factory.mktemp("runs")
    return {name: lively_run(root / name, **SMALL, **kind) for name, kind in kinds.items()}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sample(run: Path, *words: str, out: str) -> int:
    return script.main(["--checkpoint", str(run), "--out", out, "--device", "cpu", "--precision", "fp32", *words])


def images(folder: str) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in Path(folder).glob("*-*.png")}


def assert_alike(one: str, other: str) -> None:
    ours, theirs = images(one), images(other)
    assert ours.keys() == theirs.keys()
    assert ours
    for name, pixels in ours.items():
        assert np.abs(pixels - theirs[name]).max() <= 1, name


def test_a_chain_is_its_stages_one_after_the_other(runs: dict[str, Path]) -> None:
    stages = ["--upsample", str(runs["up8"]), str(runs["up16"])]
    assert sample(runs["base"], *FEW, *stages, out="chain") == 0
    assert sample(runs["base"], *FEW, out="first") == 0
    assert sample(runs["up8"], "--low", "first", out="second") == 0
    assert sample(runs["up16"], "--low", "second", out="third") == 0
    assert {pixels.shape for pixels in images("chain").values()} == {(16, 16)}
    assert set(images("chain")) == {f"{label}-{index}.png" for label in (3, 7) for index in range(3)}
    assert images("second").keys() == images("chain").keys()
    assert_alike("chain", "third")  # Also by a model without labels.
    two = ["--upsample", str(runs["up8"])]
    assert sample(runs["base"], *FEW, *two, out="two") == 0
    assert_alike("two", "second")
    # Other numbers of images and of images at once: the same images. Fewer steps of the base: others.
    assert sample(runs["base"], "--num-images", "20", *two, "--micro-batch", "3", out="many") == 0
    assert all(
        np.abs(images("many")[name] - pixels).max() <= 1 for name, pixels in images("two").items() if "-2" not in name
    )
    assert sample(runs["base"], *FEW, *two, "--steps", "2", out="shorter") == 0
    assert any(np.abs(images("shorter")[name] - pixels).max() > 1 for name, pixels in images("two").items())


def test_a_chain_is_the_formula(runs: dict[str, Path]) -> None:
    """The images of the base, in eight bits, are what the next model samples from."""
    assert sample(runs["base"], *FEW, "--upsample", str(runs["up8"]), out="chain") == 0
    base, up = (read_checkpoint(runs[name]) for name in ("base", "up8"))
    wanted = requests([3, 7], 3)
    first, second = (run.config().sample for run in (base, up))
    small = to_uint8(Generator(base.network(), base.config(), "fp32").batch(wanted, first, 0))
    model = Generator(up.network(), up.config(), "fp32", lows=lambda _: small)
    expected = to_uint8(model.batch(wanted, second, 0))
    for request, pixels in zip(wanted, expected, strict=True):
        found = images("chain")[f"{request.label}-{request.index}.png"]
        assert np.abs(found - pixels[0].numpy().astype(int)).max() <= 1


def test_settings_of_a_chain_are_not_mixed(runs: dict[str, Path], capsys: Any) -> None:
    chain = [*FEW, "--upsample", str(runs["up8"])]
    assert sample(runs["base"], *chain, out="a") == 0
    assert sample(runs["base"], *chain, out="a") == 0
    for other in ([*chain, "--low-noise", "0.4"], [*chain, str(runs["up16"])], list(FEW)):
        capsys.readouterr()
        assert sample(runs["base"], *other, out="a") == 2
        assert "holds images of other settings" in capsys.readouterr().err
    assert sample(runs["base"], *chain, "--low-noise", "0.4", out="noisy") == 0
    assert any(np.abs(images("noisy")[name] - pixels).max() > 1 for name, pixels in images("a").items())


@pytest.mark.parametrize("mode", ["denoise", "progressive"])
def test_a_chain_shows_how_its_last_model_samples(runs: dict[str, Path], mode: str) -> None:
    chain = ["--labels", "3", "--num-images", "1", "--upsample", str(runs["up8"])]
    assert sample(runs["base"], *chain, "--mode", mode, out=mode) == 0
    assert Path(mode, f"{mode}.png").is_file()
    assert sample(runs["base"], *chain, "--gif", out="s") == 0
    assert Path("s/diffusion.gif").is_file()


def test_a_model_alone_upsamples_held_out_images(runs: dict[str, Path]) -> None:
    assert sample(runs["up8"], *FEW, out="alone") == 0
    up = read_checkpoint(runs["up8"])
    model = Generator(up.network(), up.config(), "fp32", lows=HeldOut(digits(), 2))
    expected = model.images(requests([3, 7], 3), up.config().sample, 0)
    for number, pixels in enumerate(expected):
        found = images("alone")[f"{(3, 7)[number // 3]}-{number % 3}.png"]
        assert np.abs(found - pixels[0].numpy().astype(int)).max() <= 1
    assert sample(runs["up8"], "--mode", "interpolate", "--labels", "3,7", out="between") == 0


def test_images_of_a_folder_are_upsampled_by_class_or_without(runs: dict[str, Path]) -> None:
    low = HeldOut(digits(), 2)
    for label in (3, 7):
        Path("classes", str(label)).mkdir(parents=True)
        for request, pixels in zip(requests([label], 3), low(requests([label], 3)), strict=True):
            Image.fromarray(pixels[0].numpy()).save(Path("classes", str(label), f"{request.index}.png"))
    assert sample(runs["up8"], *FEW, out="held out") == 0
    assert sample(runs["up8"], "--low", "classes", out="by class") == 0
    assert_alike("held out", "by class")
    assert sample(runs["up8"], "--low", "classes/3", out="without") == 0
    assert set(images("without")) == {"none-0.png", "none-1.png", "none-2.png"}
    assert sample(runs["up8"], "--low", "classes", "--labels", "7", "--num-images", "2", out="some") == 0
    assert set(images("some")) == {"7-0.png", "7-1.png"}


def test_a_guide_may_upsample(runs: dict[str, Path], capsys: Any) -> None:
    guided = ["--labels", "3", "--num-images", "1", "--guidance", "2", "--guide-checkpoint"]
    for name in ("up8", "ordinary"):
        assert sample(runs["up8"], *guided, str(runs[name]), out=name) == 0
    assert sample(runs["up8"], "--labels", "3", "--num-images", "1", out="plain") == 0
    assert_alike("plain", "up8")  # Guiding away from itself changes nothing.
    assert sample(runs["up8"], *guided, str(runs["by four"]), out="four") == 2
    assert "--guide-checkpoint: upsample.factor = 4, of the model 2" in capsys.readouterr().err


def refusals(runs: dict[str, Path]) -> Iterator[tuple[str, list[str], str]]:
    up8, up16, ordinary = (str(runs[name]) for name in ("up8", "up16", "ordinary"))
    yield "base", ["--upsample", ordinary], "is an ordinary model; expected one that was trained with upsample.factor"
    yield "base", ["--upsample", up16], "upsamples images of 1 x 8 x 8; "
    yield "ordinary", ["--upsample", up8], "upsamples images of 1 x 4 x 4; "
    yield "base", ["--upsample", up8, up8], "makes 1 x 8 x 8"
    yield "base", ["--upsample", "nowhere"], "--upsample = 'nowhere': no checkpoint here"
    yield "base", ["--upsample", "model-x:best"], "--upsample = 'model-x:best': no W&B API key"
    yield "base", ["--low", "."], "--low = '.': "
    yield "base", ["--data-path", "x"], "is an ordinary model, which upsamples nothing"
    yield "base", ["--low-noise", "0.1"], "upsample.sample_noise = 0.1: has no effect without upsample.factor"
    yield "up8", ["--low-noise", "0.6"], "upsample.sample_noise = 0.6: expected at most upsample.noise = 0.5"
    yield "base", ["--upsample", up8, "--low-noise", "0.6"], "upsample.sample_noise = 0.6: expected at most"
    yield "base", ["--upsample", up8, "--mode", "interpolate"], "--mode = 'interpolate': not with --low or --upsample"
    yield "up8", ["--low", "empty"], "'empty': no images in it"
    yield "up8", ["--low", "large"], "--low = 'large': images of 8 x 8 pixels; expected 4 x 4"
    yield "up8", ["--low", "small", "--labels", "5"], "--labels = '5': no image of --low has such a label"
    yield "up8", ["--low", "beyond"], "--low = 'beyond': class 12; the model knows 0 to 9"


def test_what_does_not_fit_is_refused_in_one_line(
    runs: dict[str, Path], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "none")
    for name, size, file in (("large", 8, "3-0.png"), ("small", 4, "3-0.png"), ("beyond", 4, "12-0.png")):
        Path(name).mkdir()
        Image.new("L", (size, size)).save(Path(name, file))
    Path("empty").mkdir()
    for base, words, message in refusals(runs):
        capsys.readouterr()
        assert sample(runs[base], *words, out="out") == 2, words
        out, err = capsys.readouterr()
        assert err.startswith("error: "), err
        assert len(err.splitlines()) == 1, err
        assert message in err, err
        assert out == ""
        assert not Path("out").exists()


def test_images_without_classes_are_refused_by_a_model_that_always_saw_one(tmp_path: Path, capsys: Any) -> None:
    strict = lively_run(tmp_path / "strict", **SMALL, upsample__factor=2, train__label_dropout=0.0)
    Path("low").mkdir()
    Image.new("L", (4, 4)).save("low/a.png")
    assert sample(strict, "--low", "low", out="out") == 2
    assert "--low = 'low': the images have no class" in capsys.readouterr().err


def test_a_data_set_that_is_gone_is_one_line_that_names_the_folder_flag(
    runs: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    for label in ("cat", "dog"):
        Path("data", label).mkdir(parents=True)
        for index in range(4):
            Image.fromarray(np.full((8, 8), 30 * index, np.uint8)).save(Path("data", label, f"{index}.png"))
    folder = {"data__name": "folder", "data__path": "data", "data__image_size": 8}

    settings = {key.replace("__", "."): value for key, value in (SMALL | folder).items()}
    few = {"upsample.factor": 2, "train.steps": 1, "eval.classifier": "none", "train.batch_size": 2}
    config = build_config(TINY, settings, few)
    run_trial(config, NullTracker(), dataset=load_data(config.data), folder=tmp_path / "run", run_id="run")
    Path("data").rename("moved")
    assert sample(tmp_path / "run", out="out") == 2
    err = capsys.readouterr().err
    assert err.strip().endswith("; or name a folder of small images by --low")
    assert len(err.splitlines()) == 1
    assert sample(tmp_path / "run", "--data-path", "moved", "--num-images", "2", out="out") == 0


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--figures", "synthetic_accuracy"], "--figures = ['synthetic_accuracy']: synthetic_accuracy compares with"),
        (["--figures", "frechet,svc_synthetic_accuracy"], "svc_synthetic_accuracy compares with held-out images"),
        (["--reference", "val"], "--reference = 'val': compares with held-out images, and upsample.factor=2"),
    ],
)
def test_it_is_not_judged_by_the_images_that_it_enlarged(
    flags: list[str], problem: str, runs: dict[str, Path], capsys: Any
) -> None:
    words = ["--num-images", "20", "--device", "cpu", *flags]
    assert evaluate.main(["--checkpoint", str(runs["up8"]), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert problem in line


def test_it_may_be_judged_by_held_out_images_where_nothing_compares(runs: dict[str, Path], capsys: Any) -> None:
    words = ["--num-images", "20", "--device", "cpu", "--figures", "svc_agreement", "--reference", "val"]
    assert evaluate.main(["--checkpoint", str(runs["up8"]), *words]) == 0
    assert "eval/svc_agreement_20" in capsys.readouterr().out


def test_it_is_evaluated_beside_bilinear_interpolation(runs: dict[str, Path], capsys: Any) -> None:
    words = ["--checkpoint", str(runs["up8"]), "--num-images", "20", "--figures", "frechet", "--device", "cpu"]
    assert evaluate.main([*words, "--json", "a.json", "--low-noise", "0.1"]) == 0
    found = json.loads(Path("a.json").read_text())
    space = "eval/fd_classifier-digits_20_train"
    assert {"eval/class_agreement", space, "bilinear/eval/class_agreement", f"bilinear/{space}"} <= set(
        found["figures"]
    )
    assert "upsampled=2x from held-out images, noise=0.1" in found["protocols"][space]
    assert "bilinear, 2x from held-out images" in found["protocols"][f"bilinear/{space}"]
    against = [
        "--checkpoint",
        str(runs["up8"]),
        "--num-images",
        "4",
        "--device",
        "cpu",
        "--json",
        "b.json",
        "--against",
    ]
    assert evaluate.main([*against, str(runs["up8"])]) == 0
    assert json.loads(Path("b.json").read_text())["figures"]["eval/consistency_mse_4"] == 0.0
    for name, kind in (("ordinary", "upsample.factor = None"), ("by four", "upsample.factor = 4")):
        capsys.readouterr()
        assert evaluate.main([*against, str(runs[name])]) == 2
        assert kind in capsys.readouterr().err


def test_it_is_pruned_and_goes_on(runs: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    words = ["--checkpoint", str(runs["up8"]), "--target", "macs=0.6", "--num-images", "4", "--json"]
    assert prune.main([*words, "--out", "smaller"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["consistency"]["num_images"] == 4
    network = read_checkpoint(Path("smaller")).network()
    assert (network.input_channels, network.given_channels) == (3, 2)
    more = lively_run(tmp_path / "more", **SMALL, upsample__factor=2, init__checkpoint="smaller")
    assert read_checkpoint(more).network().conv_in.weight.shape == network.conv_in.weight.shape
    for given in ({}, {"upsample__factor": 4}):
        with pytest.raises(ConfigError, match=r"upsample\.factor = .*: expected 2,"):
            lively_run(tmp_path / "other", **SMALL, **given, init__checkpoint="smaller")


def test_it_has_no_pipeline(runs: dict[str, Path], capsys: Any) -> None:
    assert convert_diffusers.main(["export", str(runs["up8"]), "pipeline"]) == 2
    assert "upsample.factor: DDPMPipeline gives the network no small image" in capsys.readouterr().err


def test_the_draws_of_earlier_models_can_be_upsampled(runs: dict[str, Path]) -> None:
    """A run of version 1 of the random numbers has other noise, and the same kind of small images."""
    up = read_checkpoint(runs["up8"])
    config = up.config().model_copy(update={"draws": 1})
    model = Generator(up.network(), config, "fp32", lows=HeldOut(digits(), 2))
    assert torch.equal(*(model.images(requests([1], 2), config.sample, 0) for _ in range(2)))
