"""Run one trial: train, prune, train on, evaluate, and write checkpoints and a result."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list

from agent.config import TrialConfig
from agent.start import PARENT_KEY, start_state
from agent.summary import costs_of, describe_data, system_facts
from agent.tracking.environment import belongs_here
from diffusion_core.config import ConfigError, flatten, to_yaml
from diffusion_core.data.batches import Batches
from diffusion_core.data.datasets import Dataset
from diffusion_core.evaluation.protocol import PREFIX
from diffusion_core.files import write_json, write_text
from diffusion_core.hardware import pick_device
from diffusion_core.redact import redact, redacted
from diffusion_core.run_folder import (
    CHECKPOINTS,
    CONFIG_FILE,
    DATA_FILE,
    ENVIRONMENT,
    RESULT_FILE,
    RUN_FILE,
    SAMPLES,
    best_figures,
    read_history,
    read_run_file,
)
from diffusion_core.tracking import Tracker
from diffusion_core.training.callbacks import DrawSamples, LogHistory, WatchQuality
from diffusion_core.training.checkpoints import SaveCheckpoints
from diffusion_core.training.evaluation import Evaluate
from diffusion_core.training.resume import find_checkpoint
from diffusion_core.training.stopping import Stopped, StopRequest
from diffusion_core.training.teacher import distillation_of, keep_dense_as_teacher
from diffusion_core.training.trainer import Callback, TrainState, train
from pruning.calibration import Calibration
from pruning.consistency import KeepDenseImages, dense_consistency
from pruning.masks.gradual import GradualPruning, Ramp
from pruning.pruner import is_pruned, prune_state, resume_pruning


@dataclass(frozen=True)
class TrialResult:
    """What a trial came to.

    Attributes:
        run_id: the run's id.
        step: optimizer steps done.
        figures: the best value of each figure that has a goal, the last value of all others, and the costs.
        best_checkpoint: folder of the best checkpoint.
        seconds: wall time of this process's part of the trial.
    """

    run_id: str
    step: int
    figures: dict[str, float]
    best_checkpoint: Path
    seconds: float


def make_accelerator(config: TrialConfig) -> Accelerator:
    """Processes and devices as ``accelerate launch`` set them up. Precision is ours alone (``train.precision``)."""
    # Gradients lie in the buckets that processes exchange: no copy of them is kept or made. A graph that is declared
    # static serves unused parameters and activations that are computed twice; there are none here.
    exchange = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    cpu = pick_device(config.train).type == "cpu"
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[exchange])
    if config.train.batch_size == "auto":  # Will be a share a process.
        return accelerator
    share, remainder = divmod(config.train.images_per_step, accelerator.num_processes)
    if remainder or share % config.train.accumulation:
        raise ConfigError(
            f"train.batch_size = {config.train.batch_size}: must be a multiple of the number of processes "
            f"({accelerator.num_processes}) times train.accumulation ({config.train.accumulation})"
        )
    if config.prune.method == "structured" and config.prune.target == "latency" and accelerator.num_processes > 1:
        raise ConfigError(
            "prune.target = 'latency': every process would measure another one; expected channels, params or macs, or "
            "scripts/prune.py on one device"
        )
    return accelerator


def run_trial(
    config: TrialConfig,
    tracker: Tracker,
    *,
    dataset: Dataset,
    folder: Path,
    run_id: str,
    stop: StopRequest | None = None,
    accelerator: Accelerator | None = None,
    start: Callable[[], TrainState] | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrialResult:
    """Train, prune, evaluate and log one model; continues where the run's folder left off.

    Args:
        config: every knob.
        tracker: where figures go; the caller closes it.
        dataset: the images that ``config.data`` names.
        folder: the run's folder: checkpoints, pictures, history, configuration, result.
        run_id: names the artifacts.
        stop: asked after every step whether to stop; a checkpoint is written first.
        accelerator: None makes one.
        start: makes the training state that a run begins with; None: that of a network drawn from the seed.
        callbacks: called in this process after every step, before all others.

    Raises:
        ConfigError: if the folder holds a run of another configuration.
        CheckpointError: if a checkpoint cannot be read or written.
        TrainingDiverged: if the loss is no number any more; earlier checkpoints stay.
        Stopped: if ``stop`` asked for it.
    """
    started = time.perf_counter()
    accelerator = accelerator or make_accelerator(config)
    checkpoints = folder / CHECKPOINTS
    resumed = find_checkpoint(config, checkpoints)
    if resumed is not None:
        state = TrainState.restore(resumed, config, accelerator.device)
        resume_pruning(state)
    elif start is not None:
        state = start()
    else:
        state = start_state(config, dataset, tracker, accelerator)

    saver = SaveCheckpoints(config, dataset, tracker, checkpoints, run_id, resumed)

    def is_dense(state: TrainState) -> bool:
        return config.prune.method != "none" and not is_pruned(state)

    after_step: list[Callback] = [
        *callbacks,
        Evaluate(config, dataset, accelerator, tracker, folder, is_dense),
    ]
    if accelerator.is_main_process:
        write_run_files(config, folder, run_id)
        write_json(folder / DATA_FILE, describe_data(config, dataset))
        if resumed is None:
            tracker.use(f"data-{config.data.name}", "dataset", [folder / DATA_FILE])
        after_step += [
            DrawSamples(config, dataset, accelerator, folder / SAMPLES),
            WatchQuality(config.checkpoint.best_metric, saver.best["value"] if saver.best else None, tracker),
            LogHistory(tracker, folder, resumed),
            saver,
        ]
        tracker.summary(system_facts(config, accelerator, dataset))
    if stop is not None:
        after_step.append(stop.check)

    try:
        train_and_prune(state, config, dataset, after_step, saver, accelerator)
    except Stopped:
        if accelerator.is_main_process:
            saver.save(state)
        raise
    finally:
        if accelerator.is_main_process and not tracker.live:
            saver.log_kept()
    result = None
    if accelerator.is_main_process:
        alike = dense_consistency(state, config)
        costs = costs_of(state, saver.best_path) | alike.figures
        tracker.summary(costs | {f"{PREFIX}{name}": line for name, line in alike.protocols.items()})
        figures = best_figures(read_history(folder)) | costs
        result = TrialResult(run_id, state.step, figures, saver.best_path, time.perf_counter() - started)
        described = asdict(result) | {"best_checkpoint": str(result.best_checkpoint), "config": flatten(config)}
        write_json(folder / RESULT_FILE, redacted(described))
    (result,) = broadcast_object_list([result])
    assert result is not None
    return result


def write_run_files(config: TrialConfig, folder: Path, run_id: str) -> None:
    """Write what a run's folder says of the run itself: its id and its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    belongs = read_run_file(folder).get(ENVIRONMENT, {}) | belongs_here()
    write_json(folder / RUN_FILE, read_run_file(folder) | {"id": run_id, ENVIRONMENT: belongs})
    write_text(folder / CONFIG_FILE, redact(to_yaml(config)))


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
        if config.prune.is_gradual:
            ramp = Ramp(config.prune_step, config.prune_until, config.prune.interval)
            before.insert(0, GradualPruning(ramp, config, config.prune))
        if accelerator.is_main_process:
            keep_images = KeepDenseImages(config, config.prune_step, from_parent=PARENT_KEY in state.extra_metadata)
            keep_images(state, {})  # The step before the pruning may be done.
            before.insert(0, keep_images)
        _train(state, batches, config, before, accelerator, config.prune_until)
        keep_dense_as_teacher(state, config.model, config.distill)
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
    distillation = distillation_of(state, config.model, config.train, config.distill)
    train(state, batches, config, callbacks, accelerator=accelerator, until=until, distillation=distillation)
    if distillation is not None:
        distillation.close()
