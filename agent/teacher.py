"""The teacher of a distillation: kept in the run's own checkpoints, so that it can go on without what it came from."""

from __future__ import annotations

import torch

from agent.config import TrialConfig
from diffusion_core.checkpoint import CheckpointError
from diffusion_core.config_io import ConfigError
from diffusion_core.distillation import Distillation
from diffusion_core.hardware import memory_format, pick_precision
from diffusion_core.structure import resize, structure
from diffusion_core.trainer import TrainState
from diffusion_core.unet import UNet

TEACHER = "teacher"
"""The part of a checkpoint that holds the teacher's weights, and where its metadata says how wide it is."""


def keep_teacher(state: TrainState, teacher: UNet, config: TrialConfig) -> None:
    """Put a network into a state as its teacher."""
    state.extra_parts[TEACHER] = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    state.extra_metadata[TEACHER] = {"structure": structure(teacher, config.model)}


def distillation_of(state: TrainState, config: TrialConfig) -> Distillation | None:
    """What a state's teacher teaches its network; None if it has none (yet).

    Raises:
        ConfigError: if the two cannot be compared.
        CheckpointError: if the teacher's weights do not fit its network.
    """
    if TEACHER not in state.extra_parts:
        return None
    network = state.network
    with torch.device("meta"):
        teacher = UNet(config.model, network.image_size, network.in_channels, network.num_classes)
    try:
        resize(teacher, state.extra_metadata[TEACHER]["structure"])
        tensors = {name: tensor.clone() for name, tensor in state.extra_parts[TEACHER].items()}
        teacher.load_state_dict(tensors, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"the teacher's weights do not fit its network: {reason}") from None
    try:
        device = next(network.parameters()).device
        teacher = teacher.to(device).to(memory_format=memory_format(device, pick_precision(config.train, device)))
        return Distillation(teacher, network, config.distill.output, config.distill.features)
    except ValueError as error:
        raise ConfigError(f"distill.checkpoint = {config.distill.checkpoint!r}: {error}") from None


def keep_dense_as_teacher(state: TrainState, config: TrialConfig) -> None:
    """Before a pruning: the network as it is becomes the teacher, if one is wanted and none was named."""
    if config.distill.wanted and TEACHER not in state.extra_parts:
        keep_teacher(state, state.ema.network, config)
