"""Where W&B's files of a run lie on this machine, and where the run belongs on W&B."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import wandb
from forks import WORDS, Forks
from server import WandbServer
from wandb_client import Client

from agent.tracking.api import DEFAULT_PROJECT
from agent.tracking.environment import has_key

TRIAL = [*WORDS, "--train.steps=3", "--checkpoint.keep=1"]


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server
        assert server.errors == []


def bare(client: Client) -> dict[str, str]:
    """The environment of a machine where nobody has set anything of W&B, not even a key."""
    kept = ("WANDB_BASE_URL", "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "WANDB_ERROR_REPORTING")
    return {key: value for key, value in client.env.items() if not key.startswith("WANDB_") or key in kept}


@pytest.mark.slow
@pytest.mark.parametrize("known_by", ["nothing", "mode", "login", "key", "key, told by wandb offline"])
def test_files_of_wandb_lie_in_the_folder_of_the_run(
    known_by: str, server: WandbServer, tmp_path: Path, forks: Forks
) -> None:
    client = Client(server, tmp_path / "machine")
    env = bare(client)
    if known_by == "mode":
        env["WANDB_MODE"] = "offline"
    elif known_by == "login":
        netrc = Path(env["HOME"], ".netrc")
        netrc.write_text(f"machine {urlsplit(server.url).netloc} login user password {server.api_key}\n")
        netrc.chmod(0o600)
    elif known_by.startswith("key"):
        env["WANDB_API_KEY"] = server.api_key
    if "offline" in known_by:
        subprocess.run([client.interpreter, "-m", "wandb", "offline"], cwd=client.directory, env=env, check=True)
    trial = forks.start(TRIAL, client.directory, env)
    assert trial.wait() == 0, trial.output
    assert "WARNING" not in trial.output
    (files,) = client.directory.glob("run/wandb/*run-*")
    assert files.name.startswith("run-" if known_by in ("login", "key") else "offline-run-")
    assert not list(client.directory.glob("wandb/*run*"))
    assert ("no API key" in trial.output) == (known_by == "nothing")
    assert len(server.runs) == (known_by in ("login", "key"))


@pytest.mark.slow
def test_runs_that_are_sent_together_go_where_each_belongs(server: WandbServer, tmp_path: Path, forks: Forks) -> None:
    client = Client(server, tmp_path / "machine")
    env = bare(client)
    for name, own in (("one", {"WANDB_PROJECT": "first", "WANDB_RUN_GROUP": "some"}), ("two", {})):
        folder = client.directory / name
        folder.mkdir()
        trial = forks.start(TRIAL, folder, env | own | {"WANDB_MODE": "offline", "WANDB_RUN_ID": name})
        assert trial.wait() == 0, trial.output
    sync = forks.start(["one", "two"], client.directory, env | {"WANDB_API_KEY": server.api_key}, "agent.sync")
    assert sync.wait() == 0, sync.output
    assert "environment variables will be ignored" not in sync.output
    one, two = server.runs["one"], server.runs["two"]
    assert (one.project.name, one.group) == ("first", "some")
    assert (two.project.name, two.group or None) == (DEFAULT_PROJECT, None)
    for name in ("one", "two"):
        assert len(list((client.directory / name / "run/wandb").glob("run-*"))) == 1, name


KEY = "0123456789abcdef" * 3
OWN = "http://127.0.0.1:8080"


@pytest.mark.parametrize(
    ("variables", "files", "found"),
    [
        ({}, {}, False),
        ({"WANDB_API_KEY": KEY}, {}, True),
        ({"WANDB_IDENTITY_TOKEN_FILE": "token"}, {}, True),
        ({}, {".netrc": f"machine api.wandb.ai login user password {KEY}\n"}, True),
        ({}, {".netrc": f"machine example.com login user password {KEY}\n"}, False),
        ({"WANDB_BASE_URL": OWN}, {".netrc": f"machine 127.0.0.1:8080 login user password {KEY}\n"}, True),
        ({"WANDB_BASE_URL": OWN}, {".netrc": f"machine api.wandb.ai login user password {KEY}\n"}, False),
        ({"NETRC": "~/keys"}, {"keys": f"machine api.wandb.ai login user password {KEY}\n"}, True),
        (
            {},
            {
                ".config/wandb/settings": f"[default]\nbase_url = {OWN}\n",
                ".netrc": f"machine 127.0.0.1:8080 login user password {KEY}\n",
            },
            True,
        ),
        ({}, {".netrc": "machine api.wandb.ai login user password\n"}, False),
    ],
)
def test_a_key_is_found_wherever_the_client_finds_one(
    variables: dict[str, str], files: dict[str, str], found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    for name, value in ({"HOME": str(tmp_path)} | variables).items():
        monkeypatch.setenv(name, value)
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(content)
        (tmp_path / file).chmod(0o600)
    wandb.teardown()
    assert has_key() == found
    wandb.teardown()
