"""Convert a checkpoint to a Diffusers pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusion_core.checkpoint import STUDENT, Checkpoint, CheckpointError
from diffusion_core.choice import announce, check_weights, choose
from diffusion_core.config import ConfigError
from diffusion_core.diffusers_io.layout import unet_config
from diffusion_core.diffusers_io.names import to_diffusers
from diffusion_core.diffusers_io.networks import compare, compare_schedules, describe, diffusers_network
from diffusion_core.diffusers_io.scheduler import EXTRA, fewer_steps, scheduler_config
from diffusion_core.diffusers_io.source import CLASSES_FILE
from diffusion_core.model.unet import NO_LABEL
from diffusion_core.sampling.labels import find_label
from diffusion_core.tracking import BEST

PIPELINE_STEPS = 1000


def export_model(
    path: Path, folder: Path, *, weights: str = "ema", label: str | None = None, which: str = BEST
) -> Iterator[str]:
    """Write the DDPMPipeline of a checkpoint into ``folder``; yields a description of the network, then notes.

    Args:
        path: a checkpoint, or a run's folder.
        folder: an empty folder.
        weights: part of the checkpoint to export, ``ema`` or ``model``.
        label: class of a class-conditional model to export, by number or name, or ``none``; None exports all.
        which: checkpoint of a run's folder, for :func:`diffusion_core.choice.choose`.

    Raises:
        CheckpointError: if the checkpoint cannot be read, or its network cannot be a UNet2DModel; the message names the
            knob or the layer.
        ConfigError: if Diffusers cannot represent the noise schedule, or the model has no such label.
    """
    from diffusers import DDPMPipeline, DDPMScheduler

    checkpoint = choose(path, which)
    check_weights(checkpoint, weights)
    config, network = checkpoint.config(), checkpoint.network(weights)
    if STUDENT in checkpoint.metadata["extra"]:
        raise CheckpointError(
            f"{str(checkpoint.path)!r}: DDPMPipeline cannot sample a student of {config.sample.steps} steps with "
            f"{config.sample.sampler}; export its teacher, or write a file that samples it with scripts/export_model.py"
        )
    has_null_class = network.num_classes > 0 and config.train.label_dropout > 0
    only = pick_label(label, checkpoint, has_null_class)

    try:
        settings = unet_config(network, config.model)
    except ConfigError as error:
        raise CheckpointError(f"{str(checkpoint.path)!r}: {error}") from None
    tensors = dict(network.state_dict())
    labels = [*range(network.num_classes), *([NO_LABEL] if has_null_class else [])]
    if network.num_classes:
        embeddings_CE = tensors.pop("label_embedding.weight")
        if only is None:
            tensors["label_embedding.weight"] = embeddings_CE = embeddings_CE[: len(labels)]
            settings["num_class_embeds"] = len(embeddings_CE)
        else:
            labels = [only]
            tensors["time_mlp.2.bias"] = tensors["time_mlp.2.bias"] + embeddings_CE[only]  # NO_LABEL is the last.
    unet, _ = diffusers_network(settings, to_diffusers(tensors))
    difference = compare(network, unet, labels)
    kept = checkpoint.metadata["extra"].get(EXTRA)
    scheduler = scheduler_config(config) | (fewer_steps(kept) if isinstance(kept, dict) else {})
    compare_schedules(config, scheduler)

    pipeline: Any = DDPMPipeline(unet, DDPMScheduler(**scheduler))
    pipeline.save_pretrained(folder)
    announce(checkpoint)
    if network.num_classes and only is None:
        names = list(checkpoint.class_names[: network.num_classes])
        content = json.dumps({"classes": names, "null_class": has_null_class}, indent=1)
        (folder / CLASSES_FILE).write_text(content, encoding="utf-8")
    yield f"{describe(network)}; differs from the checkpoint by at most {difference:.1e}"
    if (steps := config.diffusion.timesteps) < PIPELINE_STEPS:
        yield f"note: DDPMPipeline takes {PIPELINE_STEPS} steps by default; use pipeline(num_inference_steps={steps})"
    if network.num_classes and only is None:
        null = f' ({network.num_classes} is "no class")' if has_null_class else ""
        yield (
            f"note: DDPMPipeline passes no labels, so pipeline() fails unless unet.forward gets class_labels of 0 to "
            f"{len(labels) - 1}{null}: see --help; or export a single class with --label"
        )


def pick_label(text: str | None, checkpoint: Checkpoint, has_null_class: bool) -> int | None:
    """Return the class that ``--label`` names, by number or name; None for all classes."""
    if text is None:
        return None
    number = checkpoint.metadata["num_classes"]
    if not number:
        raise ConfigError(f"--label = {text!r}: the model has no classes; leave it out")
    if text == "none":
        if not has_null_class:
            raise ConfigError("--label = 'none': the model was trained with train.label_dropout = 0; name a class")
        return NO_LABEL
    return find_label("--label", text, checkpoint.class_names[:number], "none, or one")
