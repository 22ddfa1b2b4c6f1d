"""Runs: upsert, the file stream, files, history, and the state machine (running, preempted, crashed, ...)."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import mimetypes
import posixpath
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .filters import flatten, flatten_summary, matches, order_by
from .graphql import Handler, Json, OperationError, connection
from .store import ENTITY, TERMINAL_STATES, Project, Run, decode_id, encode_id, iso, random_id

if TYPE_CHECKING:
    from .backend import Backend

USER = {"name": ENTITY, "username": ENTITY, "entity": ENTITY, "email": f"{ENTITY}@example.com"}

_ATTRIBUTES = {
    "displayName": "display_name",
    "groupName": "group",
    "jobType": "job_type",
    "jobProgram": "program",
    "tags": "tags",
    "notes": "notes",
    "description": "description",
    "host": "host",
    "commit": "commit",
}


class RunOperations:
    """What clients do with runs."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def handlers(self) -> dict[str, Handler]:
        return {
            "upsertBucket": self.upsert,
            "createRunFiles": self.create_files,
            "deleteFiles": self.delete_files,
            "markRunFilesUploaded": lambda args: {"success": True},
            "deleteRun": self.delete,
            "stopRun": self.stop,
            "updateRunState": self.update_state,
            "notifyScriptableRunAlert": self.alert,
        }

    def by_gql_id(self, gql_id: str) -> Run:
        run = self.backend.store.runs.get(decode_id(gql_id).split(":")[1])
        if run is None:
            raise OperationError("run not found", status=404)
        return run

    # Writing

    def upsert(self, args: Json) -> Json:
        """Create or update a run. A client that initialises it, rather than updates its config, starts it anew."""
        given = args["input"]
        store = self.backend.store
        if "id" in given:
            run, inserted = self.by_gql_id(given["id"]), False
        else:
            name = given.get("name") or random_id()
            inserted = name not in store.runs
            if inserted:
                run = Run(name, store.project(given.get("entityName"), given.get("modelName")))
                run.display_name = f"run-{len(store.runs) + 1}"
                store.runs[name] = run
            run = store.runs[name]
            asked = store.project(given.get("entityName"), given.get("modelName"))
            if asked is not run.project:  # W&B would make another run of the same id.
                raise ValueError(f"run {name} is in project {run.project.name}, and asked for in {asked.name}")
        for key, attribute in _ATTRIBUTES.items():
            if key in given:
                setattr(run, attribute, given[key])
        if "config" in given:
            run.raw_config = _loads(given["config"])
        if "summaryMetrics" in given:
            run.summary = _loads(given["summaryMetrics"])
        if "sweep" in given:
            self.backend.sweeps.adopt(run, given["sweep"])
        if "state" in given:
            run.state = given["state"]
        elif "id" not in given and run.state not in ("running", "preempting"):
            run.state = "running"
            run.exit_code = None
            run.stop_requested = run.interrupt = False
        return {"bucket": self.node(run), "inserted": inserted}

    def file_stream(self, run_id: str, request: Json) -> Json:
        """Lines of history, events, console and summary, each at its offset; and how the run ended."""
        run = self.backend.store.runs.get(run_id)
        if run is None:
            raise OperationError(f"run {run_id} not found", status=404)
        run.heartbeat_at = time.time()
        for name, chunk in (request.get("files") or {}).items():
            offset, lines = int(chunk["offset"]), chunk["content"]
            if name == "wandb-history.jsonl":
                _write_at(run.history, offset, [_loads(line) for line in lines])
            elif name == "wandb-events.jsonl":
                _write_at(run.events, offset, [_loads(line) for line in lines])
            elif name == "wandb-summary.json":
                run.summary = _loads(lines[-1])
            elif name == "output.log":
                run.log_lines.extend([""] * (offset - len(run.log_lines)))
                _write_at(run.log_lines, offset, lines)
                run.files[name] = "".join(f"{line}\n" for line in run.log_lines).encode()
            else:
                raise ValueError(f"unknown stream {name!r}")
        if run.sweep_id is not None and "wandb-history.jsonl" in (request.get("files") or {}):
            self.backend.sweeps.terminate_early(run.sweep_id)
        if request.get("preempting"):
            run.state = "preempting"
        if request.get("complete"):
            self.complete(run, int(request.get("exitcode") or 0))
        return {"stopped": run.interrupt}

    def complete(self, run: Run, exit_code: int) -> None:
        """The client says that the run has ended."""
        preempting = run.state in ("preempting", "preempted")
        run.exit_code = exit_code
        if exit_code == 0:
            run.state = "finished"
        elif preempting:
            self._preempt(run)
        else:
            run.state = "killed" if run.stop_requested else "failed"

    def lose(self, run: Run) -> None:
        """No sign of life any more."""
        if run.state == "preempting":
            self._preempt(run)
        elif run.state not in TERMINAL_STATES and run.state != "preempted":
            run.state = "killed" if run.stop_requested else "crashed"

    def _preempt(self, run: Run) -> None:
        run.state = "preempted"
        if run.sweep_id is not None:
            self.backend.sweeps.requeue(run)

    def create_files(self, args: Json) -> Json:
        given = args["input"]
        run = self.backend.store.runs[given["runName"]]
        files = [
            {"name": name, "uploadUrl": self.backend.storage_url("runs", run.id, posixpath.normpath(name))}
            for name in given["files"]
        ]
        return {"runID": run.gql_id, "uploadHeaders": [], "files": files}

    def put_file(self, run_id: str, name: str, body: bytes) -> None:
        self.backend.store.runs[run_id].files[name] = body

    def delete_files(self, args: Json) -> Json:
        for gql_id in args["input"]["files"]:
            run_id, _, name = decode_id(gql_id).partition(":")
            del self.backend.store.runs[run_id].files[name]
        return {"success": True}

    def delete(self, args: Json) -> Json:
        run = self.by_gql_id(args["input"]["id"])
        del self.backend.store.runs[run.id]
        for sweep in self.backend.store.sweeps.values():
            sweep.runs = [other for other in sweep.runs if other is not run]
        if args["input"].get("deleteArtifacts"):
            for artifact in run.output_artifacts:
                artifact.state = "DELETED"
        return {"clientMutationId": None}

    def stop(self, args: Json) -> Json:
        run = self.by_gql_id(args["input"]["id"])
        run.stop_requested = run.interrupt = run.state in ("running", "preempting")
        return {"success": True}

    def update_state(self, args: Json) -> Json:
        run = self.by_gql_id(args["input"]["id"])
        if run.sweep_id is not None:
            raise OperationError("the state of a sweep run cannot be updated")
        run.state = args["input"]["state"]
        return {"success": True}

    def alert(self, args: Json) -> Json:
        given = args["input"]
        self.backend.store.runs[given["runName"]].alerts.append(
            {"title": given["title"], "text": given["text"], "severity": given.get("severity", "INFO")}
        )
        return {"success": True}

    # Reading

    def select(self, project: Project, args: Json) -> list[Run]:
        """The runs of a project by filter and order."""
        query = json.loads(args.get("filters") or "{}")
        runs = [run for run in self.backend.store.runs.values() if run.project is project]
        return order_by([run for run in runs if matches(run, _column, query)], _column, args.get("order"))

    def node(self, run: Run) -> Json:
        """A run as GraphQL reads it."""
        projects = self.backend.projects
        return {
            "__typename": "Run",
            "id": run.gql_id,
            "name": run.id,
            "displayName": run.display_name,
            "project": lambda args: projects.info(run.project),
            "projectId": str(run.project.number),
            "state": run.state,
            "config": lambda args: json.dumps(run.raw_config),
            "wandbConfig": lambda args: self._wandb_config(run, args),
            "summaryMetrics": lambda args: json.dumps(run.summary),
            "systemMetrics": lambda args: json.dumps(run.events[-1] if run.events else {}),
            "sweepName": run.sweep_id,
            "group": run.group,
            "jobType": run.job_type,
            "tags": run.tags,
            "notes": run.notes,
            "description": run.description,
            "host": run.host,
            "commit": run.commit,
            "readOnly": False,
            "createdAt": iso(run.created_at),
            "heartbeatAt": iso(run.heartbeat_at or run.created_at),
            "user": {**USER, "id": encode_id("User", "1")},
            "exitcode": run.exit_code,
            "shouldStop": run.stop_requested,
            "stopped": run.stop_requested,
            "failed": run.state == "failed",
            "running": run.state == "running",
            "historyLineCount": len(run.history),
            "eventsLineCount": len(run.events),
            "logLineCount": len(run.log_lines),
            "historyTail": lambda args: json.dumps([json.dumps(row) for row in run.history[-1:]]),
            "eventsTail": lambda args: json.dumps([json.dumps(row) for row in run.events[-1:]]),
            "historyKeys": lambda args: _history_keys(run),
            "history": lambda args: [json.dumps(row) for row in _history_page(run.history, args)],
            "events": lambda args: [json.dumps(row) for row in _history_page(run.events, args)],
            "sampledHistory": lambda args: [
                list(_sampled(run.history, json.loads(s))) for s in _as_list(args["specs"])
            ],
            "parquetHistory": lambda args: {"parquetUrls": [], "liveData": []},
            "fileCount": len(run.files),
            "files": lambda args: connection(_select_files(run, args), args, lambda name: self._file_node(run, name)),
            "logLines": lambda args: _log_lines(run, args),
            "outputArtifacts": lambda args: self.backend.artifacts.connection(run.output_artifacts, args),
            "inputArtifacts": lambda args: self.backend.artifacts.connection(run.used_artifacts, args),
        }

    def _wandb_config(self, run: Run, args: Json) -> str:
        """W&B's own part of the config. Its key `t` (telemetry) is the sign that a client has started the run."""
        value = run.raw_config.get("_wandb", {}).get("value", {})
        return json.dumps({key: value[key] for key in args.get("keys", value) if key in value})

    def _file_node(self, run: Run, name: str) -> Json:
        body = run.files[name]
        url = self.backend.storage_url("runs", run.id, name)
        return {
            "id": encode_id("File", f"{run.id}:{name}"),
            "name": name,
            "url": url,
            "directUrl": url,
            "sizeBytes": len(body),
            "mimetype": mimetypes.guess_type(name)[0] or "application/octet-stream",
            "updatedAt": iso(run.heartbeat_at or run.created_at),
            "md5": base64.b64encode(hashlib.md5(body).digest()).decode(),
        }


