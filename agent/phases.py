"""The phases of a trial: train, prune, train on."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import Accelerator

from agent.checkpoints import SaveCheckpoints
from agent.config import TrialConfig
from diffusion_core.data import Batches, Dataset
from diffusion_core.trainer import Callback, TrainState, train
from pruning.pruner import is_pruned, prune_state


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
        train(state, batches, config, callbacks, accelerator=accelerator, until=config.prune_step)
        report = prune_state(state, config, config.prune)
        saver.forget_best()
        if accelerator.is_main_process:
            print(
                f"pruned at step {report.step} ({report.method}): sparsity {report.sparsity:.4f}, parameters "
                f"{report.before.nonzero_params:,} -> {report.after.nonzero_params:,}, MACs {report.before.macs:,} -> "
                f"{report.after.macs:,}"
            )
    train(state, batches, config, callbacks, accelerator=accelerator)
