"""No secret leaves the environment: neither into a run's files, nor to the server, nor into what is printed there."""

from __future__ import annotations

import ast
import base64
import io
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import benchmark
import convert_diffusers
import evaluate
import gpu_check
import prepare_images
import promote
import prune
import pytest
import sample_images
import train_classifier
from forks import WORDS, Fork, Forks
from PIL import Image
from server import WandbServer
from tiny import TINY, digits
from wandb_client import Client

from agent import clean, leaderboard, sync
from agent.__main__ import main
from agent.config import TrialConfig, build_config
from agent.ending import ending_of
from agent.sweep.__main__ import main as sweep
from agent.tracking.environment import load_environment
from agent.trial import run_trial
from diffusion_core.checkpoint import CheckpointError, read_checkpoint
from diffusion_core.config import ConfigError, flatten, help_text, read_yaml, to_yaml
from diffusion_core.config.metrics import goals
from diffusion_core.evaluation.protocol import protocol
from diffusion_core.messages import UserError, one_line, shortened
from diffusion_core.redact import (
    BLANK,
    Tee,
    clean_environment,
    forms,
    is_secret_name,
    recorded_console,
    redact,
    redacted,
    redacted_arguments,
)
from diffusion_core.tracking import MemoryTracker
from pruning.start import Source

ROOT = Path(__file__).resolve().parents[3]

WANDB_KEY = "c0ffee" * 6 + "c0de"
PASTED = "wandb_v1_" + "Canary42" * 6
"""A key that somebody put where it does not belong: into a value, on the command line."""
HALF = "Canary42Zz"


