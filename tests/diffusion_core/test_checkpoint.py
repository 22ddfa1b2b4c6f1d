"""Checkpoints: bit for bit, all or nothing, and without trust in what is on the disk."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import (
    CONFIG,
    NUM_CLASSES,
    assert_same_tensors,
    cpu,
    digits,
    metadata,
    one_line,
    tiny_batches,
    tiny_config,
    tiny_network,
    tiny_state,
)
from torch import Tensor

from diffusion_core.checkpoint import (
    METADATA_FILE,
    Checkpoint,
    CheckpointError,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from diffusion_core.files import sha256_of_file
from diffusion_core.machine.child import ChildDied, in_child
from diffusion_core.model.structure import structure
from diffusion_core.model.unet import UNet
from diffusion_core.tracking import MemoryTracker
from diffusion_core.training.checkpoints import SaveCheckpoints
from diffusion_core.training.trainer import TrainState, train
from pruning.channels.removal import prune_channels
from pruning.config import PruneConfig


def save(folder: Path, step: int = 5, network: UNet | None = None) -> Checkpoint:
    """A checkpoint of a network, with one part."""
    network = network or tiny_network(seed=step)
    return write_checkpoint(folder, step, metadata(network), {"ema": network.state_dict()})


def trained(steps: int = 3) -> TrainState:
    config = tiny_config(train__steps=steps)
    return train(tiny_state(config), tiny_batches(config), config, accelerator=cpu())


def save_state(folder: Path, state: TrainState) -> Checkpoint:
    return write_checkpoint(folder, state.step, metadata(state.network) | state.metadata(), state.parts())


def edit(path: Path, change: Any) -> None:
    """Change the metadata of a checkpoint as somebody might who means harm."""
    content = json.loads((path / METADATA_FILE).read_text())
    result = change(content)
    (path / METADATA_FILE).write_text(json.dumps(content if result is None else result))


def replace_part(path: Path, tensors: dict[str, Tensor], part: str = "ema") -> None:
    """Put other tensors in a part's place, with size and hash to match."""
    file = path / f"{part}.safetensors"
    save_file(tensors, file)
    facts = {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)}
    edit(path, lambda content: content["files"].update({file.name: facts}))


def refused(path: Path, use: bool = False) -> str:
    """The message with which a checkpoint is refused, on reading or (``use``) once its network is asked for."""
    with pytest.raises(CheckpointError) as caught:
        _ = read_checkpoint(path).network() if use else read_checkpoint(path)
    message = one_line(caught.value)
    assert str(path) in message
    return message


# Round trips.


def test_a_training_state_survives_bit_for_bit(tmp_path: Path) -> None:
    state = trained()
    state.extra_parts["masks"] = {"conv_in.weight": torch.rand(8, 1, 3, 3) > 0.5}
    state.extra_metadata["note"] = {"sparsity": 0.1 + 0.2}
    save_state(tmp_path, state)
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.step == 3
    assert checkpoint.shape_CHW == (1, 8, 8)
    assert checkpoint.class_names == tuple("0123456789")
    assert set(checkpoint.parts) == {"ema", "model", "optimizer", "masks"}
    assert checkpoint.config() == CONFIG

    restored = TrainState.restore(checkpoint, CONFIG.train, CONFIG.ema, torch.device("cpu"))
    before, after = state.parts(), restored.parts()
    assert before.keys() == after.keys()
    for part in before:
        assert_same_tensors(before[part], after[part])
    assert before["optimizer"]  # Both moments and the count of each weight.
    assert len(before["optimizer"]) == 3 * len(list(state.network.parameters()))
    assert (restored.step, restored.ema.updates) == (3, 3)
    assert restored.extra_metadata == state.extra_metadata
    assert restored.ema.share("decay") == state.ema.share("decay")
    assert not torch.equal(before["ema"]["conv_in.weight"], before["model"]["conv_in.weight"])


def test_the_network_survives_in_evaluation_mode(tmp_path: Path) -> None:
    network = tiny_network()
    loaded = save(tmp_path, network=network).network()
    assert not loaded.training
    assert_same_tensors(network.state_dict(), loaded.state_dict())


def test_unusual_tensors_survive(tmp_path: Path) -> None:
    source = torch.Generator().manual_seed(0)
    tensors = {
        "transposed": torch.randn(3, 5, generator=source).T,
        "scalar": torch.tensor(3.25),
        "bits": torch.tensor([True, False]),
        "half": torch.randn(4, generator=source).bfloat16(),
        "tiny": torch.tensor([1e-45, -0.0, torch.finfo(torch.float32).max]),
        "empty": torch.empty(0, 3),
    }
    write_checkpoint(tmp_path, 1, metadata(tiny_network()), {"ema": tensors})
    assert_same_tensors(tensors, read_checkpoint(tmp_path).tensors("ema"))


