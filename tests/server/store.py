"""What the server holds: plain objects in memory, in the form in which tests want to read them."""

from __future__ import annotations

import base64
import json
import secrets
import string
import time
from dataclasses import dataclass, field
from typing import Any

ENTITY = "tester"
ORGANIZATION = "test-org"
PERSONAL_ENTITY = "somebody"
"""A user without an organization, and so without a registry."""

UNCATEGORIZED = "uncategorized"

TERMINAL_STATES = frozenset({"finished", "failed", "crashed", "killed"})


def encode_id(kind: str, key: str) -> str:
    """A GraphQL id. The Go core decodes artifact ids, so they have to be base64 as W&B's are."""
    return base64.b64encode(f"{kind}:{key}".encode()).decode()


def decode_id(gql_id: str) -> str:
    """The key within a GraphQL id."""
    return base64.b64decode(gql_id).decode().split(":", 1)[1]


def random_id() -> str:
    """Eight characters, as W&B names runs and sweeps."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def iso(moment: float | None) -> str | None:
    """A time as the API gives it."""
    return None if moment is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


@dataclass(eq=False)
class Project:
    """A project; a registry is one too, named `wandb-registry-...`, in the organization's entity."""

    entity: str
    name: str
    number: int
    created_at: float = field(default_factory=time.time)

    @property
    def gql_id(self) -> str:
        return encode_id("Project", f"v1:{self.name}:{self.entity}")


@dataclass(eq=False)
class Run:
    """A run. `summary` and `history` are as logged, so they also have W&B's own keys (`_step`, `_runtime`, ...)."""

    id: str
    project: Project = field(repr=False)
    display_name: str = ""
    state: str = "running"
    raw_config: dict[str, Any] = field(default_factory=dict, repr=False)
    summary: dict[str, Any] = field(default_factory=dict, repr=False)
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)
    events: list[dict[str, Any]] = field(default_factory=list, repr=False)
    log_lines: list[str] = field(default_factory=list, repr=False)
    files: dict[str, bytes] = field(default_factory=dict, repr=False)
    sweep_id: str | None = None
    suggested: dict[str, Any] | None = field(default=None, repr=False)
    """The parameters that the search engine chose, wrapped as `{"value": ...}`; the program may have overwritten them
    in `config`."""
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)
    notes: str | None = None
    description: str | None = None
    host: str | None = None
    program: str | None = None
    commit: str | None = None
    exit_code: int | None = None
    stop_requested: bool = False
    """Hyperband or a user wants the run to end: its agent is told so."""
    interrupt: bool = False
    """A user wants the run to end: its client is told so, and raises KeyboardInterrupt within some 15 s."""
    output_artifacts: list[Artifact] = field(default_factory=list, repr=False)
    used_artifacts: list[Artifact] = field(default_factory=list, repr=False)
    alerts: list[dict[str, Any]] = field(default_factory=list, repr=False)
    created_at: float = field(default_factory=time.time)
    heartbeat_at: float | None = None

    @property
    def entity(self) -> str:
        return self.project.entity

    @property
    def config(self) -> dict[str, Any]:
        """The user's config."""
        return {
            key: value["value"] if isinstance(value, dict) and "value" in value else value
            for key, value in self.raw_config.items()
            if key != "_wandb"
        }

    @property
    def gql_id(self) -> str:
        return encode_id("Run", f"v1:{self.id}:{self.project.name}:{self.entity}")


@dataclass(eq=False)
class Collection:
    """Where artifact versions live: a sequence, which a run logs into, or a portfolio, which versions are linked to."""

    name: str
    type: str
    project: Project = field(repr=False)
    is_portfolio: bool
    number: int
    memberships: list[Membership] = field(default_factory=list, repr=False)
    tags: list[str] = field(default_factory=list)
    description: str | None = None
    state: str = "READY"
    next_index: int = 0
    created_at: float = field(default_factory=time.time)

    @property
    def typename(self) -> str:
        return "ArtifactPortfolio" if self.is_portfolio else "ArtifactSequence"

    @property
    def gql_id(self) -> str:
        return encode_id("ArtifactCollection", str(self.number))

    def add(self, artifact: Artifact) -> Membership:
        """The membership of `artifact` here, a new version where there was none."""
        for membership in self.memberships:
            if membership.artifact is artifact:
                return membership
        membership = Membership(self, artifact, self.next_index)
        self.next_index += 1
        self.memberships.append(membership)
        return membership

    def set_alias(self, membership: Membership, alias: str) -> None:
        """An alias names one version: it moves."""
        for other in self.memberships:
            if other is not membership and alias in other.aliases:
                other.aliases.remove(alias)
        if alias not in membership.aliases:
            membership.aliases.append(alias)

    def find(self, alias: str) -> Membership | None:
        """The version that `v3` or an alias stands for."""
        for membership in self.memberships:
            if membership.artifact.state != "DELETED" and (alias == membership.version or alias in membership.aliases):
                return membership
        return None


