"""Run one trial: train, prune, continue training, evaluate, and write checkpoints and the result."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from agent.config import TrialConfig
from agent.tracking.artifacts import open_source
from diffusion_core.choice import announce
from diffusion_core.config import flatten
from diffusion_core.data.datasets import Dataset, in_recorded_order
from diffusion_core.data.fingerprint import describe_changed, describe_data, say_others
from diffusion_core.distributed import first_process_first, make_accelerator
from diffusion_core.evaluation.generated import costs_of_images
from diffusion_core.evaluation.protocol import PREFIX
from diffusion_core.files import write_json
from diffusion_core.hardware import pick_device, pick_precision
from diffusion_core.model.unet import UNet, build_network
from diffusion_core.run_folder import (
    CHECKPOINTS,
    DATA_FILE,
    RESULT_FILE,
    SAMPLES,
    best_figures,
    read_history,
    write_run_files,
)
from diffusion_core.runs.inputs import TEACHER_KEY
from diffusion_core.runs.recorded import best_summary
from diffusion_core.runs.result import TrialResult, write_result
from diffusion_core.sampling.generation import Generator
from diffusion_core.sampling.lows import held_out
from diffusion_core.step_distillation.phase import figures_prefix
from diffusion_core.tracking import Tracker
from diffusion_core.training.callbacks import DrawSamples, LogHistory, SayDuration, WatchQuality
from diffusion_core.training.checkpoints import SaveCheckpoints
from diffusion_core.training.evaluation import DENSE, Evaluate
from diffusion_core.training.resume import (
    check_same_labels,
    describe_resumed,
    drawing_as,
    find_checkpoint,
    finish_step,
    is_longer,
    with_labels_of,
)
from diffusion_core.training.stopping import Stopped, StopRequest
from diffusion_core.training.summary import costs_of, system_facts
from diffusion_core.training.teacher import keep_teacher
from diffusion_core.training.trainer import Callback, TrainState
from pruning.channels.reach import check_reach
from pruning.consistency import dense_consistency
from pruning.masks.mask import held_masks
from pruning.pruner import is_pruned, records, resume_pruning
from pruning.start import Source, Start, check_step_teacher, start_from
from pruning.training import train_and_prune


def check_start(config: TrialConfig, num_classes: int) -> Start:
    """Open what a trial starts from, and check all that would fail in the trial only later.

    Raises:
        ConfigError: if a checkpoint has another architecture, or structured pruning cannot reach its target.
        CheckpointError: if a checkpoint cannot be read or downloaded, or lacks the wanted weights.
    """
    source = open_source(config.init.checkpoint, config.init.artifact, "init.")
    start = Start(source, open_source(config.distill.checkpoint, config.distill.artifact, "distill."))
    if start.source or start.teacher:
        start.check(config, num_classes, config.init.weights)
    if source is not None:
        check_step_teacher(source, config, config.steps, config.prune)
    if config.prune.method == "structured":
        check_reach(first_network(config, num_classes, source), config.prune, pick_device(config.train))
    return start


def first_network(config: TrialConfig, num_classes: int, source: Source | None) -> UNet:
    """Return the network before the first step, on the CPU: new, or that of the checkpoint to start from."""
    return build_network(config, num_classes) if source is None else source.checkpoint.network(config.init.weights)


def start_state(
    config: TrialConfig, dataset: Dataset, tracker: Tracker, accelerator: Accelerator
) -> tuple[TrainState, Dataset]:
    """Return the state before the first step: new weights, or those of the checkpoint that ``init.*`` names.

    Also return the images, with the labels of that checkpoint and of the teacher's.

    Raises:
        ConfigError: as :func:`check_start`, or if the labels of a checkpoint are others.
        CheckpointError: as :func:`check_start`.
    """
    with first_process_first(accelerator):  # The first process downloads, the others read its files.
        start = check_start(config, dataset.num_classes)
    source, teacher = start.source, start.teacher
    if source is None:
        network = build_network(config, dataset.num_classes).to(accelerator.device)
        state = TrainState.start(network, config.train, config.ema)
    else:
        state = start_from(source, config, dataset.num_classes, config.init.weights, accelerator.device)
    if teacher is not None:
        keep_teacher(state, teacher.checkpoint.network(), config.model)
        state.extra_metadata[TEACHER_KEY] = teacher.parent()
    for used in filter(None, (source, teacher)):
        dataset = in_recorded_order(dataset, config.data, used.checkpoint.class_names)
        announce(used.checkpoint)
        if accelerator.is_main_process:
            say_others(used.checkpoint.metadata, config.data.name, dataset, str(used.checkpoint.path))
        if used.artifact is not None:
            tracker.use(used.artifact)
    if source is not None and teacher is not None:
        check_same_labels(source.checkpoint, teacher.checkpoint)
    return state, dataset


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
    """Train, prune, evaluate and log one model. Resume from the newest checkpoint in the run's folder.

    Args:
        config: every knob.
        tracker: receives figures. The caller closes it.
        dataset: the images that ``config.data`` names.
        folder: the run's folder: checkpoints, pictures, history, configuration, result.
        run_id: names the artifacts.
        stop: checked after every step. A checkpoint is written before stopping.
        accelerator: processes and devices; None: make one.
        start: makes the state of a new run; None: :func:`start_state`.
        callbacks: called in this process after every step, before all others.

    Raises:
        ConfigError: if the folder holds a run of another configuration.
        CheckpointError: if a checkpoint cannot be read or written.
        TrainingDiverged: if the loss is not finite. Earlier checkpoints stay.
        Stopped: if ``stop`` was requested.
    """
    started = time.perf_counter()
    accelerator = accelerator or make_accelerator(config.train)
    is_main = accelerator.is_main_process
    resumed = find_checkpoint(config, folder / CHECKPOINTS, longer=True, together=True)
    if resumed is not None:
        config = drawing_as(config, resumed.metadata["config"])
        torch.set_num_threads(resumed.metadata.get("threads", torch.get_num_threads()))
        state = TrainState.restore(resumed, config.train, config.ema, accelerator.device)
        resume_pruning(state)
        dataset = with_labels_of(resumed, config.data, dataset)
    elif start is not None:
        state = start()
    else:
        state, dataset = start_state(config, dataset, tracker, accelerator)

    def prefix(state: TrainState) -> str:
        if config.prune.method != "none" and not is_pruned(state):
            return DENSE
        return figures_prefix(state, config.steps)

    saver = SaveCheckpoints(config, dataset, tracker, folder / CHECKPOINTS, run_id, resumed)
    pictures = DrawSamples(config, dataset, accelerator, folder / SAMPLES)
    stopping = [] if stop is None else [stop.check]
    evaluate = Evaluate(config, dataset, accelerator, tracker, folder, prefix, pictures, *stopping)
    after_step: list[Callback] = [*callbacks, evaluate]
    if is_main:
        write_run_files(config, folder, run_id)
        history = LogHistory(tracker, folder, resumed)
        if resumed is not None:
            if is_longer(config, resumed.metadata["config"]):
                (folder / RESULT_FILE).unlink(missing_ok=True)  # It is of the shorter run.
            print(describe_resumed(config, resumed), file=sys.stderr)
        described = describe_data(config.data.name, dataset)
        if resumed is not None and (note := describe_changed(folder / DATA_FILE, described)):
            print(note, file=sys.stderr)
        write_json(folder / DATA_FILE, described)
        if resumed is None:
            tracker.use(f"data-{config.data.name}", "dataset", [folder / DATA_FILE])
        after_step += [
            SayDuration(config.train, accelerator.device),
            pictures,
            WatchQuality(config.checkpoint.best_metric, read_history(folder), tracker),
            history,
            saver,
        ]
        tracker.summary(system_facts(config.train, accelerator, dataset, ("torch", "accelerate", "wandb")))
    after_step += stopping
    try:
        finish_step(state, resumed, after_step)
        train_and_prune(
            state, config, config.prune, config.distill, config.steps, dataset, after_step, saver, accelerator
        )
    except Stopped:
        state.since_row.share(accelerator)
        if is_main:
            saver.save_stopped(state, evaluate.unfinished)
        raise
    finally:
        if is_main and not tracker.live:
            saver.log_kept()
    result = None
    if is_main:
        alike = dense_consistency(state, config)
        costs = costs_of(state.network, state.ema.network, saver.best_path, held_masks(state))
        if pruned := records(state):
            costs["prune/sparsity"] = pruned[-1]["sparsity"]
        precision, lows = pick_precision(config.train, accelerator.device), held_out(dataset, config.upsample)
        generator = Generator(state.ema.network, config, precision, lows=lows)
        costs |= alike.figures | costs_of_images(generator, state.sampling(config.sample))
        protocols = {f"{PREFIX}{name}": line for name, line in alike.protocols.items()}
        tracker.summary(costs | protocols | best_summary(saver.best_path))
        figures = best_figures(read_history(folder)) | costs
        result = TrialResult(run_id, state.step, figures, saver.best_path, time.perf_counter() - started)
        write_result(folder, result, flatten(config))
    (result,) = broadcast_object_list([result])
    assert result is not None
    return result
