"""Upload files while training continues: stage them by hard link, and send them in order on a thread."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffusion_core.messages import one_line
from diffusion_core.terminal.progress import say
from diffusion_core.tracking import BEST, Upload

ATTEMPTS = 3
"""Number of times that an upload is tried. W&B's client repeats only what it takes for a passing fault."""

PAUSE_S = 2.0
"""Seconds before the second attempt; twice as many before each later one."""


@dataclass
class Item:
    """Something to send.

    Attributes:
        name: for messages, and to find items that a newer one supersedes.
        send: sends it, and returns once its files are not needed any more. It raises what goes wrong.
        folders: staged files, deleted when it is sent or superseded.
        is_best: whether it is to be sent even if newer ones wait.
    """

    name: str
    send: Callable[[], None]
    folders: Sequence[Path] = ()
    is_best: bool = False


class UploadQueue:
    """Send uploads in order on a thread.

    Uploads that were put together are sent or dropped together. The queue is bounded: of each name it keeps the newest
    ``keep`` items and the best one. Staged files are hard links: the originals may be deleted at any time, and nothing
    is copied.

    Args:
        send: sends uploads that were put together. It raises what goes wrong.
        folder: folder of the staged files.
        keep: number of items of a name that may wait, besides the best one.
        discard: whether to delete staged files after sending them.
    """

    def __init__(
        self, send: Callable[[Sequence[Upload]], None], folder: Path, keep: int = 2, discard: bool = True
    ) -> None:
        self._send = send
        self._folder = folder
        self._keep = keep
        self._discard = discard
        self._waiting: list[Item] = []
        self._sending: Item | None = None
        self._failed: list[Item] = []
        self._closing = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def put(self, *uploads: Upload) -> None:
        """Stage the files and return. The originals may then be deleted, but not changed."""
        staged = [self._stage(upload) for upload in uploads]
        name = " and ".join(upload.name for upload in uploads)
        folders = [upload.files[0].parent for upload in staged]
        is_best = any(BEST in upload.aliases for upload in uploads)
        self._append(Item(name, lambda: self._send(staged), folders, is_best))

    def then(self, name: str, send: Callable[[], None]) -> None:
        """Call ``send`` on the queue's thread after everything that waits now."""
        self._append(Item(name, send))

    def _append(self, item: Item) -> None:
        with self._changed:
            self._waiting.append(item)
            for superseded in self._superseded(item.name):
                self._waiting.remove(superseded)
                _delete(superseded)
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

    def _superseded(self, name: str) -> list[Item]:
        items = [item for item in self._waiting if item.folders and item.name == name]
        best = [item for item in items if item.is_best][-1:]
        return [item for item in items[: -self._keep] if item not in best]

    def close(self, patience_s: float) -> list[str]:
        """Wait for uploads for at most ``patience_s`` seconds. Return the names of those that did not arrive."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            left = self.unsent()
            if left and patience_s > 0:
                say(f"waiting up to {patience_s:.0f} s for uploads: {', '.join(left)}")
            self._changed.wait_for(lambda: not self.unsent(), timeout=patience_s)
            return list(dict.fromkeys([*(item.name for item in self._failed), *self.unsent()]))

    def unsent(self) -> list[str]:
        """Return the names of uploads that are waiting or being sent."""
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
                self._try_to_send(item)
            except Exception as error:  # A failed upload must not stop training: the checkpoint is on the disk.
                say(f"W&B: could not upload {item.name}: {one_line(error)}")
                self._failed.append(item)
            else:
                self._failed = [old for old in self._failed if old.name != item.name or old.is_best > item.is_best]
                if self._discard:
                    _delete(item)
            with self._changed:
                self._sending = None
                self._changed.notify_all()

    def _try_to_send(self, item: Item) -> None:
        for attempt in range(1, ATTEMPTS):
            try:
                return item.send()
            except Exception:
                time.sleep(PAUSE_S * 2 ** (attempt - 1))
        item.send()


def _delete(item: Item) -> None:
    for folder in item.folders:
        shutil.rmtree(folder, ignore_errors=True)
