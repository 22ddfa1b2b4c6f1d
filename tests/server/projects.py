"""Projects, the user and the server itself: the roots from which queries descend."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .graphql import Handler, Json, connection
from .runs import USER
from .store import ENTITY, ORGANIZATION, PERSONAL_ENTITY, Project, encode_id, iso

if TYPE_CHECKING:
    from .backend import Backend

FEATURES = [{"name": "SWEEPS_LOCAL_SCHEDULER", "isEnabled": True}]
CLI_VERSIONS = {"min_cli_version": "0.0.1", "max_cli_version": "9999.0.0"}


class ProjectOperations:
    """Queries that start at a project, an entity or the viewer."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def handlers(self) -> dict[str, Handler]:
        return {
            "viewer": lambda args: self.viewer(),
            "serverInfo": lambda args: {"features": FEATURES, "cliVersionInfo": CLI_VERSIONS},
            "entity": self.entity,
            "organization": self.organization,
            "project": self.project,
            "model": self.project,
            "models": self.projects,
            "upsertModel": self.upsert,
            "users": lambda args: connection([self.viewer()], {}, lambda user: user),
        }

    def viewer(self) -> Json:
        return {
            **USER,
            "id": encode_id("User", "1"),
            "admin": False,
            "flags": "{}",
            "teams": connection([{"name": ENTITY}], {}, lambda team: team),
            "apiKeys": connection([], {}, lambda key: key),
        }

    def organization(self, args: Json) -> Json:
        entity = {"__typename": "Entity", "id": encode_id("Entity", ORGANIZATION), "name": ORGANIZATION}
        return {
            "id": encode_id("Organization", ORGANIZATION),
            "name": ORGANIZATION,
            "orgEntity": {**entity, "entityType": "organization"},
        }

    def entity(self, args: Json) -> Json:
        return {
            "id": encode_id("Entity", args["name"]),
            "name": args["name"],
            "organization": None if args["name"] == PERSONAL_ENTITY else self.organization({}),
            "project": lambda inner: self.project({**inner, "entityName": args["name"]}),
        }

    def projects(self, args: Json) -> Json:
        found = [p for p in self.backend.store.projects.values() if p.entity == args.get("entityName", ENTITY)]
        return connection(found, args, self.node)

    def project(self, args: Json) -> Json | None:
        project = self.backend.store.find_project(args.get("entityName"), args.get("name"))
        return self.node(project) if project else None

    def upsert(self, args: Json) -> Json:
        given = args["input"]
        count = len(self.backend.store.projects)
        project = self.backend.store.project(given.get("entityName"), given.get("name"))
        node = self.node(project)
        return {"project": node, "model": node, "inserted": len(self.backend.store.projects) > count}

    def info(self, project: Project) -> Json:
        """What other objects say about their project."""
        return {
            "__typename": "Project",
            "id": project.gql_id,
            "internalId": str(project.number),
            "name": project.name,
            "entityName": project.entity,
            "entity": self.entity({"name": project.entity}),
        }

    def node(self, project: Project) -> Json:
        runs, sweeps = self.backend.runs, self.backend.sweeps

        def run(args: Json) -> Json | None:
            found = self.backend.store.runs.get(args["name"])
            return runs.node(found) if found and found.project is project else None

        return {
            **self.info(project),
            "createdAt": iso(project.created_at),
            "updatedAt": iso(project.created_at),
            "isBenchmark": False,
            "readOnly": False,
            "access": "PRIVATE",
            "allowAllArtifactTypesInRegistry": True,
            "user": self.viewer(),
            "run": run,
            "bucket": run,
            "runCount": lambda args: len(runs.select(project, args)),
            "runs": lambda args: connection(runs.select(project, args), args, runs.node),
            **sweeps.project_fields(project),
            **self.backend.artifacts.project_fields(project),
        }