@dataclass(eq=False)
class Membership:
    """One artifact in one collection."""

    collection: Collection = field(repr=False)
    artifact: Artifact
    index: int
    aliases: list[str] = field(default_factory=list)
    created_at: float = field(default_factory=time.time)

    @property
    def version(self) -> str:
        return f"v{self.index}"


@dataclass(eq=False)
class Artifact:
    """An artifact version, `PENDING` until the client commits it, `DELETED` for good after a delete."""

    number: int
    collection: Collection = field(repr=False)
    digest: str
    storage: dict[str, bytes] = field(repr=False)
    """The blobs of the whole server, by storage path."""
    metadata: dict[str, Any] = field(default_factory=dict)
    description: str | None = None
    tags: list[str] = field(default_factory=list)
    state: str = "PENDING"
    ttl: int | None = None
    """Seconds to live, or None where nothing was set or it was disabled."""
    created_by: str | None = None
    """The id of the run that logged it."""
    used_by: list[Run] = field(default_factory=list, repr=False)
    manifest: bytes | None = field(default=None, repr=False)
    pending_aliases: list[str] = field(default_factory=list, repr=False)
    client_id: str | None = None
    history_step: int | None = None
    created_at: float = field(default_factory=time.time)
    updated_at: float = field(default_factory=time.time)

    @property
    def name(self) -> str:
        return self.collection.name

    @property
    def type(self) -> str:
        return self.collection.type

    @property
    def gql_id(self) -> str:
        return encode_id("Artifact", str(self.number))

    @property
    def membership(self) -> Membership | None:
        """Its place in the sequence that it was logged to; None before the commit."""
        return next((m for m in self.collection.memberships if m.artifact is self), None)

    @property
    def version(self) -> str | None:
        return self.membership.version if self.membership else None

    @property
    def aliases(self) -> list[str]:
        """Its aliases in its own collection (those in a registry are on the membership there)."""
        return list(self.membership.aliases) if self.membership else []

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        """The manifest's entries by path, references among them."""
        return json.loads(self.manifest)["contents"] if self.manifest else {}

    @property
    def files(self) -> dict[str, bytes]:
        """The stored files by path; a reference has none."""
        return {path: self.storage[storage_path(e)] for path, e in self.entries.items() if "ref" not in e}

    @property
    def size(self) -> int:
        return sum(int(entry.get("size") or 0) for entry in self.entries.values())


def storage_path(entry: dict[str, Any]) -> str:
    """Where the content of a manifest entry lies: under the artifact that first brought it."""
    return blob_path(entry.get("birthArtifactID") or "", entry["digest"])


def blob_path(birth_artifact_id: str, digest: str) -> str:
    """The storage path of a blob, given its base64 digest."""
    return f"{decode_id(birth_artifact_id)}/{base64.b64decode(digest).hex()}"


@dataclass(eq=False)
class Sweep:
    """A sweep and the queue of its preempted runs."""

    id: str
    project: Project = field(repr=False)
    config_yaml: str = field(repr=False)
    config: dict[str, Any]
    state: str = "RUNNING"
    display_name: str | None = None
    description: str | None = None
    runs: list[Run] = field(default_factory=list, repr=False)
    requeued: list[Run] = field(default_factory=list, repr=False)
    """Preempted runs that wait for an agent."""
    enqueued: list[Run] = field(default_factory=list, repr=False)
    """Runs that a scheduler on the user's machine has chosen."""
    prior_runs: list[Run] = field(default_factory=list, repr=False)
    controller: str | None = None
    scheduler: str | None = None
    created_at: float = field(default_factory=time.time)
    updated_at: float = field(default_factory=time.time)

    @property
    def gql_id(self) -> str:
        return encode_id("Sweep", f"v1:{self.id}:{self.project.name}:{self.project.entity}")


@dataclass(eq=False)
class Agent:
    """A sweep agent and the runs that it is believed to be executing."""

    id: str
    sweep: Sweep = field(repr=False)
    host: str
    active: set[str] = field(default_factory=set)
    runs: list[Run] = field(default_factory=list, repr=False)
    exited: bool = False
    created_at: float = field(default_factory=time.time)
    heartbeat_at: float = field(default_factory=time.time)

    @property
    def gql_id(self) -> str:
        return encode_id("Agent", self.id)


@dataclass
class Store:
    """Everything, in order of creation."""

    projects: dict[tuple[str, str], Project] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    artifacts: list[Artifact] = field(default_factory=list)
    collections: list[Collection] = field(default_factory=list)
    sweeps: dict[str, Sweep] = field(default_factory=dict)
    agents: dict[str, Agent] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)

    def project(self, entity: str | None, name: str | None) -> Project:
        """The project, made if need be."""
        key = (entity or ENTITY, name or UNCATEGORIZED)
        if key not in self.projects:
            self.projects[key] = Project(*key, number=len(self.projects) + 1)
        return self.projects[key]

    def find_project(self, entity: str | None, name: str | None) -> Project | None:
        return self.projects.get((entity or ENTITY, name or UNCATEGORIZED))
