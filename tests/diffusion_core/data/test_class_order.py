"""Classes whose order is another one than when a run was started: labels keep their meaning, or the run is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from image_files import write
from tiny import TINY, assert_same_tensors, one_line

from agent.config import TrialConfig, build_config
from agent.lottery import run_chain
from agent.trial import run_trial
from diffusion_core.checkpoint import read_checkpoint
from diffusion_core.config import ConfigError
from diffusion_core.data.datasets import Dataset, Images, load_data
from diffusion_core.randomness import Purpose, generator
from diffusion_core.run_folder import DATA_FILE
from diffusion_core.tracking import MemoryTracker

COUNT, EACH = 11, 4
BY_VALUE = tuple(str(number) for number in range(COUNT))
AS_TEXT = tuple(sorted(BY_VALUE))
"""The order of earlier versions."""


def colour(name: str, index: int) -> int:
    return 20 * int(name) + index


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven classes of four plain images each, whose brightness names class and index."""
    root = tmp_path_factory.mktemp("data")
    for name in BY_VALUE:
        for index in range(EACH):
            write(root / name / f"{index}.png", np.full((8, 8, 3), colour(name, index), np.uint8))
    return root


def config_of(folder: Path, **changes: Any) -> TrialConfig:
    base = {"data.name": "folder", "data.path": str(folder), "data.image_size": 8, "data.val_fraction": 0.25}
    quick = {
        "eval.classifier": "none",
        "eval.val_images": 4,
        "sample.every": 0,
        "train.steps": 2,
        "train.batch_size": 4,
    }
    return build_config(TINY, base, quick, {key.replace("__", "."): value for key, value in changes.items()})


