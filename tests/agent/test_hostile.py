"""Files and words from people who mean harm, or from a bad disk: one clear line each, and nothing of theirs is run.

A table of cases, all in one process; `test_checkpoint.py` and `test_wrong_configurations.py` hold many more by hand.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from tiny import metadata, one_line, tiny_config, tiny_state

from agent.__main__ import main
from agent.sweep.file import load_sweep
from agent.tracking.artifacts import download_files
from diffusion_core.checkpoint import METADATA_FILE, CheckpointError, read_checkpoint, write_checkpoint
from diffusion_core.config import ConfigError
from diffusion_core.files import sha256_of_file
from diffusion_core.run_folder import HISTORY_FILE, RUN_FILE, read_history, read_run_file
from diffusion_core.training.trainer import TrainState

ROOT = Path(__file__).resolve().parents[2]
CONFIG = tiny_config()
Case = tuple[str, Callable[[Path], None]]


class Bomb:
    """Unpickled, it leaves a trace."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


@pytest.fixture(autouse=True)
def nothing_explodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("exploded"))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that can be sampled from and resumed."""
    state = tiny_state(CONFIG)
    return write_checkpoint(
        tmp_path_factory.mktemp("good"), 3, metadata(state.network) | state.metadata() | {"step": 3}, state.parts()
    ).path


# Checkpoints.


def part(content: bytes, name: str = "ema") -> Callable[[Path], None]:
    """Put bytes in a part's place, with size and hash to match: what somebody does who wants them to be parsed."""

    def put(path: Path) -> None:
        file = path / f"{name}.safetensors"
        file.write_bytes(content)
        described = json.loads((path / METADATA_FILE).read_text())
        described["files"][file.name] = {"bytes": len(content), "sha256": sha256_of_file(file)}
        (path / METADATA_FILE).write_text(json.dumps(described))

    return put


def described(key: str, value: Any) -> Callable[[Path], None]:
    """Put a value in the metadata; a dotted key goes one level down."""

    def put(path: Path) -> None:
        content = json.loads((path / METADATA_FILE).read_text())
        section, _, inner = key.partition("/")
        if inner:
            content[section][inner] = value
        else:
            content[section] = value
        (path / METADATA_FILE).write_text(json.dumps(content))

    return put


