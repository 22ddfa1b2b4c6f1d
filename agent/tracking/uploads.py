"""Upload files while training continues: stage them by hard link, and send them in order on a thread."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from diffusion_core.messages import one_line
from diffusion_core.tracking import BEST, Upload


@dataclass(frozen=True)
class Request:
    """A request to the server that must follow earlier uploads.

    Attributes:
        name: for messages.
        send: sends it.
    """

    name: str
    send: Callable[[], None]


class UploadQueue:
    """Send uploads in order on a thread.

    The queue is bounded: of each name it keeps the newest ``keep`` uploads and the best one. Staged files are hard
    links: the originals may be deleted at any time, and nothing is copied.

    Args:
        send: sends one upload and returns once its files are not needed any more. It raises what goes wrong.
        folder: folder of the staged files.
        keep: number of uploads of a name that may wait, besides the best one.
        discard: whether to delete staged files after sending them.
    """

    def __init__(self, send: Callable[[Upload], None], folder: Path, keep: int = 2, discard: bool = True) -> None:
        self._send = send
        self._folder = folder
        self._keep = keep
        self._discard = discard
        self._waiting: list[Upload | Request] = []
        self._sending: Upload | Request | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def put(self, upload: Upload) -> None:
        """Stage the files and return. The originals may then be deleted, but not changed."""
        self._append(self._stage(upload))

    def then(self, name: str, send: Callable[[], None]) -> None:
        """Call ``send`` on the queue's thread after everything that waits now."""
        self._append(Request(name, send))

    def _append(self, item: Upload | Request) -> None:
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
        """Wait until everything is sent, for at most ``patience_s`` seconds. Return the names of what is left."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            left = self.unsent()
            if left:
                print(f"waiting up to {patience_s:.0f} s for uploads: {', '.join(left)}", file=sys.stderr)
            self._changed.wait_for(lambda: not self.unsent(), timeout=patience_s)
            return self.unsent()

    def unsent(self) -> list[str]:
        """Return the names of what waits or is being sent."""
        items = [*([self._sending] if self._sending else []), *self._waiting]
        return list(dict.fromkeys(item.name for item in items))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                self._sending = item = self._waiting.pop(0)
            try:
                item.send() if isinstance(item, Request) else self._send(item)
            except Exception as error:  # A failed upload must not stop training: the checkpoint is on the disk.
                print(f"W&B: could not upload {item.name}: {one_line(error)}", file=sys.stderr)
            else:
                if self._discard and isinstance(item, Upload):
                    self._delete(item)
            with self._changed:
                self._sending = None
                self._changed.notify_all()