@pytest.mark.parametrize("heads", [1, 2])
def test_a_pruned_network_survives(tmp_path: Path, heads: int) -> None:
    config = tiny_config(model__num_heads=heads, model__channels=16)
    network = tiny_network(config)
    smaller = prune_channels(network, PruneConfig(keep=0.3))[0].eval()
    write_checkpoint(tmp_path, 1, metadata(smaller, config), {"ema": smaller.state_dict()})
    loaded = read_checkpoint(tmp_path).network()
    assert_same_tensors(smaller.state_dict(), loaded.state_dict())
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 30]), torch.tensor([1, 2])
    with torch.no_grad():
        assert torch.equal(smaller(x, t, labels), loaded(x, t, labels))
    assert json.loads((tmp_path / "step-00000001" / METADATA_FILE).read_text())["structure"]
    assert structure(network, config.model) == {}


# Where checkpoints are found.


def test_a_checkpoint_is_found_by_its_folder_by_all_and_by_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (9, 100, 20):
        save(folder, step)
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000009", "step-00000020", "step-00000100"]
    assert read_checkpoint(folder / "step-00000020").step == 20
    assert read_checkpoint(folder).step == 100
    assert read_checkpoint(tmp_path).step == 100
    assert newest_checkpoint(tmp_path / "nothing") is None
    assert "no checkpoint here" in refused(tmp_path / "nothing")


def test_the_sampling_part_alone_is_enough_to_sample_and_not_to_resume(tmp_path: Path) -> None:
    """What a `model` artifact holds."""
    path = save_state(tmp_path, trained()).path
    (path / "model.safetensors").unlink()
    (path / "optimizer.safetensors").unlink()
    checkpoint = read_checkpoint(path)
    assert checkpoint.parts == ("ema",)
    assert checkpoint.network().num_classes == NUM_CLASSES
    with pytest.raises(CheckpointError, match="cannot resume without model, optimizer") as caught:
        TrainState.restore(checkpoint, CONFIG.train, CONFIG.ema, torch.device("cpu"))
    one_line(caught.value)


# All or nothing.


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes: a write fails midway, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def failed_write(folder: Path, step: int, parts: dict[str, dict[str, Tensor]]) -> str:
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(folder, step, metadata(tiny_network()), parts)
    return one_line(caught.value)


@pytest.mark.parametrize("limit", [300, 2000, 60_000])
def test_a_full_disk_leaves_the_earlier_checkpoint_whole(tmp_path: Path, limit: int) -> None:
    save(tmp_path, 5)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    network = tiny_network()
    parts = {"ema": network.state_dict(), "optimizer": {"big": torch.zeros(40_000)}}
    for step in (5, 10):  # Over the earlier one, and beside it.
        with full_disk(limit):
            message = failed_write(tmp_path, step, parts)
        assert "cannot write checkpoint" in message
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 5
    write_checkpoint(tmp_path, 10, metadata(network), parts)  # Once there is room again.
    assert read_checkpoint(tmp_path).step == 10


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, value: float) -> None:
    save(tmp_path, 5)
    tensors = dict(tiny_network().state_dict())
    tensors["conv_out.bias"] = torch.tensor([value])
    message = failed_write(tmp_path, 10, {"ema": tensors})
    assert "conv_out.bias" in message
    assert "not finite" in message
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    assert read_checkpoint(tmp_path).step == 5


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "cannot write checkpoint" in failed_write(tmp_path / "file" / "checkpoints", 1, {"ema": {}})


def test_what_a_crash_left_behind_does_not_count_and_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 5)
    partial = tmp_path / ".step-00000010.partial"
    shutil.copytree(tmp_path / "step-00000005", partial)
    half = tmp_path / "step-00000011"  # Without metadata: no checkpoint.
    half.mkdir()
    (half / "ema.safetensors").write_bytes(b"")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000005"]
    assert read_checkpoint(tmp_path).step == 5
    save(tmp_path, 10)
    assert not partial.exists()
    assert read_checkpoint(tmp_path).step == 10


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5, tiny_network(seed=1))
    save(tmp_path, 5, tiny_network(seed=2))
    assert_same_tensors(read_checkpoint(tmp_path).tensors("ema"), dict(tiny_network(seed=2).state_dict()))