def _loads(text: str) -> Any:
    """Clients send NaN and Infinity bare, which is not JSON; W&B keeps them as strings, and so reads give them back."""
    return json.loads(text, parse_constant=str)


def _write_at(lines: list[Any], offset: int, new: list[Any]) -> None:
    """Idempotent: the client sends lines again, at the same offset, when an answer was lost."""
    if offset > len(lines):
        raise ValueError(f"lines {len(lines)} to {offset} are missing")
    lines[offset : offset + len(new)] = new


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _thin(rows: list[Json], samples: int | None) -> list[Json]:
    """At most `samples` rows, evenly, the last among them."""
    if not samples or len(rows) <= samples:
        return rows
    step = len(rows) / samples
    return [rows[int((i + 1) * step) - 1] for i in range(samples)]


def _history_page(rows: list[Json], args: Json) -> list[Json]:
    if "minStep" in args or "maxStep" in args:
        low, high = int(args.get("minStep", 0)), int(args.get("maxStep", 2**62))
        return [row for row in rows if low <= row.get("_step", 0) < high]
    return _thin(rows, args.get("samples"))


def _sampled(rows: list[Json], spec: Json) -> Iterator[Json]:
    """The rows that have all the keys of a spec, with those keys only. Unlike in `history`, `maxStep` is included."""
    keys = spec.get("keys")
    low, high = spec.get("minStep", 0), spec.get("maxStep", 2**62)
    selected = [row for row in rows if low <= row.get("_step", 0) <= high]
    if keys:
        flat = [{**flatten(row), **row} for row in selected]
        selected = [{key: row[key] for key in keys} for row in flat if all(key in row for key in keys)]
    yield from _thin(selected, spec.get("samples"))


