"""Where W&B's files of a run lie on this machine, and where the run belongs on W&B."""

from __future__ import annotations

import os
import subprocess
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import wandb
from forks import WORDS, Forks
from server import WandbServer
from wandb_client import Client

from agent.report import study_of
from agent.tracking import project, registry, sweeps
from agent.tracking.api import DEFAULT_PROJECT, server_status
from agent.tracking.artifacts import download_model
from agent.tracking.environment import has_key
from diffusion_core.checkpoint import CheckpointError
from diffusion_core.config import ConfigError
from diffusion_core.run_folder import mark_synced, note_place

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


@pytest.mark.slow
def test_a_run_on_wandb_stays_where_it_is_whatever_the_environment_says_later(
    server: WandbServer, tmp_path: Path, forks: Forks
) -> None:
    client = Client(server, tmp_path / "machine")
    env = bare(client) | {"WANDB_API_KEY": server.api_key}
    trial = forks.start(TRIAL, client.directory, env | {"WANDB_PROJECT": "first", "WANDB_NAME": "mine"})
    assert trial.wait() == 0, trial.output
    (run,) = server.runs.values()
    assert (run.project.name, run.display_name, len(run.history)) == ("first", "mine", 3)
    run.display_name = "renamed by hand"
    later = env | {
        "WANDB_PROJECT": "next",
        "WANDB_ENTITY": "tester",
        "WANDB_RUN_GROUP": "other",
        "WANDB_NAME": "theirs",
    }
    sync = forks.start(["run"], client.directory, later, "agent.sync")
    assert sync.wait() == 0, sync.output
    assert (run.group, run.display_name) == (None, "renamed by hand")
    longer = forks.start([*TRIAL, "--train.steps=5"], client.directory, later)
    assert longer.wait() == 0, longer.output
    assert [row["step"] for row in run.history] == [1, 2, 3, 4, 5]
    assert len(server.runs) == 1


@pytest.mark.slow
def test_a_run_that_wandb_has_not_seen_keeps_its_name_and_goes_where_it_is_sent(
    server: WandbServer, tmp_path: Path, forks: Forks
) -> None:
    client = Client(server, tmp_path / "machine")
    env = bare(client)
    described = {"WANDB_NAME": "lr 1e-3", "WANDB_TAGS": "a,b", "WANDB_NOTES": "why", "WANDB_JOB_TYPE": "try"}
    trial = forks.start(TRIAL, client.directory, env | described | {"WANDB_MODE": "offline"})
    assert trial.wait() == 0, trial.output
    online = env | {"WANDB_API_KEY": server.api_key, "WANDB_PROJECT": "paper", "WANDB_SWEEP_ID": "none of it"}
    sync = forks.start(["run"], client.directory, online, "agent.sync")
    assert sync.wait() == 0, sync.output
    (run,) = server.runs.values()
    assert (run.project.name, run.display_name, run.tags, run.notes) == ("paper", "lr 1e-3", ["a", "b"], "why")
    assert run.sweep_id is None


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


@pytest.mark.slow
def test_a_team_of_wandb_init_gets_sweep_and_trials(server: WandbServer, tmp_path: Path, forks: Forks) -> None:
    client = Client(server, tmp_path / "machine")
    env = bare(client) | {"WANDB_API_KEY": server.api_key}
    (client.directory / "wandb").mkdir()
    (client.directory / "wandb" / "settings").write_text("[default]\nentity = team\nproject = of-init\n")
    trial = forks.start(TRIAL, client.directory, env)
    assert trial.wait() == 0, trial.output
    (run,) = server.runs.values()
    assert (run.entity, run.project.name) == ("team", "of-init")
    client.env = env
    told = client.script(
        """
        from agent.tracking import sweeps
        path = sweeps.create({"method": "grid", "name": "mine", "parameters": {"seed": {"values": [1]}}})
        found, config = sweeps.find(path.split("/")[-1])
        result = [path, found, config["name"]]
        """
    )
    assert told == [told[0], told[0], "mine"]
    assert told[0].startswith("team/of-init/")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value", "refused"),
    [
        (
            "WANDB_RUN_ID",
            "exp 1",
            "WANDB_RUN_ID = 'exp 1': expected letters, digits",
        ),
        (
            "WANDB_DIR",
            "/proc/none",
            "WANDB_DIR = '/proc/none': No such file or directory; name",
        ),
        ("WANDB_DIR", "~/files", ""),
    ],
)
def test_what_wandb_cannot_use_is_refused_in_a_line(
    variable: str, value: str, refused: str, server: WandbServer, tmp_path: Path, forks: Forks
) -> None:
    client = Client(server, tmp_path / "machine")
    trial = forks.start(TRIAL, client.directory, bare(client) | {variable: value})
    assert trial.wait() == (2 if refused else 0), trial.output
    assert not refused or f"\nerror: {refused}" in f"\n{trial.output}"
    assert "Traceback" not in trial.output
    assert not (client.directory / "~").exists()