def encoded(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


KEYS = {
    "W&B until 2025": WANDB_KEY,
    "W&B": PASTED,
    "Hugging Face": "hf_" + "A1b2" * 8,
    "GitHub": "ghp_" + "A1b2" * 9,
    "GitHub, fine": "github_pat_" + "A1b2" * 12,
    "GitLab": "glpat" + "-" + "Canary0123456789_abX",
    "GitLab runner": "glrt" + "-" + "Canary0123456789_abX",
    "OpenAI": "sk-" + "a1B2" * 10,
    "OpenAI project": "sk-proj-" + "a1B2_" * 10,
    "AWS": "AKIA" + "ABCD1234" * 2,
    "AWS, temporary": "ASIA" + "ABCD1234" * 2,
    "Google": "AIza" + "Canary_0123456789-abcdefghijklmnopq",
    "Slack bot": "xoxb" + "-" + "Canary0123-4567890123-abcdefghijkl",
    "Slack user": "xoxp" + "-" + "123456789012-1234567890-abcdef0123",
    "npm": "npm_" + "A1b2" * 9,
    "PyPI": "pypi-AgEIcHlwaS5vcmc" + "A1b2" * 20,
    "SendGrid": "SG." + "A1b2" * 5 + "xy." + "A1b2" * 10 + "xyz",
    "Stripe": "sk_live" + "_" + "A1b2" * 6,
    "Telegram": "123456789:" + "A1b2" * 8 + "xyz",
    "Twilio": "SK" + "a1b2" * 8,
    "JSON Web Token": f"{encoded(json.dumps({'alg': 'HS256'}))}.{encoded(json.dumps({'sub': 'canary'}))}.",
}
"""What is a key by its form, wherever it is."""

PHRASES = {
    "basic": f"https://user:{HALF}@example.com/a",
    "basic, slash": f"https://user:{HALF}/+{HALF}@example.com/a",
    "basic, token as user": f"https://{HALF}@example.com/a",
    "basic, token as user with a fixed password": f"https://{HALF}:x-oauth-basic@example.com/o/r.git",
    "query": f"https://example.com/a?x=1&token={HALF}&y=2",
    "signed": f"https://example.com/a?sv=1&sig={HALF}%3D",
    "signed, Amazon": f"https://example.com/a?X-Amz-Signature={HALF}{HALF}&b=1",
    "Azure": f"AccountName=a;AccountKey={HALF}{'A1b2' * 19}==;EndpointSuffix=x",
    "bearer": f"Authorization: Bearer {HALF}{HALF}",
    "assigned": f"AWS_SECRET_ACCESS_KEY={HALF}",
    "assigned, quoted": f"OPENAI_KEY = '{HALF} and more'",
    "assigned, JSON": json.dumps({"db_password": HALF}),
    "flag": f"--hub-token={HALF}",
    "private key": f"-----BEGIN RSA PRIVATE KEY-----\n{HALF}{HALF}\n-----END RSA PRIVATE KEY-----\n",
}  # fmt: skip
"""Texts in which HALF is a secret because of what is around it."""

NAMES = [
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_SECRET",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
    "OPENAI_KEY",
    "ANTHROPIC_API_KEY",
    "DATABASE_URL",
    "REDIS_URL",
    "SQLALCHEMY_DATABASE_URI",
    "MONGODB_URI",
    "SLACK_WEBHOOK_URL",
    "SENTRY_DSN",
    "HF_TOKEN",
    "GITHUB_PAT",
    "NPM_AUTH",
    "PGPASSWORD",
    "MYSQL_PWD",
    "DB_PASS",
    "DB_PASSWORD",
    "SSH_PASSPHRASE",
    "SECRET_KEY_BASE",
    "DJANGO_SECRET_KEY_2",
    "CI_JOB_JWT",
    "SLURM_JWT",
    "WANDB_APIKEY",
    "MY_API_KEY",
    "my_api_key",
    "PRIVATE_KEY",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "STORAGEKEY",
]
OTHER_NAMES = [
    "PWD",
    "OLDPWD",
    "HOME",
    "PATH",
    "TOKENIZERS_PARALLELISM",
    "SSH_AUTH_SOCK",
    "WANDB_PROJECT",
    "WANDB_BASE_URL",
    "KEYBOARD_LAYOUT",
    "MONKEY",
    "AUTHOR",
    "PASSENGERS",
    "COMPASS",
    "PYTHONHASHSEED",
    "XAUTHORITY",
    "SLURM_JOB_ID",
    "NVIDIA_DRIVER_CAPABILITIES",
    "self.key",
    "sort.keys",
]


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_what_looks_like_a_key_is_blanked_out(key: str) -> None:
    assert redact(key).strip(".") == BLANK
    for text in (f"'{key}'", f"runs/{key}/x", f"--data.path={key}", f"a {key} b\n", f"?x={key}&y"):
        assert key not in redact(text)
        assert redact(text).replace(BLANK, "").strip(".") == text.replace(key, "").strip(".")
    assert redacted({"a": [key, {"b": f"x {key}"}], key: 3}).keys() == {"a", redact(key)}
    assert key not in str(redacted({"a": [key, {"b": (f"x {key}",)}], key: 3}))


def test_every_place_in_an_address() -> None:
    for key in (WANDB_KEY, PASTED, KEYS["GitHub"], KEYS["OpenAI"], KEYS["AWS"]):
        assert redact(f"s3://{key}@host/{key}?x={key}") == f"s3://{BLANK}@host/{BLANK}?x={BLANK}"


@pytest.mark.parametrize("text", PHRASES.values(), ids=PHRASES)
def test_what_is_a_secret_by_what_is_around_it(text: str) -> None:
    shown = redact(text)
    assert HALF not in shown
    assert BLANK in shown
    assert redact(shown) == shown
    if "example.com" in text:
        assert "example.com" in shown


def sha(digit: str) -> str:
    return digit * 64


@pytest.mark.parametrize(
    "text",
    ["runs/abc", "0" * 39, "0" * 41, sha("f"), "step-00001000", "hf_home", "val/loss = 0.1", "class_names", "", "sk-1",
     "quickstart-001-3f2a", "model-3fa9c1d2:best", "training-state-0a1b2c3d:v12", "no API key; set WANDB_API_KEY (see",
     "WANDB_API_KEY = None: set it", "git@github.com:owner/repository.git", "ssh://git@github.com/owner/repository.git",
     f"n=500, sampler=ddim, weights={sha('0')[:16]}", f"sha256:{sha('a')}", "http://127.0.0.1:8080/entity/project/runs/a",
     "12345678: a line", "down.0.attention.key: 0101010111110000", "key = 'train.learning_rate': unknown key",
     "hub name such as google/ddpm-cifar10-32", "2026-11-26T16:55:10.679473 finished at step 4"],
)  # fmt: skip
def test_what_is_none_stays(text: str) -> None:
    assert redact(text) == text
    assert redacted({"down.0.attention.key": text}) == {"down.0.attention.key": text}


def test_neither_documents_nor_knobs_nor_figures_look_like_secrets() -> None:
    config = build_config({"preset": "cifar10"})
    assert redacted(flatten(config)) == flatten(config)
    assert to_yaml(config, without_secrets=True) == to_yaml(config)
    assert not [name for name in [*flatten(config), *goals()] if is_secret_name(name)]
    texts = [
        help_text(TrialConfig),
        *(path.read_text("utf-8") for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]),
    ]
    for line in (line for text in texts for line in text.splitlines()):
        assert redact(line) == line
    fixtures = [
        file for file in (ROOT / "tests" / "fixtures").rglob("*") if file.suffix in (".json", ".yaml", ".jsonl")
    ]
    assert fixtures
    for file in fixtures:
        assert redact(file.read_text("utf-8")) == file.read_text("utf-8")


