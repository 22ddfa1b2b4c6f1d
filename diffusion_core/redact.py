"""Redact secrets from everything that is recorded: what looks like a key, and the values of variables that hold one.

The forms of keys are those of the package detect-secrets, and those that it lacks. Its search for text that looks
random stays off: run ids, SHA-256 and names of checkpoints are no secrets.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, TextIO
from urllib.parse import quote, urlsplit

BLANK = "[redacted]"

SECRET_WORD = re.compile(
    r"TOKENS?|SECRETS?|(?:PG)?PASSWORDS?|PASSWD|PASSPHRASE|PASSCODE|CREDENTIALS?|CREDS|JWT|DSN|SIGNATURE|COOKIE"
    r"|(?:API|ACCESS|AUTH|PRIVATE|SECRET|STORAGE|ACCOUNT)(?:KEY|TOKEN)S?"
)
"""Words that make a name secret, wherever they are in it."""
LAST_WORD = re.compile(r"KEYS?|PASS|PWD|AUTH|PAT|SAS")
"""Words that make a name secret if they follow others."""
MIDDLE_WORD = re.compile(r"KEYS?")
"""Words that make a name secret if they are between others, as in AWS_SECRET_KEY_ID."""
SECRET_ADDRESS = re.compile(
    r"(?:^|_)(?:DATABASE|DB|SQL\w*|POSTGRES\w*|PG|MYSQL|MARIADB|MONGO\w*|REDIS|AMQP|RABBITMQ|BROKER|CACHE|SENTRY|WEBHOOK)"
    r"_UR[IL]$|CONN(?:ECTION)?_?STR(?:ING)?$"
)
"""Names of addresses that contain a password."""
PUBLIC_NAMES = frozenset({"PWD", "OLDPWD"})

SHORTEST_SECRET = 8
"""Shorter values are switches (`HF_TOKEN=none`); redacting them would blank out ordinary words."""

KEY_FORMS = (
    r"[0-9a-f]{40}",  # W&B until 2025. Full git commit hashes match too.
    r"wandb_v1_[0-9A-Za-z_-]{16,}",  # W&B.
    r"hf_[0-9A-Za-z]{20,}",  # Hugging Face.
    r"gh[opsur]_[0-9A-Za-z]{20,}|github_pat_\w{20,}",
    r"sk-[0-9A-Za-z_-]{20,}",  # OpenAI, Anthropic and others.
    r"AIza[0-9A-Za-z_-]{30,}|GOCSPX-[0-9A-Za-z_-]{20,}|ya29\.[0-9A-Za-z_-]{20,}",  # Google.
    r"xox[a-z]-[0-9A-Za-z-]{10,}|xapp-[0-9A-Za-z-]{10,}",  # Slack.
    r"npm_[0-9A-Za-z]{36}",
)
OTHER_FORMS = (
    *(re.compile(rf"(?<![0-9A-Za-z])(?:{form})(?![0-9A-Za-z])") for form in KEY_FORMS),
    # USER:PASSWORD@ or TOKEN@. A path has one slash of an address less.
    *(re.compile(rf"(?<={begin})(?!git@)(?:[^\s/@'\"]+|[^\s/@:'\"]+:[^\s@'\"]+)@") for begin in ("://", "[a-z]:/")),
    re.compile(r"-*BEGIN [A-Z0-9 ]*PRIVATE KEY.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY[A-Z -]*|\Z)", re.DOTALL),
    re.compile(r"(?<=[?&]sig=)[^\s&'\"]{8,}", re.IGNORECASE),  # Azure.
    re.compile(r"(?<=\bBearer )[0-9A-Za-z._~+/=-]{16,}", re.IGNORECASE),
)
"""Forms that detect-secrets lacks, or finds only in part."""

ASSIGNMENT = re.compile(
    r"""(?P<name>[A-Za-z][\w.-]*)\\*["']?\s{0,2}[=:]\s{0,2}(?P<mark>\\*["']?)"""
    r"""(?:(?<=["'])(?P<quoted>[^\r\n]{8,}?)(?P=mark)|(?P<bare>[^\s"'&,;]{8,}))"""
)
"""``NAME=VALUE``, ``name: 'value'`` and the like, also in quoted text."""

NOT_USED = frozenset({"Public IP (ipv4)"})
"""Forms of detect-secrets that are no keys."""
EDGES = " \t\r\n=:\"'"
"""What some of its forms match around a key."""

_withdrawn: list[str] = []
"""Values of variables that :func:`clean_environment` has removed."""


def is_secret_name(name: str) -> bool:
    """Return whether a variable of this name holds a secret. Of a dotted name the last part decides."""
    name = name.rpartition(".")[2].upper()
    if name in PUBLIC_NAMES:
        return False
    words = [word for word in re.split(r"[^0-9A-Z]+", name) if word]
    return bool(
        any(map(SECRET_WORD.fullmatch, words))
        or any(map(LAST_WORD.fullmatch, words[1:][-1:]))
        or any(map(MIDDLE_WORD.fullmatch, words[1:-1]))
        or SECRET_ADDRESS.search(name)
    )


def secrets_here() -> list[str]:
    """Return the values of this process's secret variables, also as they are written in addresses, JSON and Python.

    The longest come first. A path to an existing file is no secret.
    """
    return list(_secrets_in(tuple(os.environ.items()), tuple(_withdrawn)))


