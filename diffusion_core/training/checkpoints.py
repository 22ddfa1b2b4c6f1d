"""Write checkpoints at a cadence, delete old ones, and upload them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from diffusion_core.checkpoint import (
    Checkpoint,
    delete_checkpoint,
    list_checkpoints,
    read_checkpoint,
    step_folder,
    step_of,
    write_checkpoint,
)
from diffusion_core.config import CoreConfig, flatten
from diffusion_core.config.metrics import is_better
from diffusion_core.data.datasets import Dataset
from diffusion_core.data.fingerprint import RECORDED, describe_data
from diffusion_core.model.structure import structure
from diffusion_core.redact import redacted
from diffusion_core.run_folder import read_history
from diffusion_core.runs.leftovers import kept_checkpoints
from diffusion_core.runs.recorded import log_checkpoint, model_files
from diffusion_core.tracking import MODEL, Tracker, Upload
from diffusion_core.training.measured import best_kept
from diffusion_core.training.resume import UNFINISHED, unfinished_row
from diffusion_core.training.trainer import TrainState, is_due


def describe(state: TrainState, config: CoreConfig, class_names: Sequence[str]) -> dict[str, Any]:
    """Return a checkpoint's metadata: configuration, network and training state, without figures."""
    network = state.network
    return {
        "config": redacted(flatten(config)),
        "image_shape": [network.in_channels, network.image_size, network.image_size],
        "num_classes": network.num_classes,
        "class_names": redacted(list(class_names)),
        "structure": structure(network, config.model),
        "figures": {},
        "threads": torch.get_num_threads(),  # They decide the last bits of sums on a processor.
        **state.metadata(),
    }


