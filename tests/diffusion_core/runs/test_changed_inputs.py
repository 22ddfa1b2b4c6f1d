"""An offline sweep whose images, parent or teacher change between two of its trials, and what is recorded of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from forks import ROOT, WORDS, Forks
from image_files import random_images
from PIL import Image

from diffusion_core.checkpoint import METADATA_FILE
from diffusion_core.data.fingerprint import RECORDED
from diffusion_core.run_folder import CHECKPOINTS, RUN_FILE, SWEEP_STATE
from diffusion_core.runs.inputs import (
    PARENT_KEY,
    OtherInput,
    check_as_others,
    differing_inputs,
    inputs_of,
    recorded_inputs,
)

WAIT_S = 300
FIXED = [word for word in WORDS if not word.startswith(("--log.dir", "--train.steps", "--checkpoint.every"))]
SHORT = [*FIXED, "--train.steps=2", "--checkpoint.every=2"]


def images(folder: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        (folder / name).mkdir(parents=True)
        for number, image in enumerate(random_images(6, 8, 8, 3, seed=seed)):
            Image.fromarray(image).save(folder / name / f"{number}.png")


def move_an_image(folder: Path) -> None:
    (folder / "a" / "5.png").rename(folder / "b" / "6.png")


def move_it_back(folder: Path) -> None:
    (folder / "b" / "6.png").rename(folder / "a" / "5.png")


def parents(place: Path, forks: Forks) -> None:
    for steps in (2, 4):
        words = [*FIXED, f"--train.steps={steps}", f"--log.dir={place.name}-{steps}", "--checkpoint.every=2"]
        run = forks.start(words, place.parent)
        assert run.wait() == 0, run.output
    (place.parent / place.name).symlink_to(f"{place.name}-2")


def point_to(steps: int) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        place.unlink()
        place.symlink_to(f"{place.name}-{steps}")

    return change


CASES: dict[str, tuple[list[str], Callable[[Path], None], Callable[[Path], None], str]] = {
    "data.path": (
        ["--data.name=folder", "--data.path=things", "--data.image_size=8"],
        move_an_image,
        move_it_back,
        "is 10 images for training and 2 held out (sha256 ",
    ),
    "init.checkpoint": (["--init.checkpoint=things"], point_to(4), point_to(2), "is step 4 (sha256 "),
    "distill.checkpoint": (
        ["--distill.checkpoint=things", "--distill.output=0.5"],
        point_to(4),
        point_to(2),
        "is step 4 (sha256 ",
    ),
}


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("key", CASES)
def test_a_trial_that_would_take_another_input_is_refused_before_it_begins(
    key: str, jobs: int, tmp_path: Path, forks: Forks
) -> None:
    words, change, restore, said = CASES[key]
    place = tmp_path / "things"
    images(place) if key == "data.path" else parents(place, forks)
    content: dict[str, Any] = {
        "method": "grid",
        "metric": {"name": "val/loss", "goal": "minimize"},
        "command": [str(forks.interpreter), "-m", "agent", *SHORT, *words, "${args}"],
        "parameters": {"train.lr": {"values": [0.001, 0.002, 0.003]}},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))

    def sweep(*more: str) -> subprocess.CompletedProcess[str]:
        command = [str(forks.interpreter), "-m", "agent.sweep", "mine.yaml", "--offline", f"--jobs={jobs}", *more]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "WANDB_MODE": "disabled"}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=WAIT_S, check=False
        )

    def stored() -> list[dict[str, Any]]:
        trials: list[dict[str, Any]] = json.loads((folder / SWEEP_STATE).read_text())["trials"]
        return trials

    folder = tmp_path / "runs/sweeps/mine"
    begun = sweep("--count=1")
    assert begun.returncode == 0, begun.stderr
    change(place)
    refused = sweep()
    assert refused.returncode == 2, refused.stderr
    assert f" {key} = 'things': {said}" in refused.stderr
    assert "restore that, or give the sweep another --name" in refused.stderr
    assert re.search(
        rf"^error: mine-00[23]-\w+: {'would take another input' if jobs == 1 else key}", refused.stderr, re.M
    )
    assert "Traceback" not in refused.stderr
    assert "not started, as an input has changed" in refused.stdout
    assert [(trial["state"], trial["failures"]) for trial in stored()] == [("finished", 0), *[("waiting", 0)] * jobs]
    assert len(list(folder.glob(f"trials/*/{RUN_FILE}"))) == 1
    restore(place)
    done = sweep()
    assert done.returncode == 0, done.stderr
    assert [trial["state"] for trial in stored()] == ["finished"] * 3
    taken = [recorded_inputs(trial)[key.partition(".")[0]] for trial in folder.glob("trials/*")]
    assert len({each.sha256 for each in taken}) == 1


# What is compared


def described(images: str = "1", parent: str | None = None, *, classes: str = "ab", **knobs: Any) -> dict[str, Any]:
    config = {"data.path": "x", "data.name": "folder", **{key.replace("__", "."): knobs[key] for key in knobs}}
    data = {"name": "folder", "train_images": 8, "val_images": 2, "sha256": images}
    extra = {} if parent is None else {PARENT_KEY: {"step": 3, "sha256": parent}}
    return {"config": config, "class_names": list(classes), RECORDED: data, "extra": extra}


def write(trial: Path, metadata: Any, run: str = ".") -> None:
    file = trial / run / CHECKPOINTS / "step-00000002" / METADATA_FILE
    file.parent.mkdir(parents=True)
    file.write_text(metadata if isinstance(metadata, str) else json.dumps(metadata))


@pytest.fixture
def trials(tmp_path: Path) -> Path:
    (tmp_path / SWEEP_STATE).write_text("{}")
    return tmp_path / "trials"


def test_only_what_has_the_same_name_is_compared(trials: Path) -> None:
    write(trials / "1", described(init__checkpoint="p", parent="a"))
    check_as_others(trials / "2", lambda: described("2", data__path="y"))
    check_as_others(trials / "2", lambda: described(init__checkpoint="q", parent="b"))
    check_as_others(trials / "2", lambda: described("2", classes="ba"))  # The order of a checkpoint's classes.
    write(trials / "2", described(init__checkpoint="q", parent="b"))
    check_as_others(trials / "3", lambda: described(init__checkpoint="q", parent="b"))
    with pytest.raises(OtherInput, match=r"^init.checkpoint = 'q': is step 3 .* for trial 2,"):
        check_as_others(trials / "3", lambda: described(init__checkpoint="q", parent="a"))
    with pytest.raises(OtherInput, match=r"^data.path = 'x': is 8 images .* for trial 1,"):
        check_as_others(trials / "3", lambda: described("2", classes="abc"))


@pytest.mark.parametrize(
    "metadata", ["", "[]", "{}", '{"config": 1, "extra": {}}', json.dumps(described() | {"data": 7})]
)
def test_trials_that_record_nothing_or_what_is_damaged_are_passed_over(metadata: str, trials: Path) -> None:
    write(trials / "1", metadata)
    (trials / "2").mkdir()  # A program of the user's.
    check_as_others(trials / "3", described)
    write(trials / "4", described("2"))
    with pytest.raises(OtherInput, match="for trial 4"):
        check_as_others(trials / "3", described)


def test_a_chain_of_tickets_is_compared_by_its_rounds(trials: Path) -> None:
    write(trials / "1", described("2"), "rounds/00")
    with pytest.raises(OtherInput):
        check_as_others(trials / "2", described)


def test_a_run_of_no_sweep_is_not_described(tmp_path: Path) -> None:
    write(tmp_path / "trials" / "1", described())
    check_as_others(tmp_path / "trials" / "2", lambda: pytest.fail("hashing images takes time"))


def test_what_differs_is_told_by_knob(trials: Path) -> None:
    ones = [described(), described("2", init__artifact="m", parent="a"), described(init__artifact="m", parent="a")]
    (found,) = differing_inputs(map(inputs_of, ones))
    assert found == ("data.path", ["8 images for training and 2 held out (sha256 1)",
                                   "8 images for training and 2 held out (sha256 2)"])  # fmt: skip
    assert list(differing_inputs(map(inputs_of, ones[:1]))) == []
