"""What holds for every test."""

from __future__ import annotations

import os

# Tiny networks gain nothing from threads, and threads that wait for each other on a busy machine take a hundred times
# as long. Set before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