def killed_at(call: int, work: Callable[[], object]) -> bool:
    """Work in a process that dies at its n-th rename or deletion. Return whether it did."""
    left = [call]
    rename, delete = os.rename, shutil.rmtree

    def counted(path: Path, *words: Any, **more: Any) -> None:
        left[0] -= path.exists()  # A deletion of nothing does not count.
        if left[0] < 0 and path.is_dir():
            (path / METADATA_FILE).unlink(missing_ok=True)
        if left[0] < 0:
            os._exit(9)
        delete(path, *words, **more)

    def counted_rename(*words: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)
        rename(*words)

    def die() -> None:
        shutil.rmtree, os.rename = counted, counted_rename  # type: ignore[assignment]
        work()

    try:
        in_child(die)
    except ChildDied:
        return True
    return False


def test_a_kill_while_a_step_is_written_again_leaves_one_of_the_two(tmp_path: Path) -> None:
    networks = [dict(tiny_network(seed=seed).state_dict()) for seed in (1, 2)]
    calls = 0
    while True:
        folder = tmp_path / str(calls)
        save(folder, 5, tiny_network(seed=1))
        if not killed_at(calls, lambda folder=folder: save(folder, 5, tiny_network(seed=2))):  # type: ignore[misc]
            break
        weights = read_checkpoint(folder).tensors("ema")
        assert any(torch.equal(weights["conv_out.bias"], one["conv_out.bias"]) for one in networks)
        save(folder, 10)
        assert sorted(path.name for path in folder.iterdir()) == ["step-00000005", "step-00000010"]
        calls += 1
    assert calls >= 3, "renamed, renamed, deleted"


def test_a_kill_while_a_checkpoint_is_deleted_leaves_nothing_for_ever(tmp_path: Path) -> None:
    calls = 0
    while True:
        folder = tmp_path / str(calls)
        paths = [save(folder, step).path for step in (5, 10)]
        newest = read_checkpoint(paths[-1])
        saver = SaveCheckpoints(tiny_config(checkpoint__keep=1), digits(), MemoryTracker(), folder, "r", newest)
        if not killed_at(calls, saver._delete_old):
            break
        assert read_checkpoint(paths[0] if list_checkpoints(folder) == paths else folder).step in (5, 10)
        save(folder, 15)
        saver._delete_old()
        assert [path.name for path in folder.iterdir()] == ["step-00000015"]
        calls += 1
    assert calls >= 1


