"""Reports: W&B keeps each as a view, whose content is JSON in a text."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from .graphql import Handler, Json, OperationError
from .store import encode_id, iso

if TYPE_CHECKING:
    from .backend import Backend


class ViewOperations:
    """Create, change and read reports."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.views: dict[str, Json] = {}
        """By their ids."""

    def handlers(self) -> dict[str, Handler]:
        return {"upsertView": self.upsert, "view": self.view}

    def upsert(self, args: Json) -> Json:
        given = args["input"]
        json.loads(given["spec"])  # W&B refuses what is no JSON.
        project = self.backend.store.find_project(given.get("entityName"), given.get("projectName"))
        if project is None:
            raise OperationError("project not found", status=404)
        known = given.get("id")
        if known is not None and known not in self.views:
            raise OperationError("view not found", status=404)
        view_id = known or encode_id("View", str(len(self.views) + 1)).rstrip("=")
        fields = {name: given.get(name, "") for name in ("type", "name", "displayName", "description", "spec")}
        now = iso(time.time())
        created = self.views.get(view_id, {}).get("createdAt", now)
        self.views[view_id] = fields | {"id": view_id, "createdAt": created, "updatedAt": now,
                                        "project": self.backend.projects.info(project)}  # fmt: skip
        return {"view": self.views[view_id], "inserted": known is None}

    def view(self, args: Json) -> Json | None:
        return self.views.get(args["id"])