def test_the_forms_are_those_of_a_package_that_looks_after_them() -> None:
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

    kinds: dict[str, Any] = get_mapping_from_secret_type_to_class()
    for name in ("AWS Access Key", "GitLab Token", "Slack Token", "Private Key", "Basic Auth Credentials"):
        assert set(kinds[name].denylist) <= set(forms())
    assert len(forms()) > 40
    assert not {form for name, kind in kinds.items() if "Entropy" in name for form in getattr(kind, "denylist", [])}


def test_the_package_takes_no_warnings_away() -> None:
    code = "import warnings; before = warnings.showwarning; from diffusion_core.redact import forms; forms(); "
    code += "assert warnings.showwarning is before"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
    with pytest.warns(UserWarning, match="seen"):
        warnings.warn("seen", stacklevel=1)


@pytest.mark.parametrize("name", NAMES)
def test_the_values_of_secret_variables_are_blanked_out_whatever_they_look_like(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_secret_name(name)
    for value in (
        "an odd value",
        "slashes/and+equal==",
        "quo'te \\ back",
        "dou\"ble 'quoted",
        "one line long\nanother line",
    ):
        monkeypatch.setenv(name, value)
        assert redact(f"so {value} it is") == f"so {BLANK} it is"
        for written in (repr(value)[1:-1], json.dumps(value)[1:-1], value.replace("/", "%2F").replace("=", "%3D")):
            assert redact(f"<{written.replace('+', '%2B') if '%' in written else written}>") == f"<{BLANK}>"
    monkeypatch.setenv(name, "none")  # Too short to be one.
    assert redact("none of it") == "none of it"


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_other_variables_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_secret_name(name)
    monkeypatch.setenv(name, "an odd value")
    assert redact("so an odd value it is") == "so an odd value it is"


def test_a_path_is_no_secret_but_a_password_in_an_address_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    assert redact(f"in {tmp_path}/runs") == f"in {tmp_path}/runs"
    monkeypatch.setenv("PIP_INDEX_URL", f"https://user:{HALF}@example.com/simple")
    assert redact(f"it is {HALF}, {HALF}x") == f"it is {BLANK}, {BLANK}x"


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


# Refusals.

SOURCES = [
    path for folder in ("diffusion_core", "pruning", "agent", "scripts") for path in (ROOT / folder).rglob("*.py")
]


def test_every_error_for_the_user_is_one_that_shows_no_secrets() -> None:
    known = {"UserError", "ConfigError", "ImageFileError", "Exception", "RuntimeError"}
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
                found.add(node.name)
                assert node.name == "UserError" or {ast.unparse(base) for base in node.bases} <= known - {"Exception"}
    assert found >= {"ConfigError", "DataError", "CheckpointError", "ExtractorError", "InputError", "SweepError"}


def test_every_run_is_started_without_the_words_of_the_command_line() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.With | ast.FunctionDef) and "wandb.init(" in (source := ast.unparse(node)):
                assert "redacted_arguments()" in source, path


