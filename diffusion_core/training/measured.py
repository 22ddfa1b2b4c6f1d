"""What a run that resumes has measured: its figures must be comparable, and its best checkpoint among those kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_core.checkpoint import Checkpoint, CheckpointError, list_checkpoints, read_checkpoint
from diffusion_core.config import ConfigError, CoreConfig, SampleConfig, flatten
from diffusion_core.config.metrics import is_better
from diffusion_core.evaluation.protocol import sampling_protocol
from diffusion_core.run_folder import CHECKPOINTS, read_history

OF_IMAGES, OF_LOSSES = "eval/", "val/"
"""How the names of figures begin, after ``dense/`` and the like."""

SAMPLING = (*(f"sample.{name}" for name in SampleConfig.model_fields), "upsample.sample_noise")
COUNTED = {"eval.num_images": OF_IMAGES, "eval.val_images": OF_LOSSES}
"""Knobs that say how many images are judged, and the figures of them."""


def check_measured(config: CoreConfig, then: Mapping[str, Any], folder: Path) -> None:
    """Check that a resumed run goes on measuring as it did. Figures that it has not measured yet are free.

    Args:
        config: configuration to resume with.
        then: configuration that the run was started with, by dotted key.
        folder: the run's folder.

    Raises:
        ConfigError: if a figure in the run's history would be measured in another way.
    """
    now = flatten(config)
    changed = {key: kind for key, kind in COUNTED.items() if then.get(key, now[key]) != now[key]}
    changed |= {key: OF_IMAGES for key in SAMPLING if key in then and _samples_differently(config, key, then[key])}
    if not changed:
        return
    names = sorted({name for place in known_places(folder) for row in read_history(place) for name in row})
    for key, kind in changed.items():
        measured = next((name for name in names if f"/{kind}" in f"/{name}"), None)
        if measured is not None:
            raise ConfigError(
                f"{key} = {now[key]!r}: the run in {str(folder)!r} has measured {measured} with {then[key]!r}; set it "
                f"back to continue (scripts/evaluate.py measures checkpoints in other ways), or choose another log.dir"
            )


def known_places(folder: Path) -> list[Path]:
    """Return a run's folder, and its checkpoints: one from elsewhere brings its history and classifier along."""
    return [folder, *reversed(list_checkpoints(folder / CHECKPOINTS))]


def _samples_differently(config: CoreConfig, key: str, then: Any) -> bool:
    """Return whether images that are judged were sampled in another way with an earlier value of a knob."""
    section, _, name = key.partition(".")
    before = config.model_copy(update={section: getattr(config, section).model_copy(update={name: then})})
    lines = {sampling_protocol(one.sample, one.seed, one.upsample) for one in (config, before)}
    return len(lines) > 1


def best_kept(folder: Path, metric: str, resumed: Checkpoint) -> dict[str, Any] | None:
    """Return metric, value and step of the best checkpoint on the disk, by another metric than the run had.

    Only checkpoints of the network that resumes count, not those before it was pruned or distilled.

    Args:
        folder: folder of the run's checkpoints.
        metric: a figure.
        resumed: the checkpoint that the run resumes from.
    """
    best: dict[str, Any] | None = None
    for path in list_checkpoints(folder):
        try:
            found = read_checkpoint(path, verify=False)
        except CheckpointError:
            continue
        value = found.metadata["figures"].get(metric)
        same = found.step <= resumed.step and found.metadata["extra"] == resumed.metadata["extra"]
        if same and value is not None and is_better(metric, value, best["value"] if best else None):
            best = {"metric": metric, "value": value, "step": found.step}
    return best
