"""The operations of the API put together: one dispatch table over one store, under one lock."""

from __future__ import annotations

import threading
from collections.abc import Callable
from urllib.parse import quote

from .artifacts import ArtifactOperations
from .graphql import Handler, Json, execute
from .projects import ProjectOperations
from .runs import RunOperations
from .store import Store
from .sweeps import SweepOperations
from .views import ViewOperations


class Backend:
    """Everything behind HTTP."""

    def __init__(self, base_url: Callable[[], str]) -> None:
        self.base_url = base_url
        self.store = Store()
        self.lock = threading.RLock()
        self.runs = RunOperations(self)
        self.artifacts = ArtifactOperations(self)
        self.sweeps = SweepOperations(self)
        self.projects = ProjectOperations(self)
        self.views = ViewOperations(self)
        self.handlers: dict[str, Handler] = {
            **self.runs.handlers(),
            **self.artifacts.handlers(),
            **self.sweeps.handlers(),
            **self.projects.handlers(),
            **self.views.handlers(),
        }

    def graphql(self, query: str, variables: Json) -> Json:
        with self.lock:
            return execute(query, variables, self.handlers)

    def storage_url(self, *parts: str) -> str:
        """The address of an object in storage; W&B would sign it."""
        return self.base_url() + "/storage/" + "/".join(quote(part) for part in parts)

    def put(self, area: str, path: str, body: bytes) -> None:
        """Store an upload."""
        with self.lock:
            if area == "runs":
                run_id, _, name = path.partition("/")
                self.runs.put_file(run_id, name, body)
            else:
                self.artifacts.put(area, path, body)

    def get(self, area: str, path: str) -> bytes | None:
        """Read from storage."""
        with self.lock:
            if area == "runs":
                run_id, _, name = path.partition("/")
                run = self.store.runs.get(run_id)
                return run.files.get(name) if run else None
            return self.artifacts.get(area, path)
