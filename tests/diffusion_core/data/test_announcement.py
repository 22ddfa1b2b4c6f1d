"""What a run says of its images before it starts, and how long it says that it will take."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import write
from tiny import cpu, digits, tiny_batches, tiny_config, tiny_state

from diffusion_core.config import CoreConfig, DataConfig
from diffusion_core.data.announcement import advise, announce_data, look_at_data
from diffusion_core.data.classes import shown_classes
from diffusion_core.data.datasets import DataError, load_data
from diffusion_core.training.callbacks import SayDuration
from diffusion_core.training.trainer import Callback, train


def class_folder(root: Path, counts: dict[str, int]) -> Path:
    for label, (name, count) in enumerate(counts.items()):
        for index in range(count):
            write(root / name / f"{index}.png", np.full((8, 8, 3), 40 * label + index, np.uint8))
    return root


def config_of(folder: Path, **changes: Any) -> CoreConfig:
    data = {"data__name": "folder", "data__path": str(folder), "data__image_size": 8, "data__val_fraction": 0.25}
    return tiny_config(**data, **changes)


def told(config: DataConfig, capsys: pytest.CaptureFixture[str]) -> list[str]:
    dataset = load_data(config)
    capsys.readouterr()
    announce_data(config, dataset)
    return capsys.readouterr().err.splitlines()


def test_images_classes_and_what_is_not_read_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class_folder(tmp_path, {"cat": 8, "dog": 4})
    (tmp_path / "cat" / "notes.txt").touch()
    (tmp_path / "dog" / ".hidden.png").touch()
    assert told(config_of(tmp_path).data, capsys) == [
        f"data: folder {str(tmp_path)!r}: 9 images for training, 3 held out (0.25 of each class); 2 classes: cat, dog",
        "data: passed over: 1 .txt, 1 hidden",
    ]


def test_nothing_is_downloaded_to_look_at_the_data(tmp_path: Path) -> None:
    place = tmp_path / "downloads"
    config = DataConfig.model_validate({"name": "cifar10", "path": str(place)})
    line = f"data: cifar10: 10 classes; a run reads or downloads it below {str(place)!r}"
    assert look_at_data(config) == ([line], 10)
    assert list(tmp_path.iterdir()) == []
    place.touch()
    with pytest.raises(DataError, match=r"data\.path = '.*downloads': is no folder; expected one to keep downloads in"):
        look_at_data(config)


def test_the_split_that_is_held_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, count in (("Train", 3), ("valid", 2), ("test", 1)):
        class_folder(tmp_path / split, {"cat": count})
    assert told(config_of(tmp_path).data, capsys)[:2] == [
        f"data: folder {str(tmp_path)!r}: 3 images for training, 2 held out (valid/); 1 class: cat",
        "data: test/ (1 image) is neither trained on nor held out",
    ]


def test_digits_are_announced_too(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = told(DataConfig(name="digits", val_fraction=0.2), capsys)
    count = (len(digits().train), len(digits().val))
    assert line == (
        f"data: digits: {count[0]:,} images for training, {count[1]} held out (0.2 of each class); 10 classes: "
        "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    )


def test_many_names_and_odd_ones_stay_one_line() -> None:
    assert shown_classes(["a\nb"]) == "1 class: a\\nb"
    line = shown_classes([f"n{number:04d}" for number in range(1000)])
    assert line.startswith("1,000 classes: n0000, n0001, ")
    assert line.endswith("n0019 and 980 more")


def test_held_out_images_among_the_training_images_are_counted(tmp_path: Path) -> None:
    class_folder(tmp_path / "train", {"cat": 5, "dog": 5})
    class_folder(tmp_path / "val", {"cat": 1, "dog": 1})
    write(tmp_path / "val" / "cat" / "0.png", np.full((8, 8, 3), 250, np.uint8))
    (note,) = load_data(config_of(tmp_path).data).notes
    assert note.startswith("warning: 1 of 2 held-out images are also training images")
    write(tmp_path / "val" / "dog" / "0.png", np.full((8, 8, 3), 251, np.uint8))
    assert load_data(config_of(tmp_path).data).notes == ()
    for index in range(5):  # Copies under other names and in another class.
        shutil.copy(tmp_path / "train" / "cat" / f"{index}.png", tmp_path / "val" / "dog" / f"copy{index}.png")
    (note,) = load_data(config_of(tmp_path).data).notes
    assert note.startswith("warning: 5 of 7 held-out images")
    assert "--duplicates drop" in note


@pytest.mark.parametrize(
    ("counts", "changes", "words"),
    [
        ({"cat": 8}, {}, ["warning: model.class_conditional = True: there is one class, 'cat'"]),
        ({"cat": 8}, {"model__class_conditional": False}, []),
        ({"cat": 6, "dog": 6}, {}, []),
        (
            {"cat": 4, "dog": 4},
            {},
            ["warning: train.batch_size = 8: more than the 6 training images, so a step shows each 1.3 times"],
        ),
    ],
)
def test_images_that_can_hardly_teach_are_warned_of(
    counts: dict[str, int], changes: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    config = config_of(class_folder(tmp_path, counts), train__batch_size=8 if len(counts) > 1 else 4, **changes)
    lines = list(advise(config.model, config.train, load_data(config.data)))
    assert len(lines) == len(words)
    for line, word in zip(lines, words, strict=True):
        assert line.startswith(word), line


# How long it takes.


@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_long_training_on_a_processor_is_announced_once(log_every: int, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(train__steps=10**9, log__every=log_every)
    seconds: list[float] = []
    state = tiny_state(config)
    say = SayDuration(config.train, torch.device("cpu"))
    timed: list[Callback] = [say, lambda state, _row: seconds.append(state.since_row.seconds)]
    train(state, tiny_batches(config), config, timed, accelerator=cpu(), until=4)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    said = re.fullmatch(r"training: (\S+) s a step, about ([\d,]+) days for 999,999,998 more steps", lines[0])
    assert said, lines
    each, days = float(said[1]), int(said[2].replace(",", ""))
    assert days == pytest.approx(each * 999_999_998 / 86_400, rel=0.06)  # It is rounded to two digits.
    if log_every > 1:
        assert each == pytest.approx(seconds[1] - seconds[0], rel=0.06)
    assert lines[1].startswith(f"warning: train.steps = 1000000000: takes about {said[2]} days on this processor; ")


def test_a_short_training_is_not_announced(capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(train__steps=4)
    say = SayDuration(config.train, torch.device("cpu"))
    train(tiny_state(config), tiny_batches(config), config, [say], accelerator=cpu())
    assert say.said
    assert capsys.readouterr().err == ""


def test_a_gpu_is_timed_by_the_second_row() -> None:
    """Its first row counts what is compiled, and between rows the loop runs ahead of it."""
    config = tiny_config(train__steps=10**6)
    say = SayDuration(config.train, torch.device("cuda"))
    state = tiny_state(config)
    for step, rate in [(1, None), (100, 8.0), (101, None), (200, 80.0)]:
        state.step = step
        say(state, {} if rate is None else {"train/images_per_second": rate})
        assert say.said == (step == 200)