class SaveCheckpoints:
    """Write and upload a checkpoint every ``checkpoint.every`` steps. Keep the newest ones and the best one.

    Args:
        config: configuration of the run.
        dataset: the images, for the names of their classes.
        tracker: receives the artifacts.
        folder: folder of the run's checkpoints.
        run_id: names the artifacts.
        resumed: the checkpoint that the run resumes from, or None.

    Attributes:
        best: metric, value and step of the best checkpoint so far, or None.
        figures: what was measured at the current step.
    """

    def __init__(
        self,
        config: CoreConfig,
        dataset: Dataset,
        tracker: Tracker,
        folder: Path,
        run_id: str,
        resumed: Checkpoint | None,
    ) -> None:
        self.config = config
        self.dataset = dataset
        self.tracker = tracker
        self.folder = folder
        self.run_id = run_id
        self.saved_step = resumed.step if resumed and unfinished_row(resumed) is None else None
        self.best: dict[str, Any] | None = resumed.metadata.get("best") if resumed else None
        metric = config.checkpoint.best_metric
        if resumed and self.best and self.best["metric"] != metric:
            self.best = best_kept(folder, metric, resumed)
        self.figures: dict[str, float] = {}
        reached = resumed.step if resumed else -1
        self._passed_over = {path.name for path in list_checkpoints(folder) if (step_of(path) or 0) > reached}

    def __call__(self, state: TrainState, row: dict[str, Any]) -> None:
        """Keep the row's finite figures, and save if a checkpoint is due."""
        self.figures = {
            key: value for key, value in row.items() if isinstance(value, int | float) and math.isfinite(value)
        }
        if is_due(state.step, self.config.checkpoint.every, self.config.train.steps):
            self.save(state, row.get(self.config.checkpoint.best_metric))

    def save_pruned(self, state: TrainState) -> None:
        """Write a checkpoint of a newly pruned network, and log it as an artifact that the run uses.

        Lineage then leads from the dense model to the pruned one, and on to the models trained from it.
        """
        self.saved_step = None  # The dense network may have been saved at this step.
        self.figures = {}  # They were measured on the dense network.
        self.save(state)
        if self.config.checkpoint.upload:
            self._log_used(f"pruned-{self.run_id}", state)

    def save_teacher(self, state: TrainState) -> None:
        """Write a checkpoint of the network before step distillation, and log it as an artifact that the run uses.

        Lineage then leads from the trained model to its student.
        """
        self.save(state)
        if self.config.checkpoint.upload:
            self._log_used(f"teacher-{self.run_id}", state)

    @cached_property
    def _images(self) -> dict[str, Any]:
        described = describe_data(self.config.data.name, self.dataset)
        return {key: described[key] for key in ("name", "train_images", "val_images", "sha256")}

    def _log_used(self, name: str, state: TrainState) -> None:
        """Log the newest checkpoint as a `model` artifact of a given name, which the run uses."""
        checkpoint = read_checkpoint(self.folder / step_folder(state.step), verify=False)
        self.tracker.artifact(Upload(name, MODEL, model_files(checkpoint), ["latest"], dict(state.extra_metadata)))
        self.tracker.use(name)

    def save_stopped(self, state: TrainState, row: Mapping[str, Any] | None) -> None:
        """Write a checkpoint of a run that a signal stopped.

        Args:
            state: what to save.
            row: the row of this step, if the signal stopped its evaluation; else None. The run that resumes begins with
                that evaluation.
        """
        if row is None:
            self.save(state)
            return
        self.figures = {}  # They were measured at an earlier step.
        self.save(state, more={UNFINISHED: {key: one for key, one in row.items() if isinstance(one, int | float)}})

    def save(
        self, state: TrainState, metric: float | None = None, more: Mapping[str, Any] | None = None
    ) -> Checkpoint | None:
        """Write and upload a checkpoint, and delete old ones. Skip a step that is saved already.

        Args:
            state: what to save.
            metric: value of ``checkpoint.best_metric`` at this step, or None.
            more: further metadata.
        """
        if state.step == self.saved_step:
            return None
        name = self.config.checkpoint.best_metric
        if metric is not None and is_better(name, metric, self.best["value"] if self.best else None):
            self.best = {"metric": name, "value": metric, "step": state.step}
        metadata = describe(state, self.config, self.dataset.class_names)
        metadata |= {"figures": self.figures, "best": self.best, RECORDED: self._images, **(more or {})}
        checkpoint = write_checkpoint(self.folder, state.step, metadata, state.parts())
        self.saved_step = state.step
        self._passed_over.discard(checkpoint.path.name)
        if self.config.checkpoint.upload and self.tracker.live:
            self._log_artifacts(checkpoint)
        self._delete_old()
        return checkpoint

    def log_kept(self) -> None:
        """Upload the checkpoints on the disk, for trackers that are not live."""
        if self.config.checkpoint.upload:
            for path in self._kept():
                self._log_artifacts(read_checkpoint(path, verify=False))

    def _log_artifacts(self, checkpoint: Checkpoint) -> None:
        log_checkpoint(
            self.tracker,
            checkpoint,
            self.run_id,
            is_best=self.best is not None and checkpoint.step == self.best["step"],
            history=read_history(self.folder.parent),
            ttl_days=self.config.checkpoint.ttl_days,
        )

    def _kept(self) -> list[Path]:
        """Return the checkpoints to keep, but for those that the run passed over when it resumed: they are damaged."""
        paths = [path for path in list_checkpoints(self.folder) if path.name not in self._passed_over]
        return kept_checkpoints(paths, self.config.checkpoint.keep, self.best["step"] if self.best else None)

    def _delete_old(self) -> None:
        """Delete the checkpoints that are not kept. Those passed over stay until the run is beyond them."""
        kept = self._kept()
        for path in list_checkpoints(self.folder):
            if path not in kept and (step_of(path) or 0) <= (self.saved_step or 0):
                delete_checkpoint(path)

    def forget_best(self) -> None:
        """Reset :attr:`best`, because pruning changed the network."""
        self.best = None

    @property
    def best_path(self) -> Path:
        """Folder of the best checkpoint; of the newest one if none was measured, or the best is not on the disk."""
        assert self.saved_step is not None
        best = self.folder / step_folder(self.best["step"] if self.best else self.saved_step)
        return best if best.is_dir() else self.folder / step_folder(self.saved_step)
