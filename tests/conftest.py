"""What holds for every test."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

import pytest

# Tiny networks gain nothing from threads, and threads that wait for each other on a busy machine take a hundred times
# as long. Set before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What takes seconds to compute is computed once for all tests (those in other processes inherit the folder), and anew
# every time that they are run.
if "DIFFUSION_SWEEPS_CACHE" not in os.environ:
    os.environ["DIFFUSION_SWEEPS_CACHE"] = tempfile.mkdtemp(prefix="diffusion-sweeps-")
    atexit.register(shutil.rmtree, os.environ["DIFFUSION_SWEEPS_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that hold slow tests go first, so that no process is left with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
