"""Atomic writes, hashes and signal handlers."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusion_core.cache import keep
from diffusion_core.files import (
    new_file,
    replaced_file,
    replaced_folder,
    restore_replaced,
    sha256,
    sha256_of_file,
    temporary_name,
    write_csv,
    write_json,
    write_json_lines,
)
from diffusion_core.messages import UserError, one_line, reason_of
from diffusion_core.signals import signal_handler


@pytest.mark.parametrize("concurrent", [False, True])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, concurrent: bool) -> None:
    file = tmp_path / ("x" * 250)  # A longer temporary name would not fit the file system.
    file.write_text("old")
    with suppress(KeyboardInterrupt), replaced_file(file, concurrent=concurrent) as temporary:
        temporary.write_text("half")
        assert file.read_text() == "old"
        raise KeyboardInterrupt
    assert file.read_text() == "old"
    with replaced_file(file, concurrent=concurrent) as temporary:
        temporary.write_text("new")
    assert (file.read_text(), list(tmp_path.iterdir())) == ("new", [file])


def test_a_write_replaces_what_a_killed_process_left(tmp_path: Path) -> None:
    temporary_name(tmp_path / "a.json").write_text("half of a longer content")
    write_json(tmp_path / "a.json", [1])
    assert [path.read_text() for path in tmp_path.iterdir()] == ["[\n 1\n]"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(OSError, match="not empty"), replaced_folder(folder, overwrite=False):
        pass
    assert [path.name for path in folder.iterdir()] == ["old"]
    with suppress(RuntimeError), replaced_folder(folder, overwrite=True) as temporary:
        (temporary / "new").touch()
        raise RuntimeError
    with replaced_folder(folder, overwrite=True) as temporary:
        (temporary / "new").touch()
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_reader_that_restores_a_folder_while_it_is_replaced_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    rename = os.rename
    seen: list[Path] = []

    def watched(source: Path, target: Path) -> None:
        rename(source, target)
        if target.name.endswith(".replaced") and not seen:
            seen.append(source)
            restore_replaced(tmp_path)
            assert [path.name for path in folder.iterdir()] == ["old"]

    monkeypatch.setattr(os, "rename", watched)
    with replaced_folder(folder, overwrite=True) as temporary:
        (temporary / "new").touch()
    assert seen == [folder]
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [folder]


def test_rows(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "a", ({"x": value} for value in (1, 2.5)))
    assert (tmp_path / "a").read_text() == '{"x": 1}\n{"x": 2.5}\n'
    write_csv(tmp_path / "b", ["x", "y"], [{"x": None}, {"y": "a,b", "x": 1}])
    assert (tmp_path / "b").read_bytes() == b'x,y\r\n,\r\n1,"a,b"\r\n'


def test_hashes(tmp_path: Path) -> None:
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3).T  # Not contiguous.
    expected = hashlib.sha256(b"\xc3\xa4" + b"\0\1" + tensor.contiguous().numpy().tobytes() + b"\2" + b"\0" * 7)
    assert sha256("ä", b"\0\1", tensor, torch.tensor(2)) == expected.hexdigest()
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "a") == sha256("abc")


def test_errors_in_one_line() -> None:
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(TimeoutError()) == "TimeoutError"
    assert len(one_line("x" * 1000)) == 300
    assert reason_of(OSError(28, "No space left on device")) == "No space left on device"
    assert reason_of(OSError("a\nb")) == "a b"


def test_old_signal_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGUSR2)
    received: list[int] = []
    with suppress(RuntimeError), signal_handler([signal.SIGUSR2], received.append):
        os.kill(os.getpid(), signal.SIGUSR2)
        raise RuntimeError
    assert received == [signal.SIGUSR2]
    assert signal.getsignal(signal.SIGUSR2) is before


def test_a_new_file_is_whole_or_missing_and_its_errors_name_the_option(tmp_path: Path) -> None:
    file = tmp_path / "missing" / "deep" / "file"
    with new_file(file, "--out") as temporary:
        temporary.write_text("x")
        assert not file.exists()
    assert [path.name for path in file.parent.iterdir()] == ["file"]
    for place, error, reason in ((file / "x", None, "File exists"), (file, errno.ENOSPC, "No space left on device")):
        with pytest.raises(UserError) as refusal:
            write(place, error)
        assert str(refusal.value) == f"--out = {str(place)!r}: {reason}; choose another file"
    assert file.read_text() == "x"
    assert [path.name for path in file.parent.iterdir()] == ["file"]


def write(file: Path, error: int | None) -> None:
    with new_file(file, "--out") as temporary:
        temporary.write_text("half")
        if error is not None:
            raise OSError(error, os.strerror(error))


def test_a_cache_that_safetensors_cannot_write_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not keep(tmp_path / "file", lambda path: save_file({"a": torch.zeros(1)}, path / "x"))
    assert "cannot write" in capsys.readouterr().err
