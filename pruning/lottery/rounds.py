"""The rounds of a lottery: their order, their folders, and the training state that each starts from.

FOLDER/                      the lottery's own folder: run.json, config.yaml, history.jsonl, result.json
    rewind/step-*/           the dense network at prune.rewind_step
    rounds/00/               the dense network's run (see diffusion_core/run_folder.py)
    rounds/01/ ...           the run of each round's ticket
    rounds/08-reinit/        the run of a control, in place of the last round's ticket
    summary.json, *.md, *.png  (pruning/lottery/report.py)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from diffusion_core.checkpoint import Checkpoint, read_checkpoint, step_folder
from diffusion_core.config import ConfigError, CoreConfig
from diffusion_core.model.structure import maskable
from diffusion_core.model.unet import UNet, build_network
from diffusion_core.run_folder import CHECKPOINTS, ROUNDS
from diffusion_core.training.trainer import TrainState
from pruning.config import PruneConfig
from pruning.consistency import inherit_dense_images
from pruning.lottery.tickets import most_rounds, random_mask, record, reinitialised, rewound, trained_ticket

REWIND = "rewind"


@dataclass(frozen=True)
class Round:
    """A round of a lottery, or the control in its place. Round 0 trains the dense network."""

    number: int
    control: str = "none"

    @property
    def name(self) -> str:
        """Name of its folder, and suffix of its run id."""
        return f"{self.number:02d}" + ("" if self.control == "none" else f"-{self.control.replace('_', '-')}")

    @property
    def before(self) -> Round:
        """The round whose trained weights this one prunes."""
        return Round(self.number - 1)

    @property
    def rewinds(self) -> bool:
        """Whether it starts from the checkpoint at ``prune.rewind_step``."""
        return self.number > 0 and self.control != "reinit"

    def folder(self, lottery: Path) -> Path:
        """Return its folder in the lottery's."""
        return lottery / ROUNDS / self.name

    def prune_config(self, prune: PruneConfig) -> PruneConfig:
        """Return the pruning section of its own run, which describes its ticket and nothing of later rounds."""
        if not self.number:
            return PruneConfig()
        return prune.model_copy(update={"rounds": self.number, "control": self.control})


def rounds_of(prune: PruneConfig) -> list[Round]:
    """Return the rounds in order: the dense network, one ticket per round, and the control, if any, as the last."""
    return [*(Round(number) for number in range(prune.rounds)), Round(prune.rounds, prune.control)]


def check_rounds(prune: PruneConfig, network: UNet) -> None:
    """Check that the last round leaves weights in the dense network.

    Raises:
        ConfigError: if it leaves none.
    """
    count = sum(weight.numel() for weight in maskable(network).values())
    most = most_rounds(count, prune.per_round)
    if prune.rounds > most:
        raise ConfigError(
            f"prune.rounds = {prune.rounds}: with prune.per_round = {prune.per_round}, none of {count:,} weights would "
            f"be left; expected at most {most}"
        )


def early_checkpoint(folder: Path, rewind_step: int) -> Checkpoint:
    """Return the checkpoint that rounds rewind to.

    Args:
        folder: the lottery's folder.
        rewind_step: ``prune.rewind_step``.

    Raises:
        ConfigError: if the dense network was trained without keeping that step.
    """
    path = folder / REWIND / step_folder(rewind_step)
    if not path.is_dir():
        raise ConfigError(
            f"prune.rewind_step = {rewind_step}: the chain in {str(folder)!r} did not keep that step; set it back, or "
            f"choose another log.dir"
        )
    return read_checkpoint(path)


def start_round(
    this: Round, folder: Path, config: CoreConfig, prune: PruneConfig, num_classes: int, device: torch.device
) -> TrainState:
    """Return the training state that a round starts from.

    Args:
        this: the round. The one before it is finished.
        folder: the lottery's folder.
        config: the run's configuration.
        prune: the round's pruning section.
        num_classes: number of classes of the data set.
        device: device of the network.

    Raises:
        CheckpointError: if the round before left no intact checkpoint.
        ConfigError: as :func:`early_checkpoint`.
    """
    if not this.number:
        return TrainState.start(build_network(config, num_classes).to(device), config.train, config.ema)
    before = read_checkpoint(this.before.folder(folder) / CHECKPOINTS)
    masks = trained_ticket(before, this.number, prune)
    if this.control == "random_mask":
        masks = random_mask(masks, config.seed)
    if this.rewinds:
        state = rewound(early_checkpoint(folder, prune.rewind_step), masks, config, device)
    else:
        state = reinitialised(masks, num_classes, config, device)
    record(state, prune, config.seed)
    if this.number > 1:
        inherit_dense_images(state, before)
    return state
