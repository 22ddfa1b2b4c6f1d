"""Models to and from Diffusers. Needs it installed:  pip install "diffusion-sweeps[diffusers]"

  python scripts/convert_diffusers.py import google/ddpm-cifar10-32 runs/ddpm-cifar10-32
  python scripts/sample_images.py --checkpoint runs/ddpm-cifar10-32 --sampler ddim --steps 50
  python scripts/convert_diffusers.py export runs/abc123 exported

import  reads a DDPMPipeline (a folder, or its name on the Hugging Face hub) or the folder of a UNet2DModel alone, and
        writes a checkpoint. A network or noise schedule that ours cannot be is refused, with the key that is to blame.
export  writes a folder that DDPMPipeline.from_pretrained reads. Weights pass bit for bit, zeros of pruning masks among
        them; a network whose channels were removed cannot be a UNet2DModel and is refused.

Either way, both networks are run on the same noise and compared before anything is written.

A DDPMPipeline passes no labels, so that of a class-conditional model loads, but samples only if it is given some:

  pipeline = DDPMPipeline.from_pretrained("exported")
  pipeline.unet.forward = functools.partial(pipeline.unet.forward, class_labels=torch.tensor([0, 1, 2]))
  images = pipeline(batch_size=3).images

The last class stands for "no class" (classes.json lists the others), unless train.label_dropout was 0 and it was never
trained. For a pipeline that needs no labels, export a single class, or none, with --label: its embedding moves into
the bias of the time embedding, which changes nothing but rounding. Guidance is not part of a DDPMPipeline.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffusion_core.checkpoint import Checkpoint, CheckpointError, read_checkpoint, write_checkpoint
from diffusion_core.config import CoreConfig
from diffusion_core.config_io import ConfigError, build, flatten
from diffusion_core.diffusers_names import (
    SCHEDULER_DEFAULTS,
    UNET_DEFAULTS,
    diffusers_name,
    fewer_steps,
    modern_tensors,
    scheduler_config,
    scheduler_knobs,
    unet_config,
    unet_knobs,
    unknown_keys,
)
from diffusion_core.schedule import build_schedule
from diffusion_core.unet import NO_LABEL, UNet

INDEX_FILE = "model_index.json"
UNET_FILE = "config.json"
SCHEDULER_FILE = "scheduler_config.json"
WEIGHTS_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
CLASSES_FILE = "classes.json"
PIPELINE_STEPS = 1000
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

HO_SCHEDULER = {"_class_name": "DDPMScheduler", "variance_type": "fixed_large"}
"""What a network without a scheduler is taken to be trained with: Ho et al. 2020."""

EXTRA = "diffusers"
"""What of the source has no knob here and is kept in the checkpoint's `extra` for export."""

