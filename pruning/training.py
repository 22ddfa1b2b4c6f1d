"""Train to the pruning step, prune, continue training, and distil a student that samples in few steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from accelerate import Accelerator

from diffusion_core.config import CoreConfig, DistillConfig, StepsConfig
from diffusion_core.data.batches import Batches
from diffusion_core.data.datasets import Dataset
from diffusion_core.runs.inputs import PARENT_KEY
from diffusion_core.sampling.lows import HeldOut, held_out
from diffusion_core.step_distillation.phase import distil_steps, is_student
from diffusion_core.terminal.progress import say
from diffusion_core.training.checkpoints import SaveCheckpoints
from diffusion_core.training.learning_rate import Phase
from diffusion_core.training.teacher import distillation_of, keep_dense_as_teacher
from diffusion_core.training.trainer import Callback, TrainState, train
from pruning.calibration import Calibration
from pruning.config import PruneConfig, listens_to, steps_start
from pruning.consistency import KeepDenseImages
from pruning.masks.gradual import GradualPruning, Ramp
from pruning.masks.regrowth import Regrowth
from pruning.pruner import PruneReport, is_pruned, prune_state


def train_and_prune(
    state: TrainState,
    config: CoreConfig,
    prune: PruneConfig,
    distill: DistillConfig,
    steps: StepsConfig,
    dataset: Dataset,
    callbacks: Sequence[Callback],
    saver: SaveCheckpoints,
    accelerator: Accelerator,
) -> None:
    """Train to the pruning step, prune, continue training, and distil a student, as far as the configuration says.

    Args:
        state: changed in place.
        config: the run's configuration.
        prune: the pruning section.
        distill: the distillation section.
        steps: the section of step distillation.
        dataset: the images.
        callbacks: called after every step.
        saver: writes the run's checkpoints.
        accelerator: processes and devices.
    """
    batches = Batches(
        dataset.train,
        batch_size=config.train.images_per_step,
        seed=config.seed,
        draws=config.draws,
        horizontal_flip=config.data.flips,
        device=accelerator.device,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    last, phase = config.train.steps, None
    if steps.wanted:
        last = steps_start(steps, prune, last, from_parent=PARENT_KEY in state.extra_metadata)
        phase = Phase(0, last, config.train.lr, config.train.warmup_steps)
    train_until = partial(_train, state, batches, config, distill, accelerator, phase)
    calibration = None
    if prune.needs_images and (prune.regrows or not is_pruned(state)):
        progress = config.log.progress and accelerator.is_main_process
        calibration = Calibration.of(dataset.train, config, accelerator.device, progress, accelerator.num_processes)
    if prune.method != "none" and not is_pruned(state):
        before = _before_pruning(state, config, prune, accelerator, held_out(dataset, config.upsample))
        start, end = prune.start(config.train.steps), prune.end(config.train.steps)
        if prune.is_gradual and distill.wanted:
            train_until([*before, *callbacks], start)
            if state.step == start:  # Else a run of an earlier version goes on within gradual pruning, not taught yet.
                keep_dense_as_teacher(state, config.model, distill)
        train_until([*before, *callbacks], end)
        keep_dense_as_teacher(state, config.model, distill)
        report = prune_state(state, config, prune, calibration)
        saver.forget_best()
        if accelerator.is_main_process:
            if PARENT_KEY in state.extra_metadata:
                saver.save_pruned(state)
            _print_report(report)
    moving = [_regrowth(config, prune, calibration)] if prune.regrows else []
    if not steps.wanted:
        train_until([*moving, *callbacks], last)
        return
    if not is_student(state):
        train_until([*moving, *callbacks], last)
        if accelerator.is_main_process and last:
            saver.save_teacher(state)
    distil_steps(state, batches, config, steps, last, callbacks, accelerator, saver.forget_best)


def _before_pruning(
    state: TrainState, config: CoreConfig, prune: PruneConfig, accelerator: Accelerator, lows: HeldOut | None
) -> list[Callback]:
    """Return the callbacks that run only until the network is pruned, before all others."""
    callbacks: list[Callback] = []
    start, end = prune.start(config.train.steps), prune.end(config.train.steps)
    if accelerator.is_main_process:
        from_parent = PARENT_KEY in state.extra_metadata
        keep_images = KeepDenseImages(config, start, from_parent=from_parent, lows=lows)
        keep_images(state, {})  # Training may start at the pruning step.
        callbacks.append(keep_images)
    if prune.is_gradual:
        callbacks.append(GradualPruning(Ramp(start, end, prune.interval), config.seed, prune))
    return callbacks


def _regrowth(config: CoreConfig, prune: PruneConfig, calibration: Calibration | None) -> Regrowth:
    """Return the callback that moves masks after pruning."""
    assert calibration is not None  # It needs images.
    start, end = prune.start(config.train.steps), prune.last_change(config.train.steps)
    return Regrowth(calibration, start=start, end=end, interval=prune.interval, alpha=prune.regrow)


def _train(
    state: TrainState,
    batches: Batches,
    config: CoreConfig,
    distill: DistillConfig,
    accelerator: Accelerator,
    phase: Phase | None,
    callbacks: Sequence[Callback],
    until: int,
) -> None:
    """Train to step ``until``, with the state's teacher if it has one."""
    distillation = distillation_of(state, config.model, config.train, distill)
    train(
        state,
        batches,
        config,
        callbacks,
        accelerator=accelerator,
        until=until,
        distillation=distillation,
        phase=phase,
    )
    if distillation is not None:
        distillation.close()


def _print_report(report: PruneReport) -> None:
    print(
        f"pruned at step {report.step} ({report.method}): sparsity {report.sparsity:.4f}, parameters "
        f"{report.before.nonzero_params:,} -> {report.after.nonzero_params:,}, MACs {report.before.macs:,} -> "
        f"{report.after.macs:,}"
    )
    warn_of_empty_layers(report.details.get("empty_layers", []), report.method)


def warn_of_empty_layers(layers: Sequence[str], method: str) -> None:
    """Print one line if pruning with a method removed all weights of some layers, with a remedy that the method takes.

    Args:
        layers: names of the layers.
        method: ``prune.method``.
    """
    if layers:
        shown = ", ".join(layers[:5]) + (", ..." if len(layers) > 5 else "")
        if "scope" in listens_to(method):
            remedy = "prune.scope=layer keeps some in each"
        else:
            remedy = f"{method} ranks all layers together; keep more with a larger prune.keep"
        say(f"warning: pruning left no weight in {len(layers)} layers ({shown}); {remedy}")