# Damage.


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda path: (path / "ema.safetensors").write_bytes((path / "ema.safetensors").read_bytes()[:-1]),
    "longer": lambda path: (path / "ema.safetensors").open("ab").write(b"x"),
    "bit flipped": lambda path: flip_bit(path / "ema.safetensors"),
    "missing": lambda path: (path / "ema.safetensors").unlink(),
    "a folder": lambda path: ((path / "ema.safetensors").unlink(), (path / "ema.safetensors").mkdir()),
    "no JSON": lambda path: (path / METADATA_FILE).write_text('{"format": 1, "st'),
    "empty JSON": lambda path: (path / METADATA_FILE).write_text(""),
    "no text": lambda path: (path / METADATA_FILE).write_bytes(b"\xff\xfe\x00{}"),
    "nested": lambda path: (path / METADATA_FILE).write_text("[" * 100_000),
    "a list": lambda path: (path / METADATA_FILE).write_text("[1, 2]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_passed_over(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 5)
    DAMAGES[damage](save(tmp_path, 10).path)
    refused(tmp_path / "step-00000010")
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 5
    assert read_checkpoint(tmp_path).step == 5
    DAMAGES[damage](tmp_path / "step-00000005")
    with pytest.raises(CheckpointError) as caught:  # Rather than start over in silence.
        newest_checkpoint(tmp_path)
    one_line(caught.value)


# Metadata that means harm.


def put(key: str, value: Any) -> Any:
    return lambda content: content.update({key: value})


def also_file(name: str) -> Any:
    return lambda content: content["files"].update({name: {"bytes": 1, "sha256": ""}})


HOSTILE = {
    "another format": put("format", 2),
    "step is text": put("step", "5"),
    "step is missing": lambda content: {k: v for k, v in content.items() if k != "step"},
    "files is a list": put("files", ["ema.safetensors"]),
    "files is empty of facts": put("files", {"ema.safetensors": {}}),
    "facts of wrong types": put("files", {"ema.safetensors": {"bytes": "1", "sha256": 3}}),
    "path upwards": also_file("../../ema.safetensors"),
    "absolute path": also_file("/etc/ema.safetensors"),
    "path for Windows": also_file("..\\ema.safetensors"),
    "another kind of file": also_file("ema.pkl"),
    "name with a null": also_file("ema\0.safetensors"),
    "name too long": also_file("e" * 5000 + ".safetensors"),
    "no files": put("files", {}),
    "image_shape of two": put("image_shape", [8, 8]),
    "image_shape of text": put("image_shape", ["1", "8", "8"]),
    "image_shape huge": put("image_shape", [1, 10**9, 10**9]),
    "image_shape of true": put("image_shape", [True, 8, 8]),
    "image not square": put("image_shape", [1, 8, 16]),
    "num_classes is text": put("num_classes", "10"),
    "num_classes negative": put("num_classes", -3),
    "num_classes huge": put("num_classes", 10**15),
    "num_classes of another network": put("num_classes", 11),
    "class_names of numbers": put("class_names", [1, 2]),
    "config is a list": put("config", []),
    "config with a wrong value": lambda content: content["config"].update({"model.channels": "wide"}),
    "config with a huge network": lambda content: content["config"].update(
        {"model.channels": 4096, "model.channel_multipliers": [10**6, 10**6]}
    ),
    "config of another network": lambda content: content["config"].update({"model.channels": 16}),
    "structure is a list": put("structure", []),
    "structure of numbers": put("structure", {"conv_in": 3}),
    "structure of an unknown module": put("structure", {"__class__": {"out_channels": 4}}),
    "structure of the network itself": put("structure", {"": {"training": 1}}),
    "structure of an unknown size": put("structure", {"conv_in": {"in_channels": 1, "__dict__": 4}}),
    "structure of size zero": put("structure", {"conv_in": {"in_channels": 1, "out_channels": 0}}),
    "structure of a larger layer": put("structure", {"conv_in": {"in_channels": 1, "out_channels": 10**9}}),
    "structure of text": put("structure", {"conv_in": {"in_channels": 1, "out_channels": "8"}}),
    "structure of other weights": put("structure", {"conv_in": {"in_channels": 1, "out_channels": 4}}),
    "structure without groups": put("structure", {"norm_out": {"num_channels": 8, "num_groups": 3}}),
    "figures is a list": put("figures", []),
    "ema_updates is text": put("ema_updates", "many"),
    "extra is null": put("extra", None),
}


@pytest.mark.parametrize("harm", HOSTILE)
def test_hostile_metadata_is_refused(tmp_path: Path, harm: str) -> None:
    path = save(tmp_path).path
    edit(path, HOSTILE[harm])
    refused(path, use=True)


def test_a_file_outside_is_never_read(tmp_path: Path) -> None:
    """Even with the right size and hash."""
    path = save(tmp_path / "run").path
    outside = Path(shutil.copy(path / "ema.safetensors", tmp_path / "ema.safetensors"))
    facts = {"bytes": outside.stat().st_size, "sha256": sha256_of_file(outside)}
    edit(path, lambda content: content["files"].update({"../../ema.safetensors": facts}))
    assert "not a file of a checkpoint" in refused(path)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def test_a_pickle_under_the_name_of_safetensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "run").path
    file = path / "ema.safetensors"
    file.write_bytes(pickle.dumps(Bomb()))
    facts = {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)}
    edit(path, lambda content: content["files"].update({file.name: facts}))
    refused(path, use=True)
    torch.save({"weight": torch.zeros(3)}, file)
    facts = {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)}
    edit(path, lambda content: content["files"].update({file.name: facts}))
    refused(path, use=True)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("change", ["missing", "unknown", "other shape"])
def test_tensors_of_another_network_are_refused(tmp_path: Path, change: str) -> None:
    path = save(tmp_path).path
    tensors = dict(tiny_network().state_dict())
    if change == "missing":
        del tensors["conv_in.bias"]
    elif change == "unknown":
        tensors["back_door"] = torch.zeros(1)
    else:
        tensors["conv_in.bias"] = torch.zeros(9)
    replace_part(path, tensors)
    assert "do not fit" in refused(path, use=True)


@pytest.mark.parametrize("change", ["other name", "other shape"])
@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
def test_a_state_of_another_network_is_not_resumed(tmp_path: Path, part: str, change: str) -> None:
    path = save_state(tmp_path, trained()).path
    tensors = read_checkpoint(path).tensors(part)
    name = sorted(tensors)[0]
    tensor = tensors.pop(name)
    tensors |= {"other" + name: tensor} if change == "other name" else {name: torch.zeros(tensor.numel() + 1)}
    replace_part(path, tensors, part)
    with pytest.raises(CheckpointError) as caught:
        TrainState.restore(read_checkpoint(path), CONFIG.train, CONFIG.ema, torch.device("cpu"))
    one_line(caught.value)
