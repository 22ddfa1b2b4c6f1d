"""The teacher of a distillation, stored in the checkpoints of the run: resuming does not need its source."""

from __future__ import annotations

from diffusion_core.checkpoint import CheckpointError
from diffusion_core.config import ConfigError, DistillConfig, ModelConfig, TrainConfig
from diffusion_core.hardware import memory_format, pick_precision
from diffusion_core.messages import one_line
from diffusion_core.model.structure import dense_like, resize, structure
from diffusion_core.model.unet import UNet
from diffusion_core.training.distillation import Distillation
from diffusion_core.training.trainer import TrainState

TEACHER = "teacher"
"""The checkpoint's part with the teacher's weights, and the key of its widths in the metadata."""


def keep_teacher(state: TrainState, teacher: UNet, model: ModelConfig) -> None:
    """Store a network in a state as its teacher."""
    state.extra_parts[TEACHER] = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    state.extra_metadata[TEACHER] = {"structure": structure(teacher, model)}


def distillation_of(
    state: TrainState, model: ModelConfig, train: TrainConfig, distill: DistillConfig
) -> Distillation | None:
    """Return the distillation from a state's teacher to its network; None if the state has no teacher.

    Raises:
        ConfigError: if the two networks cannot be compared.
        CheckpointError: if the teacher's weights do not fit its network.
    """
    if TEACHER not in state.extra_parts:
        return None
    network = state.network
    teacher = dense_like(network, model)
    try:
        resize(teacher, state.extra_metadata[TEACHER]["structure"])
        tensors = {name: tensor.clone() for name, tensor in state.extra_parts[TEACHER].items()}
        teacher.load_state_dict(tensors, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the teacher's weights do not fit its network: {one_line(error)}") from None
    try:
        device = next(network.parameters()).device
        teacher = teacher.to(device).to(memory_format=memory_format(device, pick_precision(train, device)))
        return Distillation(teacher, network, distill.output, distill.features)
    except ValueError as error:
        raise ConfigError(f"distill.checkpoint = {distill.checkpoint!r}: {error}") from None


def keep_dense_as_teacher(state: TrainState, model: ModelConfig, distill: DistillConfig) -> None:
    """Store the averaged network as its own teacher, before pruning, if distillation is on and no teacher was named."""
    if distill.wanted and TEACHER not in state.extra_parts:
        keep_teacher(state, state.ema.network, model)