@lru_cache(maxsize=4)
def _secrets_in(environment: tuple[tuple[str, str], ...], withdrawn: tuple[str, ...]) -> tuple[str, ...]:
    values = {value for name, value in environment if is_secret_name(name) and not _is_path(value)} | {*withdrawn}
    values |= {password for _, value in environment if "://" in value and (password := _password(value))}
    values |= {line.strip() for value in values for line in value.splitlines()}
    ways = (
        str,
        lambda value: quote(value, safe=""),
        lambda value: json.dumps(value)[1:-1],
        lambda value: repr(value)[1:-1],
    )
    written = {way(value) for value in values for way in ways}
    return tuple(sorted((value for value in written if len(value) >= SHORTEST_SECRET), key=len, reverse=True))


def _is_path(value: str) -> bool:
    return value.startswith(("/", "~", ".")) and os.path.exists(os.path.expanduser(value))


def _password(address: str) -> str | None:
    try:
        return urlsplit(address).password
    except ValueError:
        return None


@cache
def forms() -> tuple[re.Pattern[str], ...]:
    """Return the forms of keys."""
    before = warnings.showwarning
    # Slow to import, and needed only if something is recorded or refused.
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.plugins.base import RegexBasedDetector

    if warnings.showwarning is not before:
        logging.captureWarnings(False)  # The package sends all warnings to a log.
    kinds: dict[str, Any] = get_mapping_from_secret_type_to_class()
    known = [kind for name, kind in kinds.items() if issubclass(kind, RegexBasedDetector) and name not in NOT_USED]
    return (*OTHER_FORMS, *(form for kind in known for form in kind.denylist))


def redact(text: str) -> str:
    """Return the text with secrets of the environment, and everything that looks like a key, blanked out."""
    return _redact(text, secrets_here())


def redacted(value: Any) -> Any:
    """Return a value, or a nested container of values, with secrets blanked out in every text; tuples become lists."""
    return _redacted(value, secrets_here())


def _redact(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, BLANK)
    return _without_keys(text) if len(text) >= SHORTEST_SECRET else text


@lru_cache(maxsize=4096)
def _without_keys(text: str) -> str:
    for form in forms():
        text = form.sub(_blank, text)
    place = 0
    while match := ASSIGNMENT.search(text, place):
        kind = "quoted" if match["quoted"] else "bare"
        place = match.start(kind)
        if is_secret_name(match["name"]):
            text = f"{text[:place]}{BLANK}{text[match.end(kind) :]}"
            place += len(BLANK)
    return text


def _blank(match: re.Match[str]) -> str:
    found = match.group()
    core = found.strip(EDGES)
    return found.replace(core, f"{BLANK}@" if core.endswith("@") else BLANK) if core else found


def _redacted(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, str):
        return _redact(value, secrets)
    if isinstance(value, dict):
        return {_redacted(key, secrets): _redacted_entry(key, entry, secrets) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(entry, secrets) for entry in value]
    return value


def _redacted_entry(key: Any, entry: Any, secrets: Sequence[str]) -> Any:
    named = isinstance(entry, str) and len(entry) >= SHORTEST_SECRET and isinstance(key, str) and is_secret_name(key)
    return BLANK if named else _redacted(entry, secrets)


RECORDED = ("WANDB_NAME", "WANDB_NOTES", "WANDB_TAGS", "WANDB_RUN_GROUP", "WANDB_JOB_TYPE", "WANDB_GIT_REMOTE_URL")
"""Variables that W&B's client records."""


def clean_environment() -> None:
    """Remove secrets from what W&B's client reads and records by itself: some variables, and the git remote.

    It records all variables ``SLURM_*``, one of which may be a token (``SLURM_JWT``). Of a git remote it drops the
    password, but not a token in the place of the user's name.
    """
    for name in [name for name in os.environ if name.startswith("SLURM_") and is_secret_name(name)]:
        _withdrawn.append(os.environ.pop(name))
        os.environ.pop("WANDB_SERVICE", None)  # The process of another program, which has that variable still.
    for name in RECORDED:
        if name in os.environ and (clean := redact(os.environ[name])) != os.environ[name]:
            os.environ[name] = clean
    name = os.environ.get("WANDB_GIT_REMOTE", "origin")
    remote = None if "WANDB_GIT_REMOTE_URL" in os.environ else _git("config", "--get", f"remote.{name}.url")
    if remote and (clean := redact(remote)) != remote:
        os.environ["WANDB_GIT_REMOTE_URL"] = clean
        if commit := _git("rev-parse", "--verify", "HEAD"):  # W&B looks for it only beside a remote that it found.
            os.environ.setdefault("WANDB_GIT_COMMIT", commit)


def _git(*words: str) -> str | None:
    """Return what git prints in the folder whose repository W&B records, or None."""
    command = ["git", "-C", os.environ.get("WANDB_GIT_ROOT", "."), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


@contextmanager
def redacted_arguments() -> Iterator[None]:
    """Redact ``sys.argv``, which W&B records, inside this context."""
    arguments = sys.argv
    sys.argv = redacted(arguments)
    try:
        yield
    finally:
        sys.argv = arguments


class Tee:
    """A stream that also passes each finished line, redacted, to a sink. Of a progress bar it passes the last state."""

    def __init__(self, stream: TextIO, sink: Callable[[str], None]) -> None:
        self._stream = stream
        self._sink = sink
        self._line = ""

    def write(self, text: str) -> int:
        """Write to the stream, and pass each finished line to the sink with its keys redacted."""
        written = self._stream.write(text)
        *lines, rest = (self._line + text).split("\n")
        for line in lines:
            self._sink(redact(line.rstrip("\r").rpartition("\r")[2]))
        self._line = rest[rest.rfind("\r", 0, -1) + 1 :]
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def recorded_console(sink: Callable[[str], None]) -> Iterator[None]:
    """Pass every printed line to ``sink``, without keys, inside this context."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Tee(out, sink), Tee(err, sink)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
