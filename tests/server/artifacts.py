"""Artifacts: versions, manifests, blobs, aliases, links and lineage."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .filters import matches, order_by
from .graphql import Handler, Json, OperationError, connection
from .store import Artifact, Collection, Membership, Project, blob_path, decode_id, encode_id, iso, storage_path

if TYPE_CHECKING:
    from .backend import Backend


class ArtifactOperations:
    """What clients do with artifacts."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.store = backend.store

    def handlers(self) -> dict[str, Handler]:
        return {
            "createArtifact": self.create,
            "createArtifactManifest": self.create_manifest,
            "updateArtifactManifest": self.update_manifest,
            "createArtifactFiles": self.create_files,
            "commitArtifact": self.commit,
            "updateArtifact": self.update,
            "deleteArtifact": self.delete,
            "addAliases": self.add_aliases,
            "deleteAliases": self.delete_aliases,
            "linkArtifact": self.link,
            "unlinkArtifact": self.unlink,
            "useArtifact": self.use,
            "artifact": lambda args: self.node(self.by_gql_id(args["id"])),
            "clientIDMapping": self.client_id_mapping,
            "artifactCollection": lambda args: self.collection_node(self.collection_by_gql_id(args["id"])),
            "updateArtifactSequence": self.update_collection,
            "updateArtifactPortfolio": self.update_collection,
            "deleteArtifactSequence": self.delete_collection,
            "deleteArtifactPortfolio": self.delete_collection,
            "createArtifactCollectionTagAssignments": self.tag_collection,
            "deleteArtifactCollectionTagAssignments": self.untag_collection,
        }

    # Lookup

    def by_gql_id(self, gql_id: str) -> Artifact:
        number = int(decode_id(gql_id))
        return next(artifact for artifact in self.store.artifacts if artifact.number == number)

    def by_client_id(self, client_id: str) -> Artifact:
        for artifact in self.store.artifacts:
            if artifact.client_id == client_id:
                return artifact
        raise OperationError(f"no artifact has the client id {client_id}", status=404)

    def client_id_mapping(self, args: Json) -> Json:
        return {"serverID": self.by_client_id(args["clientID"]).gql_id}

    def collection_by_gql_id(self, gql_id: str) -> Collection:
        number = int(decode_id(gql_id))
        return next(collection for collection in self.store.collections if collection.number == number)

    def collections(self, project: Project, type_name: str | None = None) -> list[Collection]:
        return [
            collection
            for collection in self.store.collections
            if collection.project is project
            and collection.state == "READY"
            and (type_name is None or collection.type == type_name)
        ]

    def collection(self, project: Project, name: str) -> Collection | None:
        return next((c for c in self.collections(project) if c.name == name), None)

    def _collection_for(self, project: Project, name: str, type_name: str, *, is_portfolio: bool) -> Collection:
        collection = self.collection(project, name)
        if collection is None:
            collection = Collection(name, type_name, project, is_portfolio, len(self.store.collections) + 1)
            self.store.collections.append(collection)
        if collection.type != type_name:
            raise OperationError(f"collection {name} holds artifacts of type {collection.type}, not {type_name}")
        return collection

    def membership(self, project: Project, name: str) -> Membership | None:
        """`collection:alias` within a project."""
        collection_name, _, alias = name.partition(":")
        collection = self.collection(project, collection_name)
        return collection.find(alias or "latest") if collection else None

    # Writing

    def create(self, args: Json) -> Json:
        """A new version, or the committed one with the same content, which then is `latest` again."""
        given = args["input"]
        project = self.store.project(given.get("entityName"), given.get("projectName"))
        (name,) = given.get("artifactCollectionNames") or [given["artifactCollectionName"]]
        collection = self._collection_for(project, name, given["artifactTypeName"], is_portfolio=False)
        latest = collection.find("latest")
        aliases = [alias["alias"] for alias in given.get("aliases", [])]
        artifact = next(
            (m.artifact for m in collection.memberships if self._is_same(m.artifact, given["digest"])),
            None,
        )
        if artifact is None:
            artifact = Artifact(len(self.store.artifacts) + 1, collection, given["digest"], self.store.blobs)
            artifact.created_by = given.get("runName")
            artifact.client_id = given.get("clientID")
            artifact.description = given.get("description")
            artifact.history_step = given.get("historyStep")
            artifact.metadata = json.loads(given.get("metadata") or "{}")
            artifact.tags = [tag["tagName"] for tag in given.get("tags", [])]
            artifact.pending_aliases = aliases
            self._set_ttl(artifact, given)
            self.store.artifacts.append(artifact)
        else:
            self._apply_aliases(artifact, aliases)
        run = self.store.runs.get(given.get("runName", ""))
        if run is not None and artifact not in run.output_artifacts:
            run.output_artifacts.append(artifact)
        sequence = {
            **self.collection_node(collection),
            "latestArtifact": self.node(latest.artifact) if latest else None,
        }
        return {"artifact": {**self.node(artifact), "artifactSequence": sequence}}

    @staticmethod
    def _is_same(artifact: Artifact, digest: str) -> bool:
        return artifact.state == "COMMITTED" and artifact.digest == digest

    @staticmethod
    def _set_ttl(artifact: Artifact, given: Json) -> None:
        if "ttlDurationSeconds" in given:  # -1 is "inherit", -2 "disabled"
            seconds = int(given["ttlDurationSeconds"])
            artifact.ttl = seconds if seconds > 0 else None

    @staticmethod
    def _apply_aliases(artifact: Artifact, aliases: list[str]) -> None:
        membership = artifact.collection.add(artifact)
        for alias in [*aliases, "latest"]:
            artifact.collection.set_alias(membership, alias)

    def create_manifest(self, args: Json) -> Json:
        artifact = self.by_gql_id(args["input"]["artifactID"])
        return {"artifactManifest": self._manifest_node(artifact)}

    def update_manifest(self, args: Json) -> Json:
        number = int(decode_id(args["input"]["artifactManifestID"]))
        artifact = next(a for a in self.store.artifacts if a.number == number)
        return {"artifactManifest": self._manifest_node(artifact)}

    def _manifest_node(self, artifact: Artifact) -> Json:
        url = self.backend.storage_url("manifests", str(artifact.number))
        file = {"id": encode_id("File", f"manifest:{artifact.number}"), "uploadUrl": url, "uploadHeaders": []}
        return {"id": encode_id("ArtifactManifest", str(artifact.number)), "file": {**file, "directUrl": url}}

    def create_files(self, args: Json) -> Json:
        """Where to upload each file, in the order asked; nowhere if the project has the content already."""
        nodes = []
        for spec in args["input"]["artifactFiles"]:
            artifact = self.by_gql_id(spec["artifactID"])
            digest = spec.get("md5") or spec.get("digest")
            birth = next(
                (a for a in self._in_project(artifact) if blob_path(a.gql_id, digest) in self.store.blobs), None
            )
            path = blob_path((birth or artifact).gql_id, digest)
            nodes.append(
                {
                    "name": spec["name"],
                    "storagePath": path,
                    "uploadUrl": None if birth else self.backend.storage_url("blobs", path),
                    "uploadHeaders": [],
                    "artifact": {"id": (birth or artifact).gql_id},
                }
            )
        return {"files": {"edges": [{"node": node} for node in nodes]}}

    def _in_project(self, artifact: Artifact) -> list[Artifact]:
        return [a for a in self.store.artifacts if a.collection.project is artifact.collection.project]

    def put(self, area: str, path: str, body: bytes) -> None:
        """An upload: a blob, whose digest must be right, or a manifest."""
        if area == "blobs":
            wanted = path.rpartition("/")[2]
            if len(wanted) == 32 and hashlib.md5(body).hexdigest() != wanted:
                raise ValueError(f"the blob {path} has another content")
            self.store.blobs[path] = body
        elif area == "manifests":
            next(a for a in self.store.artifacts if a.number == int(path)).manifest = body
        else:
            raise ValueError(f"unknown storage area {area!r}")

    def get(self, area: str, path: str) -> bytes | None:
        if area == "blobs":
            return self.store.blobs.get(path)
        if area == "manifests":
            return next((a.manifest for a in self.store.artifacts if a.number == int(path)), None)
        return None

    def get_v2(self, rest: str) -> bytes | None:
        """The older download address: region/entity/project/collection/birth artifact/digest/name."""
        parts = rest.split("/")
        return self.store.blobs.get(f"{decode_id(parts[4])}/{parts[5]}")

    def commit(self, args: Json) -> Json:
        artifact = self.by_gql_id(args["input"]["artifactID"])
        if artifact.manifest is None:
            raise OperationError("the artifact has no manifest")
        missing = [
            path for path, e in artifact.entries.items() if "ref" not in e and storage_path(e) not in self.store.blobs
        ]
        if missing:
            raise OperationError(f"not uploaded: {missing}")
        if artifact.state == "PENDING":
            artifact.state = "COMMITTED"
            self._apply_aliases(artifact, artifact.pending_aliases)
        return {"artifact": self.node(artifact)}

    def update(self, args: Json) -> Json:
        given = args["input"]
        artifact = self.by_gql_id(given["artifactID"])
        if "description" in given:
            artifact.description = given["description"]
        if "metadata" in given:
            artifact.metadata = json.loads(given["metadata"])
        self._set_ttl(artifact, given)
        for tag in given.get("tagsToAdd", []):
            if tag["tagName"] not in artifact.tags:
                artifact.tags.append(tag["tagName"])
        gone = {tag["tagName"] for tag in given.get("tagsToDelete", [])}
        artifact.tags = [tag for tag in artifact.tags if tag not in gone]
        artifact.updated_at = time.time()
        return {"artifact": self.node(artifact)}

    def delete(self, args: Json) -> Json:
        artifact = self.by_gql_id(args["input"]["artifactID"])
        if not args["input"].get("deleteAliases") and artifact.aliases:
            raise OperationError(f"the artifact has aliases: {artifact.aliases}", status=409)
        artifact.state = "DELETED"
        for collection in self.store.collections:
            collection.memberships = [m for m in collection.memberships if m.artifact is not artifact]
        return {"artifact": {"id": artifact.gql_id}}

    def _alias_targets(self, args: Json) -> list[tuple[Collection, Membership, str]]:
        artifact = self.by_gql_id(args["input"]["artifactID"])
        targets = []
        for alias in args["input"]["aliases"]:
            project = self.store.project(alias["entityName"], alias["projectName"])
            collection = self.collection(project, alias["artifactCollectionName"])
            if collection is None:
                raise OperationError(f"no collection {alias['artifactCollectionName']}", status=404)
            targets.append((collection, collection.add(artifact), alias["alias"]))
        return targets

    def add_aliases(self, args: Json) -> Json:
        for collection, membership, alias in self._alias_targets(args):
            collection.set_alias(membership, alias)
        return {"success": True}

    def delete_aliases(self, args: Json) -> Json:
        for _, membership, alias in self._alias_targets(args):
            if alias in membership.aliases:
                membership.aliases.remove(alias)
        return {"success": True}

    def link(self, args: Json) -> Json:
        given = args["input"]
        if "artifactID" in given:
            artifact = self.by_gql_id(given["artifactID"])
        else:
            artifact = self.by_client_id(given["clientID"])
        project = self.store.project(given.get("entityName"), given.get("projectName"))
        name = given["artifactPortfolioName"]
        collection = self._collection_for(project, name, artifact.type, is_portfolio=True)
        membership = collection.add(artifact)
        for alias in [*(alias["alias"] for alias in given.get("aliases", [])), "latest"]:
            collection.set_alias(membership, alias)
        return {"versionIndex": membership.index, "artifactMembership": self.membership_node(membership)}

    def unlink(self, args: Json) -> Json:
        artifact = self.by_gql_id(args["input"]["artifactID"])
        collection = self.collection_by_gql_id(args["input"]["artifactPortfolioID"])
        collection.memberships = [m for m in collection.memberships if m.artifact is not artifact]
        return {"success": True}

    def use(self, args: Json) -> Json:
        artifact = self.by_gql_id(args["input"]["artifactID"])
        run = self.store.runs[args["input"]["runName"]]
        if artifact not in run.used_artifacts:
            run.used_artifacts.append(artifact)
            artifact.used_by.append(run)
        return {"artifact": self.node(artifact)}

    def update_collection(self, args: Json) -> Json:
        given = args["input"]
        collection = self.collection_by_gql_id(given.get("artifactSequenceID") or given["artifactPortfolioID"])
        collection.name = given.get("name", collection.name)
        collection.description = given.get("description", collection.description)
        return {"artifactCollection": self.collection_node(collection)}

    def delete_collection(self, args: Json) -> Json:
        given = args["input"]
        collection = self.collection_by_gql_id(given.get("artifactSequenceID") or given["artifactPortfolioID"])
        collection.state = "DELETED"
        if not collection.is_portfolio:
            for membership in collection.memberships:
                membership.artifact.state = "DELETED"
        return {"artifactCollection": self.collection_node(collection)}

    def _tagged(self, args: Json) -> tuple[Collection, list[str]]:
        given = args["input"]
        project = self.store.project(given["entityName"], given["projectName"])
        collection = self.collection(project, given["artifactCollectionName"])
        if collection is None:
            raise OperationError("no such collection", status=404)
        return collection, [tag["tagName"] for tag in given["tags"]]

    def tag_collection(self, args: Json) -> Json:
        collection, tags = self._tagged(args)
        collection.tags += [tag for tag in tags if tag not in collection.tags]
        return {"tags": _tags(collection.tags)}

    def untag_collection(self, args: Json) -> Json:
        collection, tags = self._tagged(args)
        collection.tags = [tag for tag in collection.tags if tag not in tags]
        return {"success": True}

    # Reading

    def node(self, artifact: Artifact) -> Json:
        membership = artifact.membership
        projects = self.backend.projects
        return {
            "__typename": "Artifact",
            "id": artifact.gql_id,
            "artifactSequence": lambda args: self.collection_node(artifact.collection),
            "versionIndex": membership.index if membership else None,
            "artifactType": {"id": encode_id("ArtifactType", artifact.type), "name": artifact.type},
            "description": artifact.description,
            "metadata": json.dumps(artifact.metadata),
            "ttlDurationSeconds": artifact.ttl or -2,
            "ttlIsInherited": artifact.ttl is None,
            "tags": _tags(artifact.tags),
            "historyStep": artifact.history_step,
            "state": artifact.state,
            "size": artifact.size,
            "digest": artifact.digest,
            "digestAlgorithm": "MANIFEST_MD5",
            "fileCount": len(artifact.entries),
            "createdAt": iso(artifact.created_at),
            "updatedAt": iso(artifact.updated_at),
            "aliases": lambda args: self._alias_nodes(artifact),
            "currentManifest": lambda args: self._manifest_node(artifact) if artifact.manifest else None,
            "createdBy": lambda args: self._created_by(artifact),
            "usedBy": lambda args: connection(artifact.used_by, args, self.backend.runs.node),
            "artifactMemberships": lambda args: connection(self._memberships(artifact), args, self.membership_node),
            "project": lambda args: projects.info(artifact.collection.project),
            "files": lambda args: self.files(artifact, args),
            "filesByManifestEntries": lambda args: self._files_by_entries(artifact, args),
        }

    def _created_by(self, artifact: Artifact) -> Json | None:
        run = self.store.runs.get(artifact.created_by or "")
        return self.backend.runs.node(run) if run else None

    def _memberships(self, artifact: Artifact) -> list[Membership]:
        found = [m for c in self.store.collections if c.state == "READY" for m in c.memberships]
        return [membership for membership in found if membership.artifact is artifact]

    def _alias_nodes(self, artifact: Artifact) -> list[Json]:
        return [
            {**_alias(membership, alias), "artifactCollection": self.collection_node(membership.collection)}
            for membership in self._memberships(artifact)
            for alias in membership.aliases
        ]

    def membership_node(self, membership: Membership) -> Json:
        key = f"{membership.collection.number}:{membership.index}"
        return {
            "__typename": "ArtifactCollectionMembership",
            "id": encode_id("ArtifactCollectionMembership", key),
            "versionIndex": membership.index,
            "createdAt": iso(membership.created_at),
            "aliases": [_alias(membership, alias) for alias in membership.aliases],
            "artifactCollection": lambda args: self.collection_node(membership.collection),
            "artifact": lambda args: self.node(membership.artifact),
            "files": lambda args: self.files(membership.artifact, args),
        }

    def collection_node(self, collection: Collection) -> Json:
        return {
            "__typename": collection.typename,
            "id": collection.gql_id,
            "name": collection.name,
            "state": collection.state,
            "description": collection.description,
            "createdAt": iso(collection.created_at),
            "updatedAt": iso(collection.created_at),
            "project": lambda args: self.backend.projects.info(collection.project),
            "defaultArtifactType": {"name": collection.type},
            "tags": connection(_tags(collection.tags), {}, lambda tag: tag),
            "digestAlgorithm": "MANIFEST_MD5",
            "aliases": lambda args: connection(
                [_alias(m, alias) for m in collection.memberships for alias in m.aliases], args, lambda node: node
            ),
            "artifacts": lambda args: self._versions(collection, args),
            "artifactMembership": lambda args: self._membership_or_none(collection, args["aliasName"]),
            "latestArtifact": lambda args: self._latest(collection),
        }

    def _membership_or_none(self, collection: Collection, alias: str) -> Json | None:
        membership = collection.find(alias)
        return self.membership_node(membership) if membership else None

    def _latest(self, collection: Collection) -> Json | None:
        membership = collection.find("latest")
        return self.node(membership.artifact) if membership else None

    def _versions(self, collection: Collection, args: Json) -> Json:
        """The committed versions, newest first as on W&B."""
        query = json.loads(args.get("filters") or "{}")
        members = [m for m in reversed(collection.memberships) if matches(m, _column, query)]
        page = connection(order_by(members, _column, args.get("order")), args, lambda m: m)
        for edge in page["edges"]:
            edge["version"] = edge["node"].version
            edge["node"] = self.node(edge["node"].artifact)
        return page

    def connection(self, artifacts: list[Artifact], args: Json) -> Json:
        """The artifacts of a run."""
        return connection([a for a in artifacts if a.state == "COMMITTED"], args, self.node)

    def files(self, artifact: Artifact, args: Json) -> Json:
        entries = artifact.entries
        names = [name for name in entries if name in (args.get("names") or entries)]
        return connection(names, args, lambda name: self._file_node(name, entries[name]))

    def _file_node(self, name: str, entry: Mapping[str, Any]) -> Json:
        path = None if "ref" in entry else storage_path(dict(entry))
        url = self.backend.storage_url("blobs", path) if path else entry["ref"]
        return {
            "id": encode_id("File", f"artifact:{name}:{entry['digest']}"),
            "name": name,
            "displayName": name,
            "url": url,
            "directUrl": url,
            "sizeBytes": int(entry.get("size") or 0),
            "storagePath": path,
            "digest": entry["digest"],
            "md5": entry["digest"],
        }

    def _files_by_entries(self, artifact: Artifact, args: Json) -> Json:
        known = artifact.entries
        names = [entry["name"] for entry in args.get("entries") or [] if entry.get("name") in known]
        return connection(names, {}, lambda name: self._file_node(name, known[name]))

    def type_node(self, project: Project, name: str) -> Json | None:
        """An artifact type, which exists once it has a collection."""
        collections = self.collections(project, name)
        if not collections:
            return None
        return {
            "__typename": "ArtifactType",
            "id": encode_id("ArtifactType", f"{project.number}:{name}"),
            "name": name,
            "createdAt": iso(collections[0].created_at),
            "artifactCollection": lambda args: self._collection_or_none(project, args["name"]),
            "artifactCollections": lambda args: connection(collections, args, self.collection_node),
        }

    def _collection_or_none(self, project: Project, name: str) -> Json | None:
        collection = self.collection(project, name)
        return self.collection_node(collection) if collection else None

    def project_fields(self, project: Project) -> Json:
        """The fields of a project that are about artifacts."""

        def membership(args: Json) -> Json | None:
            found = self.membership(project, args["name"])
            return self.membership_node(found) if found else None

        def artifact(args: Json) -> Json | None:
            found = self.membership(project, args["name"])
            return self.node(found.artifact) if found else None

        def types(args: Json) -> Json:
            names = sorted({collection.type for collection in self.collections(project)})
            return connection(names, args, lambda name: self.type_node(project, name))

        return {
            "artifact": artifact,
            "artifactCollectionMembership": membership,
            "artifactCollection": lambda args: self._collection_or_none(project, args["name"]),
            "artifactCollections": lambda args: connection(self.collections(project), args, self.collection_node),
            "artifactType": lambda args: self.type_node(project, args["name"]),
            "artifactTypes": types,
        }


def _alias(membership: Membership, alias: str) -> Json:
    key = f"{membership.collection.number}:{membership.index}:{alias}"
    return {"__typename": "ArtifactAlias", "id": encode_id("ArtifactAlias", key), "alias": alias}


def _tags(names: list[str]) -> list[Json]:
    return [{"__typename": "Tag", "id": encode_id("Tag", name), "name": name} for name in names]


def _column(membership: Membership, key: str) -> Any:
    """What a filter or an order key for versions names."""
    artifact = membership.artifact
    head, _, rest = key.partition(".")
    if head == "metadata":
        return artifact.metadata.get(rest)
    return {
        "state": artifact.state,
        "alias": membership.aliases,
        "tag": artifact.tags,
        "versionIndex": membership.index,
        "version_index": membership.index,
        "createdAt": iso(artifact.created_at),
        "created_at": iso(artifact.created_at),
    }.get(key)
