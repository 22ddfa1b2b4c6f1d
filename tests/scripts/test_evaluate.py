"""scripts/evaluate.py, evaluation while training, and the leaderboard: figures, protocols, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluate as script
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from forks import Forks
from PIL import Image
from tiny import TINY, digits, lively_run

from agent import leaderboard
from agent.config import build_config
from agent.trial import run_trial
from diffusion_core import cache
from diffusion_core.checkpoint import STUDENT, read_checkpoint
from diffusion_core.data.datasets import DataError, load_data
from diffusion_core.evaluation.classifier.classifier import classifier_for
from diffusion_core.evaluation.generated import generated
from diffusion_core.evaluation.leaderboard import COSTS
from diffusion_core.model.unet import build_network
from diffusion_core.sampling.generation import Generator
from diffusion_core.search.results import JSON_FILE
from diffusion_core.tracking import MemoryTracker
from diffusion_core.training import evaluation
from diffusion_core.training.evaluation import Evaluate
from diffusion_core.training.trainer import TrainState

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "evaluate.py"
ALL = ["frechet", "kernel", "score", "precision_recall", "density_coverage", "per_class", "loss_by_timestep"]
FULL = {
    "eval.figures": [*ALL, "synthetic_accuracy"],
    "eval.extractors": ["classifier"],
    "eval.num_images": 20,
    "eval.every": 4,
    "checkpoint.best_metric": "eval/fd_classifier-digits_20_train",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MemoryTracker, Any]:
    """A trial that measures everything twice, its folder, and what it told the world."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cache.VARIABLE, str(tmp_path_factory.mktemp("cache")))
        folder, tracker, config = tmp_path_factory.mktemp("run"), MemoryTracker(), build_config(TINY, FULL)
        result = run_trial(config, tracker, dataset=digits(), folder=folder, run_id="abc")
    return folder, tracker, result


def test_training_logs_all_figures_with_their_protocols(run: tuple[Path, MemoryTracker, Any]) -> None:
    folder, tracker, result = run
    config = build_config(TINY, FULL)
    rows = [row for row in tracker.rows if "val/loss" in row]
    assert [row["step"] for row in rows] == [4, 8]
    for name in config.logged_figures():
        if "*" not in name:
            assert name in rows[0], name
    assert sum(name.startswith("eval/fd_classifier-digits_2_train/") for name in rows[0]) == 10  # One for each class.
    protocol = tracker.figures["protocol/eval/fd_classifier-digits_20_train"]
    for part in ("reference=digits/train (1,438 images", "n=20", "sampler=ddim", "steps=4", "guidance=", "seed=0",
                 "extractor=classifier-digits", "weights="):  # fmt: skip
        assert part in protocol
    protocols = json.loads((folder / "protocols.json").read_text())
    assert set(protocols) <= set(rows[0])
    assert not any(name.startswith("eval/fid") for name in rows[0])
    # Any figure may decide which checkpoint is best.
    best = min(rows, key=lambda row: row["eval/fd_classifier-digits_20_train"])
    assert result.figures["eval/fd_classifier-digits_20_train"] == best["eval/fd_classifier-digits_20_train"]
    # What was computed of the real images is shared, once.
    (shared,) = [artifact for artifact in tracker.artifacts if artifact["type"] == "reference-statistics"]
    assert shared["metadata"]["source"].startswith("digits/train")


def test_without_inception_weights_training_goes_on_and_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = build_config(
        TINY,
        {"eval.figures": ["frechet"], "eval.inception_weights": str(tmp_path / "no.pth"), "eval.every": 4,
         "eval.num_images": 4},
    )  # fmt: skip
    tracker = MemoryTracker()
    run_trial(config, tracker, dataset=digits(), folder=tmp_path / "run", run_id="x")
    said = [line for line in capsys.readouterr().err.splitlines() if "no.pth" in line]
    assert len(said) == 1
    assert "no figures in features of inception" in said[0]
    assert all(0.0 <= row["eval/class_agreement"] <= 1.0 for row in tracker.rows if "val/loss" in row)


