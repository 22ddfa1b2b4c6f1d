"""Convert a Diffusers model to a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from diffusion_core.checkpoint import write_checkpoint
from diffusion_core.config import CoreConfig, build, flatten
from diffusion_core.diffusers_io.networks import compare, compare_schedules, describe, diffusers_network, our_network
from diffusion_core.diffusers_io.scheduler import EXTRA, fewer_steps, scheduler_defaults
from diffusion_core.diffusers_io.source import find_source, read_diffusers
from diffusion_core.model.unet import NO_LABEL
from diffusion_core.redact import redact, redacted


def import_model(name: str, folder: Path, *, null_class: bool = False, image_size: int | None = None) -> Iterator[str]:
    """Write the checkpoint of a Diffusers model into ``folder``; yields a description of the network, then notes.

    Args:
        name: a folder on disk, or the name of the model on the hub.
        folder: an empty folder.
        null_class: whether the last class stands for "no class" if no file says so.
        image_size: height and width of the images in pixels, if the model does not say.

    Raises:
        ConfigError: if the model cannot be read, or our network cannot represent it; the message names the key.
    """
    source = read_diffusers(find_source(name), null_class, image_size)
    knobs = dict(source.knobs)
    if source.class_names and not source.has_null_class:
        knobs["train.label_dropout"] = 0.0
    config = build(CoreConfig, knobs)
    theirs, unexpected = diffusers_network(source.unet, source.tensors)
    network = our_network(config, len(source.class_names), source.tensors, has_null_class=source.has_null_class)
    labels = [*range(len(source.class_names)), *([NO_LABEL] if source.has_null_class else [])]
    difference = compare(network, theirs, labels)
    compare_schedules(config, source.scheduler)

    metadata = {
        "config": redacted(flatten(config)),
        "image_shape": [network.in_channels, network.image_size, network.image_size],
        "num_classes": network.num_classes,
        "class_names": redacted(list(source.class_names)),
        "structure": {},
        "figures": {},
        "best": None,
        "ema_updates": 0,
        "extra": {EXTRA: {"source": redact(name), **fewer_steps(scheduler_defaults() | dict(source.scheduler))}},
    }
    tensors = dict(network.state_dict())
    written = write_checkpoint(folder / "writing", 0, metadata, {"ema": tensors, "model": tensors})
    for path in written.path.iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(folder / "writing")

    yield f"{describe(network)}; differs from Diffusers by at most {difference:.1e}"
    for note in source.notes:
        yield f"note: {note}"
    if unexpected:
        yield f"note: weights that UNet2DModel does not know are ignored: {', '.join(unexpected)[:300]}"
    if source.class_names and not source.has_null_class:
        yield 'note: the model has no "no class": sample it with labels; guidance needs train.label_dropout above 0'
