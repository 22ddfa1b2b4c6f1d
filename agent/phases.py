"""The phases of a trial: train, prune, train on."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from accelerate import Accelerator

from agent.checkpoints import SaveCheckpoints
from agent.config import TrialConfig
from agent.consistency import KeepDenseImages
from agent.start import PARENT_KEY
from agent.teacher import distillation_of, keep_dense_as_teacher
from diffusion_core.data import Batches, Dataset
from diffusion_core.trainer import Callback, TrainState, train
from pruning.calibration import Calibration
from pruning.gradual import GradualPruning, Ramp
from pruning.pruner import is_pruned, prune_state


def warn_of_empty_layers(layers: Sequence[str]) -> None:
    """One line if layers are left without any weight."""
    if layers:
        print(
            f"warning: pruning left no weight in {len(layers)} layers ({', '.join(layers[:5])}"
            f"{', ...' if len(layers) > 5 else ''}); prune.scope=layer keeps some in each",
            file=sys.stderr,
        )


def train_and_prune(
    state: TrainState,
    config: TrialConfig,
    dataset: Dataset,
    callbacks: Sequence[Callback],
    saver: SaveCheckpoints,
    accelerator: Accelerator,
) -> None:
    """Train to the pruning, prune, and train on; without pruning, train."""
    batches = Batches(
        dataset.train,
        batch_size=config.train.images_per_step,
        seed=config.seed,
        horizontal_flip=config.data.flips,
        device=accelerator.device,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    if config.prune.method != "none" and not is_pruned(state):
        before = list(callbacks)
        if config.prune.method == "gradual":
            ramp = Ramp(config.prune_step, config.prune_until, config.prune.interval)
            before.insert(0, GradualPruning(ramp, config, config.prune))
        if accelerator.is_main_process:
            keep_images = KeepDenseImages(config, from_parent=PARENT_KEY in state.extra_metadata)
            keep_images(state, {})  # The step before the pruning may be done.
            before.insert(0, keep_images)
        _train(state, batches, config, before, accelerator, config.prune_until)
        keep_dense_as_teacher(state, config)
        calibration = None
        if config.prune.needs_images:
            progress = config.log.progress and accelerator.is_main_process
            calibration = Calibration.of(dataset.train, config, accelerator.device, progress)
        report = prune_state(state, config, config.prune, calibration)
        saver.forget_best()
        if PARENT_KEY in state.extra_metadata and accelerator.is_main_process:
            saver.save_pruned(state)
        if accelerator.is_main_process:
            print(
                f"pruned at step {report.step} ({report.method}): sparsity {report.sparsity:.4f}, parameters "
                f"{report.before.nonzero_params:,} -> {report.after.nonzero_params:,}, MACs {report.before.macs:,} -> "
                f"{report.after.macs:,}"
            )
            warn_of_empty_layers(report.details.get("empty_layers", []))
    _train(state, batches, config, callbacks, accelerator, config.train.steps)


def _train(
    state: TrainState,
    batches: Batches,
    config: TrialConfig,
    callbacks: Sequence[Callback],
    accelerator: Accelerator,
    until: int,
) -> None:
    """Train, with a teacher if the state has one."""
    distillation = distillation_of(state, config)
    train(state, batches, config, callbacks, accelerator=accelerator, until=until, distillation=distillation)
    if distillation is not None:
        distillation.close()