@pytest.mark.parametrize(
    ("timed_from", "said"), [(0.0, "evaluation: 4 images, about "), (1e12, "evaluation: 4 images (eval.num_images)\n")]
)
def test_an_estimate_comes_before_the_first_evaluation_and_nothing_is_built_before_it(
    timed_from: float, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "WORTH_TIMING_MACS", timed_from)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    config = build_config(TINY, {"eval.every": 4, "eval.num_images": 4, "eval.val_images": 8})
    evaluate = Evaluate(config, digits(), Accelerator(cpu=True), MemoryTracker(), tmp_path / "run")
    state = TrainState.start(build_network(config, 10), config.train, config.ema)
    state.step = 1
    evaluate(state, {})
    assert not (tmp_path / "cache").exists()
    state.step = 4
    row: dict[str, float] = {}
    evaluate(state, row)
    evaluate(state, row)
    assert (tmp_path / "cache" / "classifiers").is_dir()
    assert set(row) == {"val/loss", "eval/class_agreement"}
    told = capsys.readouterr().err
    assert told.count(said) == 1


def test_images_that_are_no_numbers_are_refused_in_one_line() -> None:
    config = build_config(TINY)
    network = build_network(config, 10).eval()
    assert network.conv_out.bias is not None
    with torch.no_grad():
        network.conv_out.bias.fill_(float("nan"))
    with pytest.raises(DataError, match="3 of 3 generated images are not finite"):
        list(generated(Generator(network, config, "fp32"), 3, config.sample, 0))


# The script


