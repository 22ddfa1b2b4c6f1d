"""No key leaves the environment: neither into a run's files, nor to the server, nor into what is printed there."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forks import WORDS, Fork, Forks
from server import WandbServer
from wandb_client import Client

from diffusion_core.redact import BLANK, Tee, recorded_console, redact, redacted, redacted_arguments

WANDB_KEY = "c0ffee" * 6 + "c0de"
HUB_TOKEN = "canary-of-the-hub-0123456789"
PASTED = "wandb_v1_" + "Canary42" * 6
"""A key that somebody put where it does not belong: into a value, on the command line."""


@pytest.mark.parametrize(
    "key",
    [WANDB_KEY, PASTED, "hf_" + "A1b2" * 8, "ghp_" + "A1b2" * 9, "sk-" + "a1B2" * 10, "AKIA" + "ABCD1234" * 2],
    ids=lambda key: key[:5],
)
def test_what_looks_like_a_key_is_blanked_out(key: str) -> None:
    assert redact(key) == BLANK
    assert redact(f"s3://{key}@host/{key}?x={key}") == f"s3://{BLANK}@host/{BLANK}?x={BLANK}"
    assert redacted({"a": [key, {"b": f"x {key}"}], key: 3}) == {"a": [BLANK, {"b": f"x {BLANK}"}], BLANK: 3}


@pytest.mark.parametrize(
    "text",
    ["runs/abc", "0" * 39, "0" * 41, "f" * 64, "step-00001000", "hf_home", "val/loss = 0.1", "class_names", "", "sk-1"],
)
def test_what_is_none_stays(text: str) -> None:
    assert redact(text) == text


def test_the_values_of_secret_variables_are_blanked_out_whatever_they_look_like(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("MY_API_KEY", "HF_TOKEN", "AWS_SECRET", "DB_PASSWORD", "WANDB_APIKEY"):
        monkeypatch.setenv(name, "an odd value")
        assert redact("so an odd value it is") == f"so {BLANK} it is"
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_TOKEN", "none")  # Too short to be one.
    assert redact("none of it") == "none of it"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "an odd value")
    assert redact("so an odd value it is") == "so an odd value it is"


def test_the_command_line_is_shown_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["agent", f"--data.path={PASTED}"])
    with redacted_arguments():
        assert sys.argv == ["agent", f"--data.path={BLANK}"]
    assert sys.argv == ["agent", f"--data.path={PASTED}"]


def test_the_console_is_recorded_by_lines_without_keys(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    with recorded_console(lines.append):
        print("one", PASTED[:20], end="")
        print(PASTED[20:])  # A key in two pieces.
        print("error", PASTED, file=sys.stderr)
    print("after")
    assert lines == [f"one {BLANK}", f"error {BLANK}"]
    assert capsys.readouterr().out == f"one {PASTED}\nafter\n"


def test_of_a_progress_bar_the_last_state_is_recorded() -> None:
    lines: list[str] = []
    tee = Tee(io.StringIO(), lines.append)
    for text in ("\r 10%", "\r 50%", "\r100%", "\n", "a\r", "b\r\n", "c"):
        tee.write(text)
    assert lines == ["100%", "b"]
    assert tee.getvalue() == "\r 10%\r 50%\r100%\na\rb\r\nc"


TRIAL = [
    *(word for word in WORDS if not word.startswith("--log.dir")),
    "--train.steps=4",
    "--data.name=folder",
    "--data.image_size=8",
]


def images(folder: Path) -> None:
    """A folder of images whose name is a key, in which a class is called like a variable that holds one."""
    from PIL import Image

    for label in ("zero", "one"):
        (folder / PASTED / label).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (8, 8), (40 * i, 10, 90)).save(folder / PASTED / label / f"{i}.png")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WandbServer, dict[str, Fork]]]:
    """A trial online and one offline, with keys in the environment, on the command line and in what they print."""
    with WandbServer() as server, Forks() as forks:
        server.api_key = WANDB_KEY
        trials = {}
        for name, mode in (("on", "online"), ("off", "offline")):
            folder = tmp_path_factory.mktemp(name)
            images(folder)
            secrets: dict[str, Any] = {"WANDB_API_KEY": WANDB_KEY, "HF_TOKEN": HUB_TOKEN, "WANDB_MODE": mode}
            env = Client(server, folder).env | secrets | {"WANDB_NAME": name, "WANDB_RUN_ID": name}
            words = [*TRIAL, f"--log.dir=run-{PASTED}", f"--data.path={PASTED}/../{PASTED}"]
            trials[name] = forks.start(words, folder, env)
        for trial in trials.values():
            assert trial.wait() == 0, trial.output
        yield server, trials
        assert server.errors == []


@pytest.mark.slow
def test_every_byte_is_free_of_keys(trained: tuple[WandbServer, dict[str, Fork]]) -> None:
    """The run's folder with its offline file, W&B's own directories, and all that the server received."""
    server, trials = trained
    keys = [WANDB_KEY.encode(), HUB_TOKEN.encode(), PASTED.encode()]
    files = [file for trial in trials.values() for file in trial.out.parent.rglob("*") if file.is_file()]
    files = [file for file in files if file.name != "out.txt"]  # What a user saw on the screen.
    assert any(file.suffix == ".wandb" for file in files)
    assert len(files) > 30
    for file in files:
        content = file.read_bytes()
        assert not [key for key in keys if key in content], file
    assert len(server.received) > 10
    for path, body in server.received:
        assert not [key for key in keys if key in body or key in path.encode()], path


@pytest.mark.slow
def test_the_run_itself_is_whole(trained: tuple[WandbServer, dict[str, Fork]]) -> None:
    server, _ = trained
    run = server.runs["on"]
    assert run.state == "finished"
    assert run.config["data.path"] == f"{BLANK}/../{BLANK}"
    assert b"finished on at step 4" in run.files["output.log"]  # The console is recorded nevertheless.
    assert f"pictures: run-{BLANK}/samples".encode() in run.files["output.log"]
    assert [row["step"] for row in run.history] == [1, 2, 3, 4]