def run(run_folder: Path, config: TrialConfig, dataset: Dataset) -> None:
    run_trial(config, MemoryTracker(), dataset=dataset, folder=run_folder, run_id=run_folder.name)


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two steps: `old` with the order of earlier versions, `new` with that of this one."""
    root = tmp_path_factory.mktemp("runs")
    for name, order in (("old", AS_TEXT), ("new", ())):
        run(root / name, config_of(folder), load_data(config_of(folder).data, recorded=order))
    return root


def named(images: Images, names: tuple[str, ...]) -> list[tuple[str, int]]:
    """Return the class name of each image, and its brightness."""
    values = images.images_NCHW[:, 0, 0, 0].tolist()
    return [(names[label], value) for label, value in zip(images.labels_N.tolist(), values, strict=True)]


def held_out_by_version_0_1() -> Counter[tuple[str, int]]:
    """Return what an earlier version held out: of each class the first image of the permutation of its label."""
    held_out = Counter[tuple[str, int]]()
    for label, name in enumerate(AS_TEXT):
        order = torch.randperm(EACH, generator=generator(0, Purpose.SPLIT, label))
        held_out[name, colour(name, int(order[0]))] += 1
    return held_out


def test_a_recorded_order_gives_the_labels_and_the_split_of_that_time(folder: Path) -> None:
    config = config_of(folder).data
    assert load_data(config).class_names == BY_VALUE
    old = load_data(config, recorded=AS_TEXT)
    assert old.class_names == AS_TEXT
    everything = named(old.train, AS_TEXT) + named(old.val, AS_TEXT)
    assert Counter(everything) == Counter((name, colour(name, i)) for name in BY_VALUE for i in range(EACH))
    assert Counter(named(old.val, AS_TEXT)) == held_out_by_version_0_1()
    assert load_data(config, recorded=("cat", "dog")).class_names == BY_VALUE


def test_a_run_of_an_earlier_order_goes_on_as_if_it_were_never_stopped(
    folder: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = (load_data(config_of(folder).data, recorded=order) for order in (AS_TEXT, ()))
    run(tmp_path / "whole", config_of(folder, train__steps=4), old)
    shutil.copytree(runs / "old", tmp_path / "broken")
    capsys.readouterr()
    run(tmp_path / "broken", config_of(folder, train__steps=4), new)
    whole, broken = (read_checkpoint(tmp_path / name) for name in ("whole", "broken"))
    assert broken.class_names == AS_TEXT
    assert_same_tensors(broken.tensors("model"), whole.tensors("model"))
    assert json.loads((tmp_path / "broken" / DATA_FILE).read_text())["class_names"] == list(AS_TEXT)
    assert "not the images" not in capsys.readouterr().err


def test_a_run_does_not_go_on_with_other_classes(folder: Path, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "new", tmp_path / "run")
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "10").rename(other / "ten")
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
    config = config_of(other, train__steps=4)
    with pytest.raises(ConfigError) as caught:
        run(tmp_path / "run", config, load_data(config.data))
    message = one_line(caught.value)
    assert message.startswith(f"data.path = {str(other)!r}: holds 11 classes: 0, 1, 2")
    assert "ten; the run was started with 11 classes: 0, 1, 2" in message
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*")) == before


def test_other_images_are_noticed(folder: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs / "new", tmp_path / "run")
    other = shutil.copytree(folder, tmp_path / "other")
    shutil.copy(other / "0" / "0.png", other / "1" / "9.png")
    capsys.readouterr()
    config = config_of(other, train__steps=3)
    run(tmp_path / "run", config, load_data(config.data))
    assert "which were 33 for training and 11 held out; now 34 and 11" in capsys.readouterr().err


@pytest.mark.parametrize("section", ["init", "distill"])
def test_a_run_that_starts_from_a_checkpoint_of_other_images_says_so(
    folder: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], section: str
) -> None:
    """Its former training images may be held out now."""
    begun = {f"{section}__checkpoint": str(runs / "new"), **({"distill__output": 1.0} if section == "distill" else {})}
    run(tmp_path / "same", config_of(folder, **begun), load_data(config_of(folder).data))
    assert "not the images" not in capsys.readouterr().err
    grown = shutil.copytree(folder, tmp_path / "grown")
    for index in range(EACH):
        shutil.copy(grown / "0" / f"{index}.png", grown / "0" / f"{EACH + index}.png")
    data = load_data(config_of(grown).data)
    run(tmp_path / "other", config_of(grown, **begun), data)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "not the images" in line]
    assert line.startswith("warning: data.name = folder: not the images that ")
    assert f"{runs / 'new'}/checkpoints/step-00000002 was trained with, which were 33 for training and 11 held" in line
    assert "now 36 and 12; what it was trained with may be held out now" in line
    assert read_checkpoint(tmp_path / "other").metadata["data"]["sha256"] == data.sha256


def test_evaluation_of_a_checkpoint_on_other_images_says_so(
    folder: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", str(runs / "new"), "--num-images", "11", "--device", "cpu", "--extractor", "classifier",
             "--figures", "frechet", "--json", str(tmp_path / "j")]  # fmt: skip
    old = shutil.copytree(runs / "new", tmp_path / "old")
    for file in old.rglob("checkpoint.json"):  # As earlier versions wrote it.
        stored = json.loads(file.read_text())
        del stored["data"]
        file.write_text(json.dumps(stored))
    grown = shutil.copytree(folder, tmp_path / "grown")
    shutil.copy(grown / "0" / "0.png", grown / "0" / "9.png")
    for place, source, said in ((folder, runs / "new", 0), (grown, runs / "new", 1), (grown, old, 0)):
        words[1] = str(source)
        assert evaluate.main([*words, "--data-path", str(place)]) == 0
        assert capsys.readouterr().err.count("not the images that ") == said


def test_a_run_that_starts_from_a_checkpoint_takes_its_labels_over(
    folder: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = load_data(config_of(folder).data)
    run(tmp_path / "run", config_of(folder, init__checkpoint=str(runs / "old")), new)
    assert read_checkpoint(tmp_path / "run").class_names == AS_TEXT
    assert "not the images" not in capsys.readouterr().err, "they are the same in another order"
    assert read_checkpoint(runs / "new").class_names == BY_VALUE
    both = {"init__checkpoint": str(runs / "old"), "distill__checkpoint": str(runs / "new")}
    with pytest.raises(ConfigError, match=r"distill.checkpoint = .*, in another order than"):
        run(tmp_path / "both", config_of(folder, distill__output=1.0, **both), new)


@pytest.mark.slow
def test_later_rounds_of_a_lottery_keep_the_labels_of_the_first(folder: Path, tmp_path: Path) -> None:
    old, new = (load_data(config_of(folder).data, recorded=order) for order in (AS_TEXT, ()))
    for rounds, dataset in ((1, old), (2, new)):
        config = config_of(folder, prune__method="lottery", prune__rounds=rounds)
        run_chain(config, MemoryTracker(), dataset=dataset, folder=tmp_path, run_id="chain")
    names = [read_checkpoint(place.parent).class_names for place in tmp_path.rglob("checkpoints")]
    assert names == [AS_TEXT] * 3