def call(*words: str, code: int = 0) -> None:
    """The script's main in this process: the imports take longer than the work."""
    found: Any
    try:
        found = script.main(["--device", "cpu", *words])
    except SystemExit as exit_:
        found = exit_.code
    assert found == code


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real held-out digits, named as samples are, and a sub-folder of noise; a classifier beside them."""
    root = tmp_path_factory.mktemp("images")
    for name in ("real", "noise"):
        (root / name).mkdir()
    source = np.random.default_rng(0)
    val = digits().val
    for index in range(60):
        pixels = val.images_NCHW[index, 0].numpy()
        Image.fromarray(pixels).save(root / "real" / f"{int(val.labels_N[index])}-{index}.png")
        Image.fromarray(source.integers(0, 256, (8, 8), dtype=np.uint8)).save(
            root / "noise" / f"{index % 10}-{index}.png"
        )
    classifier_for(digits(), "digits", mirrored=False, device=torch.device("cpu")).save(root / "c.safetensors")
    return root


def test_a_folder_of_images_against_a_data_set(images: Path, tmp_path: Path) -> None:
    found = {}
    for name in ("real", "noise"):
        call(str(images / name), "--data", "digits", "--json", str(tmp_path / "new" / name))
        found[name] = json.loads((tmp_path / "new" / name).read_text())["figures"]
    assert found["real"]["eval/class_agreement"] > 0.95 > 0.3 > found["noise"]["eval/class_agreement"]
    name = "eval/fd_classifier-digits_60_train"
    assert found["real"][name] < found["noise"][name]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_two_folders_and_statistics_of_pytorch_fids_format(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Pixels(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float().flatten(1)[:, :64]

    torch.jit.script(Pixels()).save(str(tmp_path / "pixels.pt"))
    space = ("--extractor", str(tmp_path / "pixels.pt"))
    real, noise = str(images / "real"), str(images / "noise")
    statistics = str(tmp_path / "noise.npz")
    call(real, noise, *space, "--json", str(tmp_path / "a.json"), "--batch-size", "7")
    call("--save-stats", noise, statistics, *space)
    call(real, statistics, *space, "--json", str(tmp_path / "b.json"))
    a, b = (json.loads((tmp_path / name).read_text())["figures"] for name in ("a.json", "b.json"))
    assert {"eval/fd_pixels_60_noise", "eval/kd_pixels_60_noise", "eval/recall_pixels_60_noise"} <= set(a)
    assert list(b) == ["eval/fd_pixels_60_noise"]
    assert b["eval/fd_pixels_60_noise"] == pytest.approx(a["eval/fd_pixels_60_noise"], rel=1e-9)
    # Two files, as pytorch-fid itself would write them: its formula, and no network at all.
    with np.load(statistics) as file:
        np.savez(tmp_path / "other.npz", mu=file["mu"] + 1.0, sigma=4.0 * file["sigma"])
        expected = 64.0 + float(np.trace(file["sigma"]))
    call(statistics, str(tmp_path / "other.npz"), "--json", str(tmp_path / "c.json"))
    (value,) = json.loads((tmp_path / "c.json").read_text())["figures"].values()
    assert value == pytest.approx(expected, rel=1e-5)
    capsys.readouterr()
    call("--save-stats", noise, statistics, *space, code=2)  # Nothing is overwritten.
    assert "exists already" in capsys.readouterr().err


def test_what_cannot_be_judged_is_refused_in_one_line(
    images: Path, tmp_path: Path, run: tuple[Path, MemoryTracker, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    real, extractor = str(images / "real"), ("--extractor", str(images / "c.safetensors"))
    for name in ("empty", "one", "mixed", "damaged"):
        (tmp_path / name).mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "one" / "a.png")
    for index, size in enumerate((8, 8, 9)):
        Image.new("L", (size, 8)).save(tmp_path / "mixed" / f"{index}.png")
        (tmp_path / "damaged" / f"{index}.png").write_bytes(b"no image")
    (tmp_path / "w.pth").write_bytes(b"damaged")
    checkpoint = str(run[0])
    cases = [
        ([str(tmp_path / "nowhere"), real, *extractor], "no such folder"),
        ([str(tmp_path / "empty"), real, *extractor], "no images in it"),
        ([str(tmp_path / "one"), real, *extractor], "single image"),
        ([str(tmp_path / "mixed"), str(tmp_path / "mixed")], "expected images of one size"),
        ([str(tmp_path / "damaged"), str(tmp_path / "damaged")], "not a readable image"),
        ([real, real, "--inception-weights", str(tmp_path / "none.pth")], "none.pth"),
        ([real, real, "--inception-weights", str(tmp_path / "w.pth")], "not Inception weights"),
        ([real, real, "--extractor", "classifier"], "no data set to train it on"),
        ([real, str(tmp_path / "no.npz"), *extractor], "no.npz"),
        (["--checkpoint", str(tmp_path / "empty")], "no checkpoint here"),
        (["--checkpoint", checkpoint, "--num-images", "1"], "at least 2"),
        (["--checkpoint", checkpoint, "--against", str(tmp_path)], "no checkpoint here"),
        (["--sweep", str(tmp_path)], "no finished trial"),
    ]
    for words, reason in cases:
        more = extractor if words[0] in (str(tmp_path / "mixed"), str(tmp_path / "damaged")) else ()
        call(*words, *more, code=2)
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(told) == 1, words
        assert reason in told[0], told
    for words, reason in [
        ([], "expected one of --artifact"),
        ([real], "expected --data NAME"),
        (["--checkpoint", "x", "--wandb"], "expected --artifact"),
        (["--checkpoint", "x", "--figures", "fid"], "expected some of"),
        (["--checkpoint", "x", "--num-images", "0"], "expected an integer >= 1"),
        (["--checkpoint", "x", "--against", "x", "--num-images", "300000000"], "--num-images = 300000000: "),
        (["--save-stats", real], "expected a folder of images and the file"),
    ]:
        call(*words, code=2)
        assert reason in capsys.readouterr().err


def test_sampling_flags_decide_what_is_judged(run: tuple[Path, MemoryTracker, Any], tmp_path: Path) -> None:
    common = ["--checkpoint", str(run[0]), "--num-images", "20", "--figures", "frechet", "--micro-batch", "7",
              "--compile", "none", "--reference", "val"]  # fmt: skip
    flags = {
        "ddim": ["--sampler", "ddim", "--steps", "3", "--spacing", "quadratic", "--eta", "0.5", "--seed", "1"],
        "another seed": ["--sampler", "ddim", "--steps", "3", "--spacing", "quadratic", "--eta", "0.5", "--seed", "7"],
        "ddpm": ["--sampler", "ddpm", "--steps", "3", "--variance", "fixed_small"],
        "guided": ["--steps", "3", "--guidance", "2", "--guidance-interval", "0.1,5"],
    }
    protocols, values = {}, {}
    for name, words in flags.items():
        call(*common, *words, "--json", str(tmp_path / "found.json"))
        found = json.loads((tmp_path / "found.json").read_text())
        protocols[name] = found["protocols"]["eval/fd_classifier-digits_20_val"]
        values[name] = found["figures"]["eval/fd_classifier-digits_20_val"]
    assert "sampler=ddim, steps=3, spacing=quadratic, eta=0.5, guidance=1, seed=1" in protocols["ddim"]
    assert "sampler=ddpm, steps=3, spacing=uniform, variance=fixed_small, guidance=1" in protocols["ddpm"]
    assert "guidance=2, guidance_interval=0.1..5" in protocols["guided"]
    assert all("reference=digits/val" in protocol for protocol in protocols.values())
    assert len(set(values.values())) == len(flags)


def test_a_weaker_model_guides_what_is_judged(
    run: tuple[Path, MemoryTracker, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--checkpoint", str(run[0]), "--num-images", "20", "--figures", "frechet", "--steps", "3"]
    early = lively_run(tmp_path / "early", sample__guidance=2.0)

    def judged(*words: str) -> tuple[float, str]:
        call(*common, *words, "--json", str(tmp_path / "found.json"))
        found = json.loads((tmp_path / "found.json").read_text())
        assert ("sample/macs" in found["figures"]) == ("--guide-checkpoint" not in words)
        (name,) = [name for name in found["figures"] if name.startswith("eval/fd_")]
        return found["figures"][name], found["protocols"][name]

    plain, _ = judged("--guidance", "1")
    own, told = judged("--guidance", "2", "--guide-checkpoint", str(run[0]))
    assert own == pytest.approx(plain, rel=1e-2)  # Guiding away from itself changes nothing but rounding.
    assert f"away from {run[0]}" in told
    assert abs(judged("--guidance", "2", "--guide-checkpoint", str(early))[0] / plain - 1) > 0.02
    for words, reason in (
        ([*common, "--guidance", "1", "--guide-checkpoint", str(early)], "sample.guidance = 1.0: ignores the model"),
        ([str(tmp_path), "--data", "digits", "--guide-checkpoint", str(early)], "--guide-checkpoint: expected a model"),
    ):
        call(*words, code=2)
        assert reason in capsys.readouterr().err


def test_the_best_trial_of_a_sweep_is_judged(
    run: tuple[Path, MemoryTracker, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = run[2].best_checkpoint
    shutil.copytree(best.parents[1], tmp_path / "trials" / "one")
    (tmp_path / JSON_FILE).write_text(json.dumps([{"id": "one", "best_checkpoint": str(best)}]))
    call("--sweep", str(tmp_path), "--num-images", "10", "--figures", "", "--json", str(tmp_path / "found.json"))
    assert f"{tmp_path / 'trials' / 'one' / 'checkpoints' / best.name}: 10 images" in capsys.readouterr().err
    assert "eval/class_agreement" in json.loads((tmp_path / "found.json").read_text())["figures"]


def test_images_of_a_model_may_have_moved(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (images / "real").glob("*.png"):
        label = file.name[0]
        (tmp_path / "before" / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "before" / label)
    data = {"data.name": "folder", "data.path": str(tmp_path / "before"), "data.image_size": 8}
    config = build_config(TINY, data, {"eval.classifier": "none", "eval.val_images": 4, "train.steps": 2})
    run_trial(config, MemoryTracker(), dataset=load_data(config.data), folder=tmp_path / "run", run_id="run")
    (tmp_path / "before").rename(tmp_path / "after")
    words = ["--checkpoint", str(tmp_path / "run"), "--num-images", "10", "--figures", "kernel",
             "--extractor", str(images / "c.safetensors")]  # fmt: skip
    call(*words, code=2)
    assert "no such folder" in capsys.readouterr().err
    call(*words, "--data-path", str(tmp_path / "after"), "--json", str(tmp_path / "found.json"))
    assert any(name.startswith("eval/kd_") for name in json.loads((tmp_path / "found.json").read_text())["figures"])


@pytest.mark.slow
def test_a_model_is_judged_by_one_and_by_two_processes_alike(
    run: tuple[Path, MemoryTracker, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], forks: Forks
) -> None:
    """An odd number of images, so that the last one of the second process stands for nothing."""
    words = ["--checkpoint", str(run[0]), "--num-images", "31", "--micro-batch", "5",
             "--figures", ",".join([*ALL[:-1], "synthetic_accuracy"])]  # fmt: skip
    call(*words, "--json", str(tmp_path / "one.json"))
    assert "eval/class_agreement" in capsys.readouterr().out  # The table.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    launcher = [str(forks.interpreter), "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                "--num_machines", "1", "--main_process_port", port, "--mixed_precision", "no",
                "--dynamo_backend", "no"]  # fmt: skip
    done = subprocess.run(
        [*launcher, str(SCRIPT), "--device", "cpu", *words, "--json", str(tmp_path / "two.json")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", cache.VARIABLE: str(tmp_path / "cache")},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one["protocols"] == two["protocols"]
    assert set(one["figures"]) == set(two["figures"])
    for name, value in one["figures"].items():
        if name not in ("eval/seconds_per_image", "sample/seconds"):
            assert two["figures"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_two_models_are_compared_image_by_image(run: tuple[Path, MemoryTracker, Any], tmp_path: Path) -> None:
    other = tmp_path / "other"
    run_trial(build_config(TINY, {"seed": 1, "eval.classifier": "none"}), MemoryTracker(), dataset=digits(),
              folder=other, run_id="other")  # fmt: skip
    found = []
    for against in (run[0], other):
        call("--checkpoint", str(run[0]), "--against", str(against), "--num-images", "6", "--json", str(tmp_path / "j"))
        found.append(json.loads((tmp_path / "j").read_text())["figures"])
    same, different = found
    assert same == {"eval/consistency_ssim_6": pytest.approx(1.0), "eval/consistency_mse_6": 0.0}
    assert different["eval/consistency_ssim_6"] < 1.0
    assert different["eval/consistency_mse_6"] > 0.0


def test_a_model_of_an_earlier_version_is_compared_by_images_of_the_same_noise(
    run: tuple[Path, MemoryTracker, Any], tmp_path: Path
) -> None:
    earlier = shutil.copytree(run[0], tmp_path / "earlier")
    for file in earlier.glob("checkpoints/*/checkpoint.json"):
        stored = json.loads(file.read_text())
        assert stored["config"].pop("draws") == 3
        file.write_text(json.dumps(stored))
    assert read_checkpoint(earlier).config().draws == 1
    words = ["--num-images", "6", "--json", str(tmp_path / "j")]
    for one, other in ((run[0], earlier), (earlier, run[0])):
        call("--checkpoint", str(one), "--against", str(other), *words)
        assert json.loads((tmp_path / "j").read_text())["figures"]["eval/consistency_mse_6"] == 0.0


def test_the_leaderboard_lists_models_with_costs_figures_and_protocols(
    run: tuple[Path, MemoryTracker, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "eval/fd_classifier-digits_20_train"
    assert leaderboard.main([str(run[0]), "--by", name, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split()[:4] == ["model", "step", "parameters", "MACs"]
    assert "abc" in shown
    assert "\n[1] " in shown
    assert "reference=digits/train" in shown
    (row,) = json.loads((tmp_path / "leaderboard.json").read_text())
    assert row["figures"][name] == run[2].figures[name]
    costs = {column: run[2].figures[figure] for column, figure in COSTS.items() if figure in run[2].figures}
    assert row["costs"] == costs
    assert costs["latency"] == run[2].figures["model/latency"] != run[2].figures["model/latency_single"]
    assert (tmp_path / "leaderboard.csv").read_text().startswith("model,step,parameters,MACs,")
    assert leaderboard.main([str(tmp_path / "nothing")]) == 2
    assert "no finished run" in capsys.readouterr().err


def test_evaluations_of_a_checkpoint_add_to_its_figures(
    run: tuple[Path, MemoryTracker, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = shutil.copytree(run[0], tmp_path / "run")
    words = ["--checkpoint", str(copied), "--num-images", "20"]
    fd, kd = "eval/fd_classifier-digits_20_train", "eval/kd_classifier-digits_20_train"

    def found() -> dict[str, Any]:
        return json.loads(file.read_text())

    call(*words, "--figures", "frechet", "--steps", "3")
    (file,) = copied.rglob("evaluation.json")
    first = found()
    call(*words, "--figures", "kernel", "--steps", "2")
    both = found()
    assert both["step"] == first["step"] == read_checkpoint(file.parent).step
    assert both["figures"][fd] == first["figures"][fd]
    assert "steps=3" in both["protocols"][fd]
    assert "steps=2" in both["protocols"][kd]
    # Measured again: those of the newest evaluation, which also says what its images cost.
    assert "steps=2" in both["protocols"]["eval/class_agreement"]
    assert both["protocols"]["sample/evaluations"].startswith("sampler=ddim, steps=2")
    assert (first["figures"]["sample/evaluations"], both["figures"]["sample/evaluations"]) == (3, 2)
    capsys.readouterr()
    call(*words, "--against", str(run[0]))
    assert found() == both
    assert "written to" not in capsys.readouterr().out
    # Another checkpoint in its place, and a file of an earlier version, whose costs are of an unknown sampling.
    file.write_text(json.dumps(first | {"step": first["step"] + 1}))
    call(*words, "--figures", "kernel")
    assert fd not in found()["figures"]
    file.write_text(json.dumps({"figures": {fd: 1.0, "sample/macs": 9.0}, "protocols": {fd: "n=20"}}))
    call(*words, "--figures", "kernel", "--guidance", "2", "--guide-checkpoint", str(run[0]))
    assert found()["figures"][fd] == 1.0
    assert "sample/macs" not in found()["figures"]
    for damaged in ("{", "[]", '{"figures": {"a": "b"}, "protocols": {}}'):
        file.write_text(damaged)
        capsys.readouterr()
        call(*words, "--figures", "")
        said = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
        assert said == [f"{file}: damaged; it is replaced, with the figures of this evaluation only"]
        assert "eval/class_agreement" in found()["figures"]


def test_figures_that_cannot_be_measured_are_refused_before_anything_is_sampled(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real, extractor = str(images / "real"), ("--extractor", str(images / "c.safetensors"))
    (tmp_path / "bare").mkdir()
    for index, file in enumerate(sorted((images / "real").glob("*.png"))[:3]):
        shutil.copy(file, tmp_path / "bare" / f"{index}.png")
    call("--save-stats", real, str(tmp_path / "a.npz"), *extractor)
    shutil.copy(tmp_path / "a.npz", tmp_path / "b.npz")
    one, two, bare = (str(tmp_path / name) for name in ("a.npz", "b.npz", "bare"))
    model = str(lively_run(tmp_path / "run", model__class_conditional=False, eval__classifier="none"))
    few = ("--num-images", "4")
    labels, every = "needs labels, and ", "needs the features of every image, and "
    cases = {
        ("--checkpoint", model, *few, "--figures", "diversity,svc_agreement"): ("diversity", f"{labels}the model "),
        ("--checkpoint", model, *few, "--figures", "frechet,per_class"): ("per_class", f"{labels}the model "),
        (bare, "--data", "digits", "--figures", "diversity"): ("diversity", f"{labels}{bare!r}"),
        (real, real, "--figures", "svc_agreement"): ("svc_agreement", f"{labels}a comparison of two paths"),
        (real, real, *extractor, "--figures", "per_class"): ("per_class", f"{labels}a comparison of two paths"),
        (one, two, "--figures", "frechet,kernel"): ("kernel", f"{every}{one!r}"),
        (real, two, *extractor, "--figures", "precision_recall"): ("precision_recall", f"{every}{two!r}"),
        (one, real, *extractor, "--figures", "score"): ("score", f"needs the classes of images, and {one!r}"),
    }
    for words, (figure, reason) in cases.items():
        capsys.readouterr()
        call(*words, "--json", str(tmp_path / "j"), code=2)
        said = capsys.readouterr()
        (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: --figures = {figure!r}: {reason}"), line
        assert line.endswith(" has none; leave it out")
        assert not said.out
    for words in (("--checkpoint", model, *few), (bare, "--data", "digits"), (one, two)):
        call(*words, "--figures", "", "--json", str(tmp_path / "j"), code=2)
        assert "--figures = '': nothing to measure; name a figure" in capsys.readouterr().err
    assert not (tmp_path / "j").exists()
    assert not list(Path(model).rglob("evaluation.json"))
    call(real, two, *extractor, "--figures", "score", "--json", str(tmp_path / "j"))  # The reference has no say.
    call(one, two, "--json", str(tmp_path / "j"))  # What the default names is not asked for.


def test_the_second_model_is_sampled_as_it_would_be_alone(
    run: tuple[Path, MemoryTracker, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def changed(name: str, change: Callable[[dict[str, Any]], None]) -> str:
        copied = shutil.copytree(run[0], tmp_path / name)
        for file in copied.glob("checkpoints/*/checkpoint.json"):
            stored = json.loads(file.read_text())
            change(stored)
            file.write_text(json.dumps(stored))
        return str(copied)

    def undropped(stored: dict[str, Any]) -> None:
        stored["config"] |= {"train.label_dropout": 0.0, "sample.guidance": 1.0}

    def renamed(stored: dict[str, Any]) -> None:
        stored["class_names"][3] = "three"

    def student(stored: dict[str, Any]) -> None:
        stored["extra"][STUDENT] = {"sampling": {"steps": 2, "guidance": 1.0}}

    words = ["--num-images", "4", "--guidance", "2", "--json", str(tmp_path / "j")]
    plain, other = str(run[0]), changed("undropped", undropped)
    capsys.readouterr()
    call("--checkpoint", other, *words, code=2)
    alone = capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")
    call("--checkpoint", plain, "--against", other, *words, code=2)
    assert capsys.readouterr().err.splitlines()[-1] == f"error: --against = {other!r}: {alone}"
    other = changed("renamed", renamed)
    call("--checkpoint", plain, "--against", other, *words, code=2)
    said = f"error: --against = {other!r}: class 3 is 'three'; expected '3', as of the first model"
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert not (tmp_path / "j").exists()
    other = changed("student", student)
    for pair in ([plain, other], [other, plain]):
        call("--checkpoint", pair[0], "--against", pair[1], *words)
        (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
        assert "sample.guidance = 2.0: the student" in warning
        assert "distilled for" in warning