def _history_keys(run: Run) -> Json:
    keys: dict[str, Json] = {}
    for row in run.history:
        for key, value in flatten(row).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            kind = "number" if number else "string" if isinstance(value, str) else "map"
            info = keys.setdefault(key, {"typeCounts": [{"type": kind, "count": 0}], "monotonic": False})
            info["typeCounts"][0]["count"] += 1
            info["previousValue"] = value
    return {"keys": keys, "sets": [], "lastStep": run.history[-1].get("_step", 0) if run.history else -1}


def _select_files(run: Run, args: Json) -> list[str]:
    names = [posixpath.normpath(name) for name in args.get("names") or []]
    if names:
        return [name for name in names if name in run.files]
    pattern = (args.get("pattern") or "%").replace("%", "*").replace("_", "?")
    return [name for name in sorted(run.files) if fnmatch.fnmatchcase(name, pattern)]


def _log_lines(run: Run, args: Json) -> Json:
    numbers = list(range(len(run.log_lines)))
    if "last" in args:
        numbers = numbers[-args["last"] :]
    return connection(numbers, args, lambda n: {"number": n, "line": run.log_lines[n], "level": "info", "label": ""})


def _column(run: Run, key: str) -> Any:
    """What a filter or an order key names."""
    head, _, rest = key.partition(".")
    if head == "config":
        name = rest.removesuffix(".value").replace(".value.", ".")
        config = run.config
        return config.get(name, flatten(config).get(name))
    if head in ("summary_metrics", "summaryMetrics"):
        return flatten_summary(run.summary).get(rest)
    columns: dict[str, Any] = {
        "name": run.id,
        "displayName": run.display_name,
        "display_name": run.display_name,
        "state": run.state,
        "sweep": run.sweep_id,
        "group": run.group,
        "jobType": run.job_type,
        "job_type": run.job_type,
        "tags": run.tags,
        "username": ENTITY,
        "createdAt": iso(run.created_at),
        "created_at": iso(run.created_at),
        "heartbeatAt": iso(run.heartbeat_at or run.created_at),
        "heartbeat_at": iso(run.heartbeat_at or run.created_at),
    }
    if key not in columns:
        raise OperationError(f"unknown run column {key!r}")
    return columns[key]