@pytest.mark.parametrize("kind", ["own", "loaded"])
def test_the_question_for_the_servers_state_has_the_key_and_headers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, str]] = []

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(dict(self.headers))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    listening = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.server_port}")
    monkeypatch.setenv("WANDB_X_EXTRA_HTTP_HEADERS", '{"X-Corp": "1"}')
    if kind == "own":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    else:
        (tmp_path / ".netrc").write_text(f"machine 127.0.0.1:{listening.server_port} login user password {KEY}\n")
        (tmp_path / ".netrc").chmod(0o600)
    wandb.teardown()
    assert server_status() == 200
    wandb.teardown()
    listening.shutdown()
    (headers,) = seen
    assert headers["X-Corp"] == "1"
    assert b64decode(headers["Authorization"].removeprefix("Basic ")).decode() == f"api:{KEY}"


@pytest.mark.parametrize(
    "ask",
    [
        lambda: study_of(["runs/sweeps/quikstart"]),
        lambda: list(project.finished_runs("p", "best")),
        lambda: list(project.versions_without_alias("p")),
        lambda: sweeps.find("e/p/s"),
        lambda: sweeps.create({"name": "s"}),
        lambda: sweeps.runs("e/p/s"),
        lambda: sweeps.address("e/p/s"),
        lambda: registry.best_model("e/p/s"),
        lambda: download_model("model-x"),
    ],
)
def test_without_a_key_nothing_asks_for_one(
    ask: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's own API would begin a dialogue in a terminal."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb, "Api", lambda: pytest.fail("it would ask"))
    wandb.teardown()
    with pytest.raises((ConfigError, CheckpointError), match="no W&B API key; set WANDB_API_KEY"):
        ask()
    wandb.teardown()


@pytest.mark.slow
def test_what_is_to_be_on_wandb_is_sent_in_offline_mode_too(server: WandbServer, tmp_path: Path) -> None:
    client = Client(server, tmp_path / "machine")
    client.script(
        """
        from agent.tracking import project
        project.log_table("first", "leaderboard", ["run"], [["a"]])
        """,
        WANDB_MODE="offline",
    )
    (run,) = server.runs.values()
    assert (run.project.name, run.job_type) == ("first", "leaderboard")


def test_files_of_other_runs_are_not_marked_as_sent(tmp_path: Path) -> None:
    note_place(tmp_path, "abc", "entity/project")
    for name in ("run-1-abc/run-abc.wandb", "offline-run-1-abc/run-abc.wandb", "offline-run-1-abc-00/run-abc-00.wandb"):
        (tmp_path / "wandb" / name).parent.mkdir(parents=True)
        (tmp_path / "wandb" / name).touch()
    mark_synced(tmp_path)
    marked = {file.parent.name for file in tmp_path.glob("wandb/*/*.synced")}
    assert marked == {"run-1-abc", "offline-run-1-abc"}


@pytest.mark.slow
def test_rounds_of_a_lottery_keep_their_own_files_and_arrive_in_its_group(
    server: WandbServer, tmp_path: Path, forks: Forks
) -> None:
    client = Client(server, tmp_path / "machine")
    env = bare(client) | {"WANDB_RUN_ID": "abc"}
    words = [*TRIAL, "--prune.method=lottery", "--prune.rounds=1", "--prune.rewind_step=1"]
    trial = forks.start(words, client.directory, env | {"WANDB_MODE": "offline"})
    assert trial.wait() == 0, trial.output
    for name, place in (("abc", "run"), ("abc-00", "run/rounds/*"), ("abc-01", "run/rounds/*")):
        (folder,) = client.directory.glob(f"{place}/wandb/offline-run-*-{name}")
        assert (folder.parents[1] / "run.json").is_file()
    sync = forks.start(["run"], client.directory, env | {"WANDB_API_KEY": server.api_key}, "agent.sync")
    assert sync.wait() == 0, sync.output
    assert {name: run.group for name, run in server.runs.items()} == {"abc": "abc", "abc-00": "abc", "abc-01": "abc"}
