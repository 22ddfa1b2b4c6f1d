"""Write files and folders atomically; hash files and tensors; find values that are not finite."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_core.messages import UserError, reason_of

if TYPE_CHECKING:
    from torch import Tensor

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Codes of an ``OSError`` that says that a disk takes no more."""

REPLACED = ".replaced"
"""End of the name of a folder while another one takes its place."""


@contextmanager
def replaced_file(path: Path, *, flush: bool = True, concurrent: bool = False, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the same folder, and rename it to ``path`` when the context ends without an error.

    Readers see the old file or the whole new one. After an error the temporary file is deleted.

    Args:
        path: the file to write; its folder exists.
        flush: flush the file to the disk before the rename, so that a power failure leaves no empty file.
        concurrent: other processes may write the same file at the same time; use a random temporary name.
        replace: whether a file that is at ``path`` by then is replaced; else it stays.
    """
    temporary = path.with_name(f".{secrets.token_hex(4)}.partial") if concurrent else temporary_name(path)
    try:
        yield temporary
        if flush:
            flush_to_disk(temporary)
        if replace:
            temporary.replace(path)
        else:
            _rename_if_absent(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _rename_if_absent(temporary: Path, path: Path) -> None:
    """Give a file its name, unless there is one of this name. Where the disk has no hard links, this is not atomic."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:
        if not path.exists():
            temporary.replace(path)


@contextmanager
def replaced_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a new folder in the same parent; flush it and rename it to ``path`` when the context ends without an error.

    After an error the new folder is deleted.

    Args:
        path: the folder to make.
        overwrite: replace the folder at ``path``, which a kill in this moment leaves for :func:`restore_replaced`; else
            ``path`` must be missing or an empty folder.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            flush_to_disk(file)
        flush_to_disk(temporary)
        if overwrite:
            _replace_folder(path, temporary)
        else:
            temporary.rename(path)
        flush_to_disk(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_folder(path: Path, new: Path) -> None:
    """Rename a folder to ``path``. What is there is renamed before, and deleted afterwards."""
    old = path.with_name(f".{path.name}{REPLACED}")
    while True:
        if path.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        try:
            new.rename(path)
        except OSError as error:
            restore_replaced(path.parent)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:  # If not, another process has restored it meanwhile.
            break
    flush_to_disk(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_replaced(parent: Path) -> None:
    """Put folders back that a killed process had renamed in order to replace them, if nothing is in their places."""
    for old in parent.glob(f".*{REPLACED}"):
        with suppress(OSError):  # A new one is there, or this file system is read only.
            old.rename(old.with_name(old.name.removesuffix(REPLACED)[1:]))


@contextmanager
def new_folder(target: Path, option: str = "TARGET") -> Iterator[Path]:
    """Yield a temporary folder that becomes ``target`` on success and is deleted on failure.

    Args:
        target: must not exist, or be an empty folder.
        option: the option that named it, for messages.

    Raises:
        UserError: if ``target`` exists, or cannot be written.
    """
    final = Path(os.path.abspath(target))
    try:
        if final.is_symlink() or (final.exists() and not (final.is_dir() and not any(final.iterdir()))):
            raise UserError(f"{option} = {str(target)!r}: exists already; choose another folder")
        with replaced_folder(final, overwrite=False) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"{option} = {str(target)!r}: {reason_of(error)}; choose another folder") from None


@contextmanager
def new_file(target: Path, option: str) -> Iterator[Path]:
    """Yield a temporary path that becomes the file ``target`` on success; make its folder if it is missing.

    Args:
        target: the file.
        option: the option that named it, for messages.

    Raises:
        UserError: if ``target`` cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(target) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"{option} = {str(target)!r}: {reason_of(error)}; choose another file") from None


def temporary_name(path: Path) -> Path:
    """Return the path of a file while it is written: hidden, without an image suffix, and short.

    It is always the same for a file, so that the next write replaces what a killed process left. It is short because
    the file's own name may have the greatest length that the file system allows.
    """
    return path.with_name(f".{zlib.crc32(os.fsencode(path.name)):08x}.partial")


def write_text(path: Path, content: str) -> None:
    """Write a UTF-8 text file atomically and flush it to the disk."""
    with replaced_file(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically and flush it to the disk."""
    write_text(path, json.dumps(content, indent=1))


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write a JSON-lines file, one row a line, atomically and flush it to the disk."""
    write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file with a header atomically and flush it to the disk; cells that a row lacks stay empty."""
    with replaced_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def flush_to_disk(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Return the number of bytes that are free on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.is_dir())).free


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(*parts: str | bytes | Tensor) -> str:
    """Return the SHA-256 of texts (as UTF-8), bytes and tensors (their values in memory order), 64 hexadecimal digits.

    The parts are joined without separators: give shapes and lengths as texts where they matter.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
        elif isinstance(part, bytes):
            digest.update(part)
        else:
            digest.update(part.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity, or None.

    Every value is read once, which takes a fifth of the time of hashing it.
    """
    import torch  # Slow to import.

    for name, tensor in tensors.items():
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # The extremes are NaN if any value is. Types of one byte have no comparison.
        low, high = (tensor.float() if tensor.itemsize == 1 else tensor.detach()).aminmax()
        if not (math.isfinite(low) and math.isfinite(high)):
            return name
    return None
