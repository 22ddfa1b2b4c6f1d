"""HTTP and lifecycle: the server that a test starts, pauses and reads.

The client retries 5xx for a long time, so a defect here must not answer 500: it is kept in `errors` and answered 400,
and tests assert that `errors` is empty.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import socket
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from .backend import Backend
from .faults import Fault, operation_of
from .graphql import OperationError
from .store import ENTITY, Artifact, Run, Sweep

PROJECT = "test"


class WandbServer:
    """`with WandbServer() as server:` serves on a free port until the block ends."""

    api_key = "0123456789abcdef" * 2 + "01234567"

    def __init__(self) -> None:
        self.backend = Backend(lambda: self.url)
        self.errors: list[str] = []
        """Unexpected exceptions, each with its traceback and the request."""
        self.received: list[tuple[str, bytes]] = []
        """What clients sent: ("METHOD /path", body), decompressed, without headers."""
        self.faults: list[Fault] = []
        """What goes wrong; the first that hits a request happens to it."""
        self._port = 0
        self._http: _HTTPServer | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.resume()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.pause()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def runs(self) -> dict[str, Run]:
        return self.backend.store.runs

    @property
    def artifacts(self) -> list[Artifact]:
        return self.backend.store.artifacts

    @property
    def sweeps(self) -> dict[str, Sweep]:
        return self.backend.store.sweeps

    def artifact(self, name: str) -> Artifact:
        """The committed artifact `name:alias` or `name:v0`."""
        collection_name, _, alias = name.partition(":")
        for collection in self.backend.store.collections:
            found = collection.find(alias or "latest") if collection.name == collection_name else None
            if found and not collection.is_portfolio:
                return found.artifact
        raise KeyError(name)

    def expire(self, run_id: str) -> None:
        """Say that no sign of life came from a run for as long as W&B waits (minutes): it has crashed."""
        with self.backend.lock:
            self.backend.runs.lose(self.runs[run_id])

    def pause(self) -> None:
        """An outage: close the socket and every connection. The state stays."""
        if self._http is None:
            return
        self._http.shutdown()
        self._http.close_connections()
        self._http.server_close()  # waits for the requests in progress: after a pause, nothing changes any more
        assert self._thread is not None
        self._thread.join()
        self._http = None

    def resume(self) -> None:
        """Serve, after a pause on the same port as before."""
        if self._http is not None:
            return
        self._http = _HTTPServer(self, self._port)
        self._port = self._http.server_address[1]
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, name="wandb-server", daemon=True
        )
        self._thread.start()

    def env(self, home: Path) -> dict[str, str]:
        """The environment for a process whose wandb is to talk to this server and keep its files below `home`."""
        home.mkdir(parents=True, exist_ok=True)
        env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR", "ARTIFACT_DIR"):
            directory = home / f"wandb_{name.lower()}"
            directory.mkdir(exist_ok=True)
            env[f"WANDB_{name}"] = str(directory)
        env.update(
            HOME=str(home),
            # `wandb agent` starts programs with whatever `python` comes first.
            PATH=os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)]),
            NO_PROXY="127.0.0.1",
            no_proxy="127.0.0.1",
            WANDB_BASE_URL=self.url,
            WANDB_API_KEY=self.api_key,
            WANDB_ENTITY=ENTITY,
            WANDB_PROJECT=PROJECT,
            WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL="1",
            WANDB_ERROR_REPORTING="false",
            # The agent gives up on three failures within its first minute, and here every trial is that short.
            WANDB_AGENT_DISABLE_FLAPPING="true",
        )
        return env


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = False
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, owner: WandbServer, port: int) -> None:
        self.owner = owner
        self.stopping = False
        self._connections: set[socket.socket] = set()
        self._connections_lock = threading.Lock()
        super().__init__(("127.0.0.1", port), _RequestHandler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._connections_lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._connections_lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        self.stopping = True
        with self._connections_lock:
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):  # the client was faster
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            self.owner.errors.append(traceback.format_exc())


class _RequestHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: _HTTPServer

    def log_message(self, format: str, *args: Any) -> None:
        """Silence: a test reads `received`."""

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_OPTIONS = do_HEAD = do_GET

    def _serve(self) -> None:
        owner = self.server.owner
        body = self._body()
        if self.server.stopping:
            raise ConnectionResetError("an outage: what had not begun is dropped")
        owner.received.append((f"{self.command} {self.path}", body))
        path = unquote(urlsplit(self.path).path)
        request = (self.command, path, body)
        fault = next((fault for fault in owner.faults if fault.hits(operation_of(*request), request)), None)
        refused = fault.before() if fault else None
        try:
            if refused is not None:
                raise OperationError("a fault of the test", status=refused)
            status, content, kind = self._answer(path, body)
            if fault and fault.lose:
                raise ConnectionResetError("a fault: the answer is lost")
        except OperationError as error:
            status, kind = error.status, "application/json"
            content = json.dumps({"errors": [{"message": str(error)}], "error": str(error), "data": None}).encode()
        except ConnectionResetError:
            raise
        except Exception as error:
            owner.errors.append(f"{self.command} {self.path}\n{body[:4000]!r}\n{traceback.format_exc()}")
            status, kind = 400, "application/json"
            content = json.dumps({"errors": [{"message": f"test server: {error!r}"}], "data": None}).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Access-Control-Allow-Origin", "*")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _answer(self, path: str, body: bytes) -> tuple[int, bytes, str]:
        backend = self.server.owner.backend
        area, _, rest = path.lstrip("/").partition("/")
        if self.command == "OPTIONS":
            return 200, b"", "text/plain"
        if self.command == "POST" and path == "/graphql":
            request = json.loads(body)
            data = backend.graphql(request["query"], request.get("variables") or {})
            return 200, json.dumps({"data": data}).encode(), "application/json"
        if self.command == "POST" and area == "files" and rest.endswith("/file_stream"):
            run_id = rest.split("/")[2]
            with backend.lock:
                answer = backend.runs.file_stream(run_id, json.loads(body))
            return 200, json.dumps(answer).encode(), "application/json"
        if area == "storage":
            kind, _, key = rest.partition("/")
            if self.command == "PUT":
                backend.put(kind, key, body)
                return 200, b"", "text/plain"
            content = backend.get(kind, key)
            if content is not None:
                return 200, content, "application/octet-stream"
        if area == "artifactsV2" and self.command == "GET":
            content = backend.artifacts.get_v2(rest)
            if content is not None:
                return 200, content, "application/octet-stream"
        return 404, b"not found", "text/plain"

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(parts)
        else:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            if len(body) < length:
                raise ConnectionResetError("the connection was closed within a request")
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