TOLERANCE = 1e-4
"""Largest difference of outputs, relative to the largest output or 1: rounding is at 1e-6, another network at 1e-1."""
SCHEDULE_TOLERANCE = 1e-5


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    directions = parser.add_subparsers(dest="direction", required=True)
    reading = directions.add_parser("import", help="a Diffusers model becomes a checkpoint", allow_abbrev=False)
    reading.add_argument("source", metavar="SOURCE", help="folder of a DDPMPipeline or UNet2DModel, or a hub name")
    reading.add_argument("target", type=Path, metavar="TARGET", help="folder of the checkpoint; must not exist")
    reading.add_argument("--null-class", action="store_true", help='the last class stands for "no class"; needed only '
                         f"where no {CLASSES_FILE} says so")  # fmt: skip
    writing = directions.add_parser("export", help="a checkpoint becomes a DDPMPipeline", allow_abbrev=False)
    writing.add_argument("source", type=Path, metavar="SOURCE", help="a checkpoint, or a run's folder (its newest)")
    writing.add_argument("target", type=Path, metavar="TARGET", help="folder of the pipeline; must not exist")
    writing.add_argument("--weights", choices=("ema", "model"), default="ema", help="averaged weights, or as trained")
    writing.add_argument("--label", metavar="CLASS", help="of a class-conditional model: this class alone, by number "
                         "or name, or none; the pipeline then needs no labels")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 if something cannot be converted."""
    arguments = parse_arguments(argv)
    try:
        need_diffusers()
        with new_folder(arguments.target) as folder:
            convert = import_model if arguments.direction == "import" else export_model
            lines = list(convert(arguments, folder))
        print("\n".join(lines))
    except (CheckpointError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


def need_diffusers() -> None:
    """Make Diffusers available, and quiet: what it would warn of is looked at here.

    Raises:
        ConfigError: if it is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        reason = "" if error.name == "diffusers" else f" ({' '.join(str(error).split())[:200]})"
        raise ConfigError(f'Diffusers is needed{reason}: pip install "diffusion-sweeps[diffusers]"') from None
    diffusers.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that takes its place if all goes well, and is gone if not.

    Raises:
        ConfigError: if there is something at ``target``, or the disk takes no more.
    """
    final = Path(os.path.abspath(target))
    temporary = final.parent / f".{final.name}.partial"
    try:
        if final.is_symlink() or (final.exists() and not (final.is_dir() and not any(final.iterdir()))):
            raise ConfigError(f"TARGET = {str(target)!r}: is there already; choose another folder")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(final)
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())[:300]
        raise ConfigError(f"TARGET = {str(target)!r}: {reason}; choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@dataclass(frozen=True)
class DiffusersModel:
    """What was read of a Diffusers model: two configurations, the weights under today's names, the classes."""

    unet: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    class_names: tuple[str, ...]
    has_null_class: bool
    notes: list[str] = field(default_factory=list)


