"""What holds for every test."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from forks import Forks, shared_forks

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"

# Tiny networks gain nothing from threads, and threads that wait for each other on a busy machine take a hundred times
# as long. Set before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell's background jobs ignore Ctrl-C, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What takes seconds to compute is computed once for all tests (those in other processes inherit the folder), and anew
# every time that they are run.
if "DIFFUSION_SWEEPS_CACHE" not in os.environ:
    os.environ["DIFFUSION_SWEEPS_CACHE"] = tempfile.mkdtemp(prefix="diffusion-sweeps-")
    atexit.register(shutil.rmtree, os.environ["DIFFUSION_SWEEPS_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that hold slow tests go first, so that no process is left with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """Leave out of collections what was there before a file: each trial collects, for half a second with all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def no_service_of_another_file() -> None:
    """Forget W&B's process that an earlier file started: it may have ended, and processes of this file would ask it."""
    os.environ.pop("WANDB_SERVICE", None)


@pytest.fixture(scope="session")
def forks() -> Forks:
    """The process that commands are forked from."""
    return shared_forks()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # Or what is left at the end is reported as leaked.


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-extras", action="store_true", help="fail, not skip, where an optional extra is missing")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose optional extra is not installed."""
    for marker in item.iter_markers("extra"):
        (name,) = marker.args
        missing = missing_packages(name)
        if missing:
            reason = f'needs {", ".join(missing)}: pip install -e ".[{name}]"'
            pytest.fail(reason, pytrace=False) if item.config.getoption("--require-extras") else pytest.skip(reason)


def missing_packages(extra: str) -> list[str]:
    """The packages of an optional extra that are not installed."""
    named = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"][extra]
    return [package for package in named if not is_installed(package)]


def is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