def header(content: Any, length: int | None = None, data: bytes = b"\0" * 64) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def damaged_parts(good: Path) -> Iterator[Case]:
    """Bytes that are no part of this checkpoint, though its metadata says so."""
    whole = (good / "ema.safetensors").read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    for length in (0, 1, 7, 8, 9, size // 2, size + 7, size + 8, size + 9, len(whole) - 1):
        yield f"truncated to {length}", part(whole[:length])
    yield "extended", part(whole + b"\0" * 8)
    chance = random.Random(0)
    for _ in range(30):  # In the header's length or its text: whatever is read then, it is not this network.
        position, bit = chance.randrange(8 + size - 40), chance.randrange(8)
        flipped = bytearray(whole)
        flipped[position] ^= 1 << bit
        if _names(bytes(flipped)) != _names(whole):
            yield f"bit {bit} of byte {position}", part(bytes(flipped))
    for length in (1, 63, 2**31, 2**40, 2**63, 2**64 - 1):
        yield f"header of {length}", part(header({}, length))
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    contents: dict[str, Any] = {
        "no object": [],
        "null": None,
        "text": "x",
        "number": 1e308,
        "no text": b"\xff\xfe\xfd",
        "deep": b"[" * 50_000,
        "deep objects": b'{"a":' * 20_000,
        "entry of text": {"w": "x"},
        "entry without shape": {"w": {"dtype": "F32", "data_offsets": [0, 16]}},
        "entry twice": b'{"w":' + json.dumps(entry).encode() + b',"w":' + json.dumps(entry).encode() + b"}",
        **{f"dtype {kind}": {"w": entry | {"dtype": kind}} for kind in ("F7", "O", "", "object", "F64")},
        **{f"shape {shape}": {"w": entry | {"shape": shape}} for shape in ([-4], [2**63], [2**32, 2**32], ["4"], 4)},
        **{
            f"offsets {offsets}": {"w": entry | {"data_offsets": offsets}}
            for offsets in ([16, 0], [0, 2**63], [-16, 0], [8, 24], [0], [0, 65], ["0", "16"])
        },
        "overlap": {"w": entry, "v": entry},
        "hole": {"w": entry, "v": entry | {"data_offsets": [32, 48]}},
    }
    for name, content in contents.items():
        yield f"header: {name}", part(header(content))
    for protocol in range(6):
        yield f"pickle {protocol}", part(pickle.dumps(Bomb(), protocol))
    archive, legacy = io.BytesIO(), io.BytesIO()
    torch.save(Bomb(), archive)
    torch.save(Bomb(), legacy, _use_new_zipfile_serialization=False)
    yield "torch archive", part(archive.getvalue())
    yield "torch pickle", part(legacy.getvalue())
    for wrong in (torch.zeros(3), torch.zeros(0), torch.zeros(2, 2, 2)):
        yield f"other tensors {tuple(wrong.shape)}", part(save({"weight": wrong}))
    yield "an optimizer of another network", part(save({"weight:exp_avg": torch.zeros(3)}), "optimizer")
    yield "a pickled optimizer", part(pickle.dumps(Bomb()), "optimizer")
    yield "a truncated optimizer", part((good / "optimizer.safetensors").read_bytes()[:9], "optimizer")


def _names(content: bytes) -> Any:
    """The names, types and shapes that a header gives, in whatever order; None if it is none."""
    try:
        size = struct.unpack("<Q", content[:8])[0]
        return json.loads(content[8 : 8 + size])
    except (ValueError, struct.error, OverflowError, MemoryError):
        return None


def wrong_metadata() -> Iterator[Case]:
    deep: Any = []
    for _ in range(200):
        deep = [deep]
    wrong: dict[str, list[Any]] = {
        "format": [None, "1", 0, 2, [], True + 1],
        "step": [None, "3", 1.5, [], {}, -1, True],
        "config": [None, [], "x", 3, deep],
        "image_shape": [None, {}, "1,8,8", [], [1], [1, 8], [1, 8, 9], [1.0, 8, 8], [0, 8, 8], [1, -8, -8], deep],
        "num_classes": [None, "10", 1.5, [], -1, 10**18, 3],
        "class_names": [None, {}, "x", [1], [[]], [None]],
        "structure": [None, [], "x", {"conv_in": []}, {"conv_in": {"out_channels": []}}, {"a.b.c": {"x": 1}}],
        "figures": [None, [], "x", 1],
        "ema_updates": [None, "1", 1.5, [], -1],
        "extra": [None, [], "x", 1],
        "files": [None, [], "x", {}, {"ema.safetensors": 1}, {"ema.safetensors": {"bytes": "1", "sha256": ""}}],
        "config/model.channels": ["x", -1, 0, None, 10**12, [], {}, 1.5],
        "config/model.channel_multipliers": ["x", [], [0], [-1], [10**9], deep],
        "config/data.name": ["x", None, 3, "../../etc/passwd"],
        "config/ema.decay": ["x", 2, -1, []],
        "files/ema.safetensors": [None, [], {}, {"bytes": 0, "sha256": "0" * 64}, {"bytes": 10**18, "sha256": ""}],
    }
    for key, values in wrong.items():
        for value in values:
            yield f"{key} = {str(value)[:30]}", described(key, value)
    for name in ("../x", "/etc/x", "a/x", "..\\x", "", ".", "x\n", "x\0", "x" * 200, "ünsafe", "%2e%2e%2fx", "-rf *"):
        yield f"file {name[:20]!r}", described(f"files/{name}.safetensors", {"bytes": 1, "sha256": ""})
    for text in ("", "{", "[]", "null", '"x"', "1", "{}", "[" * 100_000, '{"a":' * 100_000, "9" * 10_000, "NaN"):
        yield f"metadata {text[:10]!r}", lambda path, text=text: (path / METADATA_FILE).write_text(text)  # type: ignore[misc]
    for content in (b"\xff\xfe{", b"\0" * 100, pickle.dumps(Bomb())):
        yield f"metadata {content[:6]!r}", lambda path, content=content: (path / METADATA_FILE).write_bytes(content)  # type: ignore[misc]


def use(path: Path) -> None:
    """All that is done with a checkpoint from elsewhere: it is sampled from, and gone on with."""
    checkpoint = read_checkpoint(path)
    checkpoint.network()
    TrainState.restore(checkpoint, CONFIG.train, CONFIG.ema, torch.device("cpu"))


def test_checkpoints_from_elsewhere(tmp_path: Path, good: Path) -> None:
    use(good)
    cases = [*damaged_parts(good), *wrong_metadata()]
    assert len(cases) > 150
    for name, harm in cases:
        path = Path(shutil.copytree(good, tmp_path / "checkpoint"))
        harm(path)
        try:
            use(path)
        except CheckpointError as error:
            one_line(error)
        else:
            pytest.fail(f"taken: {name}")
        shutil.rmtree(path)


# Artifacts.


def test_artifacts_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded if any entry is not a file of a checkpoint: the real manifest, before any request."""
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb"))
    import wandb
    from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry
    from wandb.sdk.lib.paths import LogicalPath

    file = tmp_path / "file"
    file.write_bytes(b"x")
    names = [
        "../ema.safetensors",
        "/ema.safetensors",
        "a/ema.safetensors",
        "ema.pkl",
        "evil.py",
        "ema.safetensors.exe",
        ".bashrc",
        "a\nb",
    ]
    for name in names:
        artifact = wandb.Artifact("model-x", "model")
        artifact.add_file(str(file), name="checkpoint.json", policy="immutable", skip_cache=True)
        # Past the client's own check of what it is given here.
        artifact.manifest.entries[name] = ArtifactManifestEntry(path=LogicalPath("x"), digest="", size=1)
        refuse_download(artifact, tmp_path / "into")
    for uri in ("file:///etc/passwd", "http://127.0.0.1:1/x"):
        artifact = wandb.Artifact("model-x", "model")
        artifact.add_reference(uri, name="ema.safetensors", checksum=False)
        refuse_download(artifact, tmp_path / "into")


def refuse_download(artifact: Any, folder: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        download_files(artifact, folder)
    one_line(caught.value)
    assert not folder.exists()


# Configurations.

BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 10)}]" for i in range(12)
)
YAML = {
    "python call": '!!python/object/apply:os.system ["touch exploded"]',
    "python call in a value": 'seed: !!python/object/apply:os.system ["touch exploded"]',
    "python new": "!!python/object/new:type {args: [x, !!python/tuple [], {}]}",
    "python name": "train.lr: !!python/name:os.system",
    "python module": "train.lr: !!python/module:os",
    "own tag": "train.lr: !lr 3",
    "bomb": BOMB,
    "a list in itself": "train: &a [*a]",
    "a mapping in itself": "train: &a {lr: *a}",
    "deep list": "train.lr: " + "[" * 20_000,
    "deep mapping": "{a: " * 20_000,
    "null byte": "train.lr: 1\0",
    "control bytes": "train.lr: \x1b[2J",
    "binary": "train.lr: !!binary aGFsbG8=",
    "set": "train.lr: !!set {a, b}",
    "date": "train.lr: 2024-13-45",
    "key of a list": "? [a, b]\n: 1",
    "key of a number": "1: 2",
    "huge number": "train.steps: " + "9" * 5_000,
    "unknown alias": "train.lr: *nowhere",
    "two documents": "seed: 1\n---\nseed: 2",
    "tabs": "train:\n\tlr: 1",
    "long": "x" * 2_000_000,
    "not utf-8": "train.lr: \udcff",
}
WORDS = [
    "--train.lr=__import__('os').system('touch exploded')",
    "--train={'lr': __import__('os').system('touch exploded')}",
    "--train=" + "[" * 5_000,
    "--train=" + "{" * 200 + "}" * 200,
    "--train.lr=$(touch exploded)",
    "--train.lr=`touch exploded`",
    "--seed=" + "9" * 6_000,
    "--seed=0x" + "f" * 100,
    "--train.lr=1e999",
    "--train.lr=nan",
    "--model.channel_multipliers=" + ",".join(["1"] * 2_000),
    "--__class__=1",
    "--train.__class__=1",
    "--train.__init__.__globals__=1",
    "--model_config=1",
    "--=1",
    "--.=1",
    "--train.=1",
    "--\n=1",
    "--\x1b[2J=1",
    "--config=/dev/null/x",
    "--config=\0",
    "--config=" + "x" * 5_000,
    "--config=/dev/zero",
    "--log.dir=\0",
    "--log.dir=" + "x" * 5_000,
    "--data.path=\0",
    "--preset=../../etc/passwd",
    "--preset=['digits']",
]


def refuse(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = main([*words, "--preset=digits"] if not words[0].startswith("--preset") else words)
    out, err = capsys.readouterr()
    assert code == 2, words[0][:80]
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err[:500]
    assert len(err) < 20_000
    assert not out


def test_configurations_from_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for name, text in YAML.items():
        file = tmp_path / f"{name}.yaml"
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
        refuse([f"--config={file}"], capsys)
        with pytest.raises(ConfigError) as caught:
            load_sweep(file)
        assert all(len(line) < 2_000 for line in str(caught.value).splitlines()), name
    for word in WORDS:
        refuse([word], capsys)


def test_run_folders_from_elsewhere(tmp_path: Path) -> None:
    for text in ("", "[]", "null", "1", '"x"', "{}", '{"id": 1, "preemptions": "x"}', '{"id": "x", "environment": []}',
                 "[" * 100_000):  # fmt: skip
        (tmp_path / RUN_FILE).write_text(text)
        with pytest.raises(ConfigError) as caught:
            read_run_file(tmp_path)
        one_line(caught.value)
    # Where a key would be sent is not for a folder to say.
    (tmp_path / RUN_FILE).write_text('{"id": "x", "environment": {"WANDB_BASE_URL": "http://evil", "PATH": "evil"}}')
    assert read_run_file(tmp_path)["environment"] == {}
    lines = [
        "[]",
        "1",
        "null",
        '"x"',
        "{}",
        '{"step": "1"}',
        '{"step": true}',
        '{"step": 1, "a": []}',
        "[" * 10_000,
        "\0",
    ]
    (tmp_path / HISTORY_FILE).write_text("\n".join([*lines, '{"step": 7, "train/loss": 0.5}']))
    assert read_history(tmp_path) == [{"step": 7, "train/loss": 0.5}]


@pytest.mark.slow
def test_the_real_commands_refuse_too(tmp_path: Path, good: Path) -> None:
    """A handful, as a user meets them: exit status 2 and one line."""
    hostile = Path(shutil.copytree(good, tmp_path / "hostile"))
    part(pickle.dumps(Bomb()))(hostile)
    (tmp_path / "bomb.yaml").write_text(YAML["python call"])
    script = str(ROOT / "scripts" / "sample_images.py")
    commands = [
        [script, "--checkpoint", str(hostile), "--out", "images"],
        ["-m", "agent", "--config=bomb.yaml"],
        ["-m", "agent.sweep", "bomb.yaml", "--offline"],
    ]
    running = [
        subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for words in commands
    ]
    for process in running:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 2, out + err
        assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1, err
        assert "Traceback" not in err
