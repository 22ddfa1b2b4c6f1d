"""Files that travel while training goes on: staged by hard link, sent one after another by a thread of its own."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusion_core.messages import one_line
from diffusion_core.tracking import BEST


@dataclass(frozen=True)
class Upload:
    """A versioned set of files that waits to be sent.

    Attributes:
        name: of which this is a version.
        kind: what it is.
        files: what it holds.
        aliases: what this version is called; an alias moves here from older versions.
        metadata: facts about it.
        ttl_days: after how many days the server may forget it; None: never.
    """

    name: str
    kind: str
    files: tuple[Path, ...]
    aliases: tuple[str, ...]
    metadata: Mapping[str, Any]
    ttl_days: int | None


@dataclass(frozen=True)
class Errand:
    """Something else to tell the server, after the uploads before it.

    Attributes:
        name: what it is, for messages.
        work: does it.
    """

    name: str
    work: Callable[[], None]


class UploadQueue:
    """Sends uploads in order, on a thread of its own.

    What waits is bounded: of each name the newest ``keep`` and the best one. Their files are hard links, so that the
    originals may be deleted at any time and nothing is copied.

    Args:
        send: sends one upload, whole, and returns when its files are not needed any more; raises what goes wrong.
        folder: where files are staged.
        keep: how many uploads of a name may wait, besides the best one.
        discard: whether staged files are deleted once they are sent.
    """

    def __init__(self, send: Callable[[Upload], None], folder: Path, keep: int = 2, discard: bool = True) -> None:
        self._send = send
        self._folder = folder
        self._keep = keep
        self._discard = discard
        self._waiting: list[Upload | Errand] = []
        self._sending: Upload | Errand | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def put(self, upload: Upload) -> None:
        """Stage the files and return at once; from now on the originals may be deleted, but not written to."""
        self._append(self._stage(upload))

    def then(self, name: str, work: Callable[[], None]) -> None:
        """Do something on the queue's thread, once all that is in the queue now is done."""
        self._append(Errand(name, work))

    def _append(self, item: Upload | Errand) -> None:
        with self._changed:
            self._waiting.append(item)
            for superseded in self._superseded(item.name):
                self._waiting.remove(superseded)
                self._delete(superseded)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _stage(self, upload: Upload) -> Upload:
        self._folder.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{upload.name}-", dir=self._folder))
        for file in upload.files:
            try:
                os.link(file, folder / file.name)
            except OSError:  # Another file system, or one without links.
                shutil.copyfile(file, folder / file.name)
        return replace(upload, files=tuple(folder / file.name for file in upload.files))

    @staticmethod
    def _delete(staged: Upload) -> None:
        shutil.rmtree(staged.files[0].parent, ignore_errors=True)

    def _superseded(self, name: str) -> list[Upload]:
        uploads = [item for item in self._waiting if isinstance(item, Upload) and item.name == name]
        best = [upload for upload in uploads if BEST in upload.aliases][-1:]
        return [upload for upload in uploads[: -self._keep] if upload not in best]

    def close(self, patience_s: float) -> list[str]:
        """Wait until everything is sent, but no longer than that; returns the names of what was not sent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            left = self.unsent()
            if left:
                print(f"waiting up to {patience_s:.0f} s for uploads: {', '.join(left)}", file=sys.stderr)
            self._changed.wait_for(lambda: not self.unsent(), timeout=patience_s)
            return self.unsent()

    def unsent(self) -> list[str]:
        """The names of what waits or is on its way."""
        uploads = [*([self._sending] if self._sending else []), *self._waiting]
        return list(dict.fromkeys(upload.name for upload in uploads))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                self._sending = item = self._waiting.pop(0)
            try:
                item.work() if isinstance(item, Errand) else self._send(item)
            except Exception as error:  # Training does not end for an upload; the checkpoint is on the disk.
                reason = one_line(error)
                print(f"W&B: {item.name} was not uploaded: {reason}", file=sys.stderr)
            else:
                if self._discard and isinstance(item, Upload):
                    self._delete(item)
            with self._changed:
                self._sending = None
                self._changed.notify_all()
