"""An in-memory W&B server for tests: the real wandb client talks to it over HTTP on 127.0.0.1.

Nothing in the client is patched. What the tests read here is therefore what W&B itself would have received.
"""

from .faults import Fault
from .server import WandbServer
from .store import Agent, Artifact, Project, Run, Sweep

__all__ = ["Agent", "Artifact", "Fault", "Project", "Run", "Sweep", "WandbServer"]