def import_model(arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Write the checkpoint of a Diffusers model into ``folder``; yields what is to be told."""
    source = read_diffusers(find_source(arguments.source), arguments.null_class)
    knobs = unet_knobs(source.unet) | scheduler_knobs(source.scheduler)
    if source.class_names and not source.has_null_class:
        knobs["train.label_dropout"] = 0.0
    config = build(CoreConfig, knobs)
    theirs, unexpected = diffusers_network(source.unet, source.tensors)
    network = our_network(config, len(source.class_names), source)
    labels = [*range(len(source.class_names)), *([NO_LABEL] if source.has_null_class else [])]
    difference = compare(network, theirs, labels)
    compare_schedules(config, source.scheduler)

    metadata = {
        "config": flatten(config),
        "image_shape": [network.in_channels, network.image_size, network.image_size],
        "num_classes": network.num_classes,
        "class_names": list(source.class_names),
        "structure": {},
        "figures": {},
        "best": None,
        "ema_updates": 0,
        "extra": {EXTRA: {"source": arguments.source, **fewer_steps(SCHEDULER_DEFAULTS | dict(source.scheduler))}},
    }
    tensors = dict(network.state_dict())
    written = write_checkpoint(folder / "writing", 0, metadata, {"ema": tensors, "model": tensors})
    for path in written.path.iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(folder / "writing")

    yield f"{arguments.target}: {describe(network)}; differs from Diffusers by at most {difference:.1e}"
    for note in source.notes:
        yield f"note: {note}"
    if unexpected:
        yield f"note: weights that UNet2DModel does not know were passed over: {', '.join(unexpected)[:300]}"
    if source.class_names and not source.has_null_class:
        yield 'note: there is no "no class": sample it with labels; guidance needs train.label_dropout above 0'


def find_source(source: str) -> Path:
    """The folder of a model that is on disk, or else is downloaded from the hub (or found in its cache).

    Raises:
        ConfigError: if there is neither.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or not HUB_NAME.fullmatch(source):
        raise ConfigError(f"SOURCE = {source!r}: expected a folder, or a hub name such as google/ddpm-cifar10-32")
    import huggingface_hub

    settings = [f"{folder}{name}" for folder in ("", "unet/", "scheduler/") for name in (UNET_FILE, SCHEDULER_FILE)]
    try:
        for weights in WEIGHTS_FILES:  # The second only where there is no first.
            wanted = [INDEX_FILE, CLASSES_FILE, *settings, weights, f"unet/{weights}"]
            folder = Path(huggingface_hub.snapshot_download(source, allow_patterns=wanted))
            if any((folder / name).is_file() for name in (weights, f"unet/{weights}")):
                break
    except Exception as error:  # Of many kinds: the hub's, of HTTP, of the disk.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"SOURCE = {source!r}: no such folder, and not to be had from the hub: {reason}") from None
    return folder


def read_diffusers(folder: Path, null_class: bool) -> DiffusersModel:
    """Read a pipeline's folder, or that of a UNet2DModel; published pipelines of old have all files in one folder.

    Raises:
        ConfigError: if it holds something else.
    """
    notes = []
    if (folder / INDEX_FILE).is_file():
        parts = {key for key in read_json(folder / INDEX_FILE) if not key.startswith("_")}
        if parts != {"unet", "scheduler"}:
            raise ConfigError(
                f"{str(folder / INDEX_FILE)!r}: a pipeline of {', '.join(sorted(parts))}; expected unet and scheduler"
            )
    place = folder / "unet" if (folder / "unet" / UNET_FILE).is_file() else folder
    if not (place / UNET_FILE).is_file():
        raise ConfigError(f"SOURCE = {str(folder)!r}: no Diffusers model here (expected {INDEX_FILE} or {UNET_FILE})")
    unet = read_json(place / UNET_FILE)
    if unet.get("_class_name") != "UNet2DModel":
        found = unet.get("_class_name")
        raise ConfigError(f"{str(place / UNET_FILE)!r}: _class_name = {found!r}: expected 'UNet2DModel'")
    try:
        unet_knobs(unet)
    except ConfigError as error:
        raise ConfigError(f"{str(place / UNET_FILE)!r}: {error}") from None

    scheduler_file = folder / "scheduler" / SCHEDULER_FILE
    if not scheduler_file.is_file():
        scheduler_file = folder / SCHEDULER_FILE
    scheduler: Mapping[str, Any] = HO_SCHEDULER
    if scheduler_file.is_file():
        scheduler = read_json(scheduler_file)
        try:
            scheduler_knobs(scheduler)
        except ConfigError as error:
            raise ConfigError(f"{str(scheduler_file)!r}: {error}") from None
    else:
        notes.append(f"no {SCHEDULER_FILE}: took that of Ho et al. 2020 (linear, 1000 timesteps, predicts the noise)")
    unknown = unknown_keys(unet, UNET_DEFAULTS) + unknown_keys(scheduler, SCHEDULER_DEFAULTS)
    if unknown:
        notes.append(f"keys that Diffusers does not know were passed over: {', '.join(unknown)[:300]}")

    embeddings = unet.get("num_class_embeds") or 0
    class_names, has_null_class = read_classes(folder, embeddings, null_class)
    return DiffusersModel(unet, scheduler, read_weights(place, notes), class_names, has_null_class, notes)


def read_classes(folder: Path, embeddings: int, null_class: bool) -> tuple[tuple[str, ...], bool]:
    """The classes' names, and whether one more embedding stands for "no class"."""
    if null_class and embeddings < 2:
        raise ConfigError(f"--null-class: the model has num_class_embeds = {embeddings}; expected at least 2")
    file = folder / CLASSES_FILE
    if not embeddings or not file.is_file():
        return tuple(map(str, range(embeddings - null_class))), null_class
    content = read_json(file)
    names, has_null_class = content.get("classes"), content.get("null_class")
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(name, str) for name in names)
        or not isinstance(has_null_class, bool)
        or len(names) + has_null_class != embeddings
    ):
        raise ConfigError(f"{str(file)!r}: does not name the classes of num_class_embeds = {embeddings}; delete it")
    return tuple(names), has_null_class


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ConfigError(f"{str(file)!r}: cannot be read as a JSON object")
    return content


