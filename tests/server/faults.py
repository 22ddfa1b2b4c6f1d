"""Faults of the network and of the service, by operation: a status, a broken connection, a wait."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

OPERATION = re.compile(r"^\s*(?:query|mutation)\s+(\w+)", re.MULTILINE)

Request = tuple[str, str, bytes]
"""Method, path and body of a request."""


def operation_of(method: str, path: str, body: bytes) -> str:
    """What a request asks for: the name of a GraphQL operation, ``file_stream``, ``PUT storage/runs``, or the like."""
    if path == "/graphql":
        found = OPERATION.search(str(json.loads(body)["query"]))
        return found[1] if found else "graphql"
    if path.endswith("/file_stream"):
        return "file_stream"
    return f"{method} {'/'.join(path.lstrip('/').split('/')[:2])}"


@dataclass
class Fault:
    """What happens to requests of some operations.

    Attributes:
        operation: a pattern of the whole name of the operation (:func:`operation_of`).
        status: answer with this status, before anything is done.
        drop: break the connection, before anything is done.
        lose: break the connection after the request was carried out: the client does not know.
        wait_s: seconds before the request is carried out, or the fault happens.
        times: how many requests it happens to; None: to all.
        after: how many requests of these operations pass before it.
        when: whether it happens to a request at all.
    """

    operation: str
    status: int | None = None
    drop: bool = False
    lose: bool = False
    wait_s: float = 0.0
    times: int | None = None
    after: int = 0
    when: Callable[[Request], bool] = lambda request: True
    seen: int = 0
    happened: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def hits(self, operation: str, request: Request) -> bool:
        """Whether it happens to this request; counts it."""
        if re.fullmatch(self.operation, operation) is None or not self.when(request):
            return False
        with self.lock:
            self.seen += 1
            if self.seen <= self.after or (self.times is not None and self.happened >= self.times):
                return False
            self.happened += 1
        return True

    def before(self) -> int | None:
        """Do what happens before the request is carried out; returns the status to answer instead, if any."""
        time.sleep(self.wait_s)
        if self.drop:
            raise ConnectionResetError("a fault: the connection breaks")
        return self.status
