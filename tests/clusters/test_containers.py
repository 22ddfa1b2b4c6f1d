"""The container files without a daemon: what the image copies and leaves out, who it runs as, what its words do."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from server import WandbServer
from wandb_client import Client

from diffusion_core.training import summary

ROOT = Path(__file__).resolve().parents[2]
SECRET = re.compile(r"key|token|secret|password", re.IGNORECASE)


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile: the word, and the rest with continued lines joined."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in joined.splitlines() if line.strip()]


DOCKERFILE = instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))


def rest_of(word: str) -> list[str]:
    return [rest for name, rest in DOCKERFILE if name == word]


def enters(path: str) -> bool:
    """Whether .dockerignore lets a path in: the last pattern that fits it, or a folder above it, decides."""
    parts, entered = path.split("/"), True
    above = ["/".join(parts[: number + 1]) for number in range(len(parts))]
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
            if any(re.fullmatch(pattern, place) for place in above):
                entered = line.startswith("!")
    return entered


def test_the_base_is_pinned_and_the_user_is_not_root() -> None:
    arguments = dict(rest.partition("=")[::2] for rest in rest_of("ARG"))
    (base,) = rest_of("FROM")
    image, _, tag = base.replace("${PYTHON}", arguments["PYTHON"]).partition(":")
    assert image == "python"
    assert re.fullmatch(r"3\.11\.\d+-slim-bookworm", tag)
    order = [name for name, _ in DOCKERFILE]
    assert rest_of("USER")[-1].isdecimal()
    assert int(rest_of("USER")[-1]) > 0
    assert "RUN" not in order[order.index("USER") :]
    assert arguments["DEVICE"] == "cpu"


def test_no_secret_is_written_into_the_image() -> None:
    names = [word.partition("=")[0] for name in ("ARG", "ENV") for rest in rest_of(name) for word in shlex.split(rest)]
    assert names
    assert not [name for name in names if SECRET.search(name)]
    for path in (".env", ".git/config", "runs/a/history.jsonl", "wandb/run-1/logs", "sweeps/.env", "scripts/wandb/x",
                 "agent/__pycache__/x.pyc", "sweeps/runs/a", "data/x.png", "tests/tiny.py"):  # fmt: skip
        assert not enters(path), path


def test_what_the_image_copies_exists_and_is_all_that_the_commands_need() -> None:
    copied = [word for rest in rest_of("COPY") for word in rest.split()[:-1]]
    for name in copied:
        assert (ROOT / name).exists(), name
        assert enters(name), name
        assert not (ROOT / name).is_dir() or enters(f"{name}/x.py")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    files = {project["project"]["readme"], *project["project"]["license-files"]}
    assert packages | files | {"pyproject.toml", "constraints.txt", "scripts", "sweeps"} == set(copied)


def run_of(start: str) -> str:
    (found,) = (rest for rest in rest_of("RUN") if rest.startswith(start))
    return found


@pytest.mark.parametrize(("device", "index"), [("cpu", "https://download.pytorch.org/whl/cpu"), ("cuda", "")])
def test_the_requirements_are_those_of_the_project(device: str, index: str, tmp_path: Path) -> None:
    """The image's own words, with a pip that notes what it is asked."""
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\necho "index=$PIP_EXTRA_INDEX_URL" "$@"\n')
    pip.chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DEVICE": device}
    said = subprocess.run(
        ["sh", "-ec", run_of("case")], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert said.startswith(f"index={index} install ")
    assert "--constraint constraints.txt" in said
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert (tmp_path / "requirements.txt").read_text().splitlines() == project["project"]["dependencies"]


def test_an_unknown_device_is_refused_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "-ec", run_of("case")], cwd=tmp_path, env={"DEVICE": "rocm"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "DEVICE = rocm: expected cpu or cuda\n")


def test_an_image_tells_its_runs_their_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = [word.partition("=")[0] for rest in rest_of("ENV") for word in shlex.split(rest)]
    assert summary.COMMIT in words
    monkeypatch.setenv(summary.COMMIT, "0123456789ab")
    monkeypatch.setenv("PATH", str(tmp_path))  # No git.
    assert summary.commit() == "0123456789ab"
    monkeypatch.setenv(summary.COMMIT, "")
    assert summary.commit() is None


MANIFEST: dict[str, Any] = yaml.safe_load((ROOT / "containers/kubernetes.yaml").read_text(encoding="utf-8"))


def test_a_pod_is_not_root_and_takes_its_key_from_a_secret() -> None:
    assert (MANIFEST["apiVersion"], MANIFEST["kind"]) == ("batch/v1", "Job")
    pod = MANIFEST["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == int(rest_of("USER")[-1])
    (container,) = pod["containers"]
    key, server = container["env"]
    assert key["name"] == "WANDB_API_KEY"
    assert server == {"name": "WANDB_BASE_URL", "value": "https://api.wandb.ai"}, "the client's own default"
    assert key["valueFrom"].keys() == {"secretKeyRef"}
    volumes = {volume["name"] for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == volumes
    assert mounts["work"] == rest_of("WORKDIR")[-1]


@pytest.mark.parametrize(("told", "code"), [(False, 0), (True, 143)])
def test_a_pod_that_is_told_to_end_has_not_completed(told: bool, code: int, tmp_path: Path) -> None:
    """W&B's agent, here a stand-in, ends with status 0 either way."""
    (container,) = MANIFEST["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["tini", "--", "bash", "-c"]
    agent = tmp_path / "python"
    agent.write_text("#!/bin/sh\necho $@ > words\ntrap 'echo told > told; exit 0' TERM\ntouch ready\nsleep 2 & wait\n")
    agent.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    process = subprocess.Popen(["bash", "-c", *container["args"]], cwd=tmp_path, env=environment)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    if told:
        process.send_signal(signal.SIGTERM)
    assert process.wait(30) == code
    assert (tmp_path / "told").exists() == told
    assert (tmp_path / "words").read_text() == "-m wandb agent --forward-signals ENTITY/PROJECT/SWEEP_ID\n"


@pytest.mark.slow
def test_the_command_of_the_documents_makes_a_job_of_the_image(tmp_path: Path) -> None:
    """As far as this server goes: it has no queues."""
    document = (ROOT / "docs/sweeps.md").read_text(encoding="utf-8")
    line = re.search(r"^wandb (job create .*? YOUR_IMAGE)", document, re.MULTILINE)
    assert line is not None
    with WandbServer() as server:
        client = Client(server, tmp_path)
        client.wandb(*line[1].replace("YOUR_IMAGE", "registry.example/diffusion-sweeps:cuda").split())
        job = json.loads(server.artifact("trial:latest").files["wandb-job.json"])
        assert server.errors == []
    assert job["source_type"] == "image"
    assert job["source"]["image"] == "registry.example/diffusion-sweeps:cuda"