def read_weights(folder: Path, notes: list[str]) -> dict[str, Tensor]:
    """The weights of a UNet2DModel in float32, under today's names; nothing in the file is run."""
    file = next((folder / name for name in WEIGHTS_FILES if (folder / name).is_file()), None)
    if file is None:
        raise ConfigError(f"{str(folder)!r}: no weights here (expected {' or '.join(WEIGHTS_FILES)})")
    try:
        if file.suffix == ".safetensors":
            tensors = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{str(file)!r}: cannot be read as weights: {reason}") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ConfigError(f"{str(file)!r}: cannot be read as weights: expected tensors by name")
    try:
        modern = modern_tensors(tensors)
    except ConfigError as error:
        raise ConfigError(f"{str(file)!r}: {error}") from None
    kinds = sorted({str(tensor.dtype) for tensor in modern.values()} - {"torch.float32"})
    if kinds:
        notes.append(f"weights of type {', '.join(kinds)} become torch.float32")
    return {name: tensor.float().contiguous() for name, tensor in modern.items()}


def diffusers_network(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[nn.Module, list[str]]:
    """Diffusers' network with some weights, and the names among these that it does not know.

    Raises:
        ConfigError: if weights are missing, or of other shapes.
    """
    from diffusers import UNet2DModel

    known = {key: value for key, value in config.items() if key in UNET_DEFAULTS}
    with torch.device("meta"):  # Without memory until the shapes are known to be those of the weights.
        network: Any = UNet2DModel(**known)
    expected = network.state_dict()
    missing = sorted(set(expected) - set(tensors))
    if missing:
        raise ConfigError(f"{missing[0]!r}: this weight of the UNet2DModel is missing ({len(missing)} are)")
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            raise ConfigError(
                f"{name!r}: has the shape {list(tensors[name].shape)}; expected {list(tensor.shape)} by {UNET_FILE}"
            )
    network.load_state_dict({name: tensors[name] for name in expected}, assign=True)
    return network.eval(), sorted(set(tensors) - set(expected))


def our_network(config: CoreConfig, num_classes: int, source: DiffusersModel) -> UNet:
    """Our network with Diffusers' weights; an embedding for "no class" that it does not have is zero."""
    channels, size, _ = config.data.image_shape
    with torch.device("meta"):
        network = UNet(config.model, size, channels, num_classes)
    tensors = {name: source.tensors[diffusers_name(name)] for name in network.state_dict()}
    if num_classes and not source.has_null_class:
        known_CE = tensors["label_embedding.weight"]
        tensors["label_embedding.weight"] = torch.cat([known_CE, known_CE.new_zeros(1, known_CE.shape[1])])
    network.load_state_dict(tensors, assign=True)
    return network.eval()


def export_model(arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Write the DDPMPipeline of a checkpoint into ``folder``; yields what is to be told."""
    from diffusers import DDPMPipeline, DDPMScheduler

    checkpoint = read_checkpoint(arguments.source)
    if arguments.weights not in checkpoint.parts:
        raise CheckpointError(f"--weights = {arguments.weights!r}: {str(checkpoint.path)!r} does not hold them")
    if checkpoint.metadata["structure"]:
        raise CheckpointError(
            f"{str(checkpoint.path)!r}: channels of {len(checkpoint.metadata['structure'])} layers were removed, and a "
            "UNet2DModel has one width a resolution; expected a dense network, or one pruned by masks"
        )
    config, network = checkpoint.config(), checkpoint.network(arguments.weights)
    has_null_class = network.num_classes > 0 and config.train.label_dropout > 0
    label = pick_label(arguments.label, checkpoint, has_null_class)

    settings = unet_config(network, config.model)
    tensors = dict(network.state_dict())
    labels = [*range(network.num_classes), *([NO_LABEL] if has_null_class else [])]
    if network.num_classes:
        embeddings_CE = tensors.pop("label_embedding.weight")
        if label is None:
            tensors["label_embedding.weight"] = embeddings_CE = embeddings_CE[: len(labels)]
            settings["num_class_embeds"] = len(embeddings_CE)
        else:
            labels = [label]
            tensors["time_mlp.2.bias"] = tensors["time_mlp.2.bias"] + embeddings_CE[label]  # NO_LABEL: the last one.
    unet, _ = diffusers_network(settings, {diffusers_name(name): tensor for name, tensor in tensors.items()})
    difference = compare(network, unet, labels)
    kept = checkpoint.metadata["extra"].get(EXTRA)
    scheduler = scheduler_config(config) | (fewer_steps(kept) if isinstance(kept, dict) else {})
    compare_schedules(config, scheduler)

    pipeline: Any = DDPMPipeline(unet, DDPMScheduler(**scheduler))
    pipeline.save_pretrained(folder)
    if network.num_classes and label is None:
        names = list(checkpoint.class_names[: network.num_classes])
        content = json.dumps({"classes": names, "null_class": has_null_class}, indent=1)
        (folder / CLASSES_FILE).write_text(content, encoding="utf-8")
    yield f"{arguments.target}: {describe(network)}; differs from the checkpoint by at most {difference:.1e}"
    if config.diffusion.timesteps < PIPELINE_STEPS:
        timesteps = config.diffusion.timesteps
        yield f"note: DDPMPipeline takes {PIPELINE_STEPS} steps unless told: pipeline(num_inference_steps={timesteps})"
    if network.num_classes and label is None:
        null = f' ({network.num_classes} is "no class")' if has_null_class else ""
        yield (
            f"note: DDPMPipeline passes no labels, so pipeline() fails until unet.forward is given class_labels of 0 "
            f"to {len(labels) - 1}{null}: --help shows how; or export a single class with --label"
        )


def pick_label(text: str | None, checkpoint: Checkpoint, has_null_class: bool) -> int | None:
    """The class that ``--label`` names, by number or name; None for all of them."""
    if text is None:
        return None
    number = checkpoint.metadata["num_classes"]
    if not number:
        raise ConfigError(f"--label = {text!r}: the model knows no labels; leave it out")
    if text == "none":
        if not has_null_class:
            raise ConfigError("--label = 'none': the model never saw an image without label (train.label_dropout = 0)")
        return NO_LABEL
    names = {name: label for label, name in enumerate(checkpoint.class_names)}
    label = int(text) if text.isdecimal() else names.get(text, number)
    if label >= number:
        shown = ", ".join(checkpoint.class_names[:20])
        raise ConfigError(f"--label = {text!r}: expected none, or one of 0 to {number - 1} or of {shown}")
    return label


def describe(network: UNet) -> str:
    weights = sum(parameter.numel() for parameter in network.parameters())
    classes = f"{network.num_classes} classes" if network.num_classes else "no classes"
    return f"{weights:,} weights, {classes}, images of {network.in_channels} x {network.image_size}^2"


@torch.no_grad()
def compare(ours: UNet, theirs: Any, labels: Sequence[int]) -> float:
    """The largest difference of two networks' outputs, on noise and timesteps that never change.

    Args:
        ours: our network.
        theirs: Diffusers' network, whose class embeddings, if any, are ours in their order, "no class" last.
        labels: classes to look at: the first and last of them.

    Raises:
        ConfigError: if it is more than rounding.
    """
    source = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(2, ours.in_channels, ours.image_size, ours.image_size, generator=source)
    t_B = torch.tensor([0, 987])
    labels_B = torch.tensor([labels[0], labels[-1]]) if labels else None
    given = {}
    if theirs.class_embedding is not None and labels_B is not None:
        given["class_labels"] = torch.where(labels_B < 0, ours.num_classes, labels_B)
    expected, found = theirs(x_BCHW, t_B, **given).sample, ours(x_BCHW, t_B, labels_B)
    difference = (expected - found).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
        raise ConfigError(
            f"the two networks disagree by {difference:.1e} on the same noise: this network is something else in "
            "Diffusers, or its weights are not finite"
        )
    return difference


def compare_schedules(config: CoreConfig, scheduler: Mapping[str, Any]) -> None:
    """Raises ConfigError if Diffusers' noise schedule is another one."""
    from diffusers import DDPMScheduler

    known = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
    )
    theirs: Any = DDPMScheduler(**{key: scheduler[key] for key in known if key in scheduler})
    ours = build_schedule(config.diffusion).alphas.square()
    difference = (theirs.alphas_cumprod.double() - ours).abs().max().item()
    if not difference <= SCHEDULE_TOLERANCE:
        raise ConfigError(f"the two noise schedules disagree by {difference:.1e} in their share of signal")


if __name__ == "__main__":
    sys.exit(main())