def test_every_command_line_is_read_by_a_parser_that_shows_no_secrets() -> None:
    for path in SOURCES:
        calls = [
            ast.unparse(node.func)
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.Call)
        ]
        assert "argparse.ArgumentParser" not in calls, path


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "agent": main,
    "agent.sweep": sweep,
    "agent.sync": sync.main,
    "agent.clean": clean.main,
    "agent.leaderboard": leaderboard.main,
    "sample_images": sample_images.main,
    "evaluate": evaluate.main,
    "prune": prune.main,
    "prepare_images": prepare_images.main,
    "convert_diffusers": convert_diffusers.main,
    "promote": promote.main,
    "train_classifier": train_classifier.main,
    "benchmark": benchmark.main,
    "gpu_check": gpu_check.main,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_prints_a_secret_that_it_refuses(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_KEY", HALF)
    for secret in (HALF, PASTED, KEYS["GitLab"], f"https://user:{HALF}@example.com"):
        calls = [
            [f"--no-such-flag={secret}"],
            [secret],
            ["--seed", secret],
            ["--num-images", secret],
            ["--device", secret],
        ]
        calls += [["--checkpoint", secret], ["--name", secret, "--offline", f"{secret}.yaml"], [f"--train.lr={secret}"]]
        for words in calls:
            try:
                status: object = COMMANDS[command](words)
            except SystemExit as left:
                status = left.code
            printed = capsys.readouterr()
            assert status != 0 or command == "agent.clean", words
            assert secret not in printed.out + printed.err, words
            assert HALF not in printed.out + printed.err, words


@pytest.mark.parametrize("key", [*KEYS.values(), *PHRASES.values()], ids=[*KEYS, *PHRASES])
def test_every_form_in_an_error(key: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    secret = HALF if HALF in key else key.strip(".")
    for words in ([f"--train.lr={key}"], [f"--train.lrr={key}"], [key], ["--config", key]):
        assert main(words) == 2
        assert secret not in capsys.readouterr().err
    for error in (
        ConfigError(f"x = {key!r}"),
        CheckpointError(key),
        OSError(5, key, key),
        ValueError(f"{'a ' * 148}{key}"),
    ):
        assert secret not in one_line(error)
        assert secret not in shortened(str(error))
        assert secret not in ending_of(error, tmp_path).message
        if isinstance(error, UserError):
            assert secret not in str(error)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_in_an_error(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(name, HALF)
    assert main([f"--train.lr={HALF}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: train.lr = '{BLANK}': expected")


# What cannot be blanked out, because it is an address, is refused.


@pytest.mark.parametrize("key", [*KEYS.values(), *PHRASES.values()], ids=[*KEYS, *PHRASES])
def test_a_run_folder_and_a_sweep_with_a_secret_are_refused(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    secret = HALF if HALF in key else key.strip(".")
    shared = {"method": "grid", "command": ["${env}", "${interpreter}", "-m", "agent", "${args}"]}
    content = shared | {"parameters": {"data.path": {"values": ["a", key]}, "data.name": {"value": "folder"}}}
    (tmp_path / "sweep.yaml").write_text(json.dumps(content))
    plain = shared | {"parameters": {"preset": {"value": "digits"}, "seed": {"values": [1, 2]}}}
    (tmp_path / "plain.yaml").write_text(json.dumps(plain))
    before = sorted(tmp_path.rglob("*"))
    assert main(["--preset=digits", f"--log.dir=a {key}"]) == 2
    assert (told := capsys.readouterr().err).startswith("error: log.dir = ")
    assert secret not in told
    for words in (["sweep.yaml"], ["plain.yaml", "--name", f"a {key}"], ["plain.yaml", "--out", f"a {key}"]):
        assert sweep([*words, "--offline"]) == 2
        printed = capsys.readouterr()
        assert secret not in printed.out + printed.err
        assert "holds a key" in printed.err or printed.err.startswith("error: name = ")
    monkeypatch.setenv("WANDB_DIR", f"a {key}")
    assert main(["--preset=digits"]) == 2
    assert (told := capsys.readouterr().err).startswith("error: WANDB_DIR = ")
    assert secret not in told
    assert sorted(tmp_path.rglob("*")) == before


# What is recorded.


def test_a_parent_a_protocol_and_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = build_config(TINY, {"train.steps": 1, "checkpoint.best_metric": "val/loss", "eval.classifier": "none"})
    run_trial(config, MemoryTracker(), dataset=digits(), folder=tmp_path / PASTED, run_id="parent")
    parent = Source(read_checkpoint(tmp_path / PASTED), None, "init.").parent()
    assert parent["checkpoint"] == str(tmp_path / BLANK / "checkpoints" / "step-00000001")
    assert PASTED not in protocol(1, PASTED, None, PASTED)
    monkeypatch.setenv("MY_TOKEN", " ".join(["a secret of many words"] * 6))
    long = build_config(TINY, {"eval.inception_weights": f"in {' '.join(['a secret of many words'] * 6)}"})
    (tmp_path / "c.yaml").write_text(to_yaml(long, without_secrets=True))  # YAML breaks long lines.
    assert read_yaml(tmp_path / "c.yaml")["eval.inception_weights"] == f"in {BLANK}"


def git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com", *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def repository(folder: Path, remote: str) -> Path:
    """A repository with a commit, a remote, and a change that holds a key."""
    folder.mkdir(parents=True)
    git(folder, "init")
    (folder / "notes.txt").write_text("nothing\n")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "notes")
    git(folder, "remote", "add", "origin", remote)
    (folder / "notes.txt").write_text(f"{KEYS['GitLab']}\n")
    return folder


def test_the_environment_is_cleaned_of_what_wandb_would_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_GIT_REMOTE_URL", "WANDB_GIT_COMMIT", "WANDB_SERVICE"):
        monkeypatch.setenv(name, "x")  # Restored after the test.
        monkeypatch.delenv(name)
    folder = repository(tmp_path / "repository", f"https://{HALF}:x-oauth-basic@example.com/o/r.git")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SLURM_JWT", HALF)
    monkeypatch.setenv("SLURM_JOB_ID", "12345678")
    monkeypatch.setenv("WANDB_NOTES", f"with {PASTED}")
    monkeypatch.setenv("WANDB_NAME", "a name")
    load_environment()
    import os

    assert "SLURM_JWT" not in os.environ
    assert os.environ["SLURM_JOB_ID"] == "12345678"
    assert redact(HALF) == BLANK  # It is a secret still.
    assert os.environ["WANDB_NOTES"] == f"with {BLANK}"
    assert os.environ["WANDB_NAME"] == "a name"
    assert os.environ["WANDB_GIT_REMOTE_URL"] == f"https://{BLANK}@example.com/o/r.git"
    assert os.environ["WANDB_GIT_COMMIT"] == git(folder, "rev-parse", "HEAD")
    for name in ("WANDB_GIT_REMOTE_URL", "WANDB_GIT_COMMIT"):
        monkeypatch.delenv(name)
    git(folder, "remote", "set-url", "origin", "git@example.com:o/r.git")
    clean_environment()
    assert "WANDB_GIT_REMOTE_URL" not in os.environ  # W&B finds it.


REMOTE = f"https://{KEYS['GitHub, fine']}:x-oauth-basic@example.com/owner/repository.git"
VALUES = {name: f"{number:02d}-canary/of+{name}==" for number, name in enumerate(NAMES)}
VALUES |= {"DATABASE_URL": "postgres://user:canary-of-the-database@host/db"}
EVERY_FORM = " ".join([*KEYS.values(), *PHRASES.values()])
FEW = [PASTED, KEYS["GitLab"], KEYS["AWS"], PHRASES["basic"], PHRASES["assigned, quoted"]]
SECRETS = [*(key.strip(".") for key in KEYS.values()), HALF, *VALUES.values(), "canary-of-the-database"]


def images(folder: Path) -> None:
    """A folder of images whose name is a key, and that of a class as well."""
    for label in ("zero", KEYS["AWS, temporary"]):
        (folder / PASTED / label).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (8, 8), (40 * i, 10, 90)).save(folder / PASTED / label / f"{i}.png")


TRIAL = [*WORDS, "--train.steps=4", "--data.name=folder", "--data.image_size=8", f"--data.path={PASTED}/../{PASTED}",
         f"--eval.inception_weights={EVERY_FORM}"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Iterator[tuple[WandbServer, dict[str, Fork]]]:
    """Trials online and offline, with WANDB_DIR and without, and one that fails, with every secret everywhere."""
    with WandbServer() as server:
        server.api_key = WANDB_KEY
        trials = {}
        for name, mode, has_folder, more in (
            ("on", "online", True, []),
            ("on-unset", "online", False, []),
            ("off", "offline", True, []),
            ("off-unset", "offline", False, []),
            ("failed", "online", False, [f"--init.checkpoint={' '.join(FEW)}"]),
        ):
            home = tmp_path_factory.mktemp(name)
            folder = repository(home / "repository", REMOTE)
            images(folder)
            env = Client(server, home).env
            if not has_folder:
                env = {key: value for key, value in env.items() if not key.endswith("_DIR") or "CONFIG" in key}
            env |= VALUES | {"WANDB_API_KEY": WANDB_KEY, "WANDB_MODE": mode, "WANDB_RUN_ID": name}
            env |= {"WANDB_NAME": name, "WANDB_NOTES": EVERY_FORM, "WANDB_TAGS": f"a,{KEYS['Google']}"}
            trials[name] = forks.start([*TRIAL, *more], folder, env)
        for name, trial in trials.items():
            assert trial.wait() == (1 if name == "failed" else 0), trial.output
        yield server, trials
        assert server.errors == []


@pytest.mark.slow
def test_every_byte_is_free_of_secrets(trained: tuple[WandbServer, dict[str, Fork]]) -> None:
    """The run's folder with its offline file, W&B's own directories, what was printed, and all the server received."""
    server, trials = trained
    keys = [secret.encode() for secret in SECRETS]
    for name, trial in trials.items():
        home = trial.out.parents[1]
        files = [file for file in home.rglob("*") if file.is_file() and ".git" not in file.parts]
        files = [file for file in files if file.name != "notes.txt" and PASTED not in file.parts]
        assert any(file.suffix == ".wandb" for file in files)
        assert len(files) > (10 if name == "failed" else 20)
        for file in files:
            content = file.read_bytes()
            assert not [key for key in keys if key in content], file
            assert PASTED not in str(file)
    assert len(server.received) > 20
    for path, body in server.received:
        assert not [key for key in keys if key in body or key in path.encode()], path


@pytest.mark.slow
def test_the_runs_themselves_are_whole(trained: tuple[WandbServer, dict[str, Fork]]) -> None:
    server, trials = trained
    for name in ("on", "on-unset"):
        run = server.runs[name]
        assert run.state == "finished"
        assert run.config["data.path"] == f"{BLANK}/../{BLANK}"
        assert f"finished {name} at step 4".encode() in run.files["output.log"]  # The console is recorded nevertheless.
        assert b"pictures: run/samples" in run.files["output.log"]
        assert [row["step"] for row in run.history] == [1, 2, 3, 4]
        recorded = json.loads(run.files["wandb-metadata.json"])
        folder = trials[name].out.parent
        remote = f"https://{BLANK}@example.com/owner/repository.git"
        assert recorded["git"] == {"remote": remote, "commit": git(folder, "rev-parse", "HEAD")}
        checkpoint = read_checkpoint(folder / "run")
        assert checkpoint.network() is not None
        assert sorted(checkpoint.class_names) == [BLANK, "zero"]
    failed = server.runs["failed"]
    assert failed.state == "failed"
    assert b"no checkpoint here" in failed.files["output.log"]
