"""How alike the images of a pruned network and of the dense one are, from the same seeds and labels.

What the dense network draws is kept in the run's own checkpoints: a run that goes on elsewhere, when the dense weights
are long gone, still has it; and so has a run that starts from a pruned checkpoint.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffusion_core.checkpoint import Checkpoint
from diffusion_core.config import CoreConfig, SampleConfig, build
from diffusion_core.evaluation.consistency import consistency_of_images
from diffusion_core.evaluation.protocol import protocol, sampling_protocol
from diffusion_core.evaluation.suite import Judgement
from diffusion_core.hardware import pick_precision
from diffusion_core.model.unet import UNet
from diffusion_core.sampling.generation import Generator, all_labels, round_robin
from diffusion_core.training.trainer import TrainState
from pruning.pruner import records

DENSE_IMAGES = "dense_images"
"""The part of a checkpoint that holds them, and where its metadata says how they were drawn."""


class KeepDenseImages:
    """A training callback that keeps what the network draws before it is pruned; it comes before all that prune.

    Args:
        config: every knob of the core.
        step: optimizer steps before the pruning.
        from_parent: whether training began with the weights of another run, which are worth drawing from at step 0.
    """

    def __init__(self, config: CoreConfig, step: int, *, from_parent: bool) -> None:
        self.config = config
        self.step = step
        self.from_parent = from_parent

    def __call__(self, state: TrainState, _row: dict[str, Any]) -> None:
        """Draw and keep the images at the step of the pruning."""
        if state.step == self.step and (state.step or self.from_parent):
            keep_dense_images(state, state.ema.network, self.config)


def keep_dense_images(state: TrainState, network: UNet, config: CoreConfig) -> None:
    """Put what a network draws into a state, unless ``eval.consistency_images`` is 0 or something is there already."""
    if config.eval.consistency_images and DENSE_IMAGES not in state.extra_parts:
        images = _draw(network, config, config.eval.consistency_images, config.sample, config.seed)
        state.extra_parts[DENSE_IMAGES] = {"images": images}
        state.extra_metadata[DENSE_IMAGES] = {"sample": config.sample.model_dump(mode="json"), "seed": config.seed}


def inherit_dense_images(state: TrainState, checkpoint: Checkpoint) -> None:
    """Take over the dense network's images from the checkpoint that a state was made from, if it holds any."""
    if DENSE_IMAGES in checkpoint.parts:
        state.extra_parts[DENSE_IMAGES] = checkpoint.tensors(DENSE_IMAGES)
        state.extra_metadata[DENSE_IMAGES] = checkpoint.metadata["extra"][DENSE_IMAGES]


def dense_consistency(state: TrainState, config: CoreConfig) -> Judgement:
    """How alike the images of a state's averaged network and of the dense one are (``prune/consistency_*``).

    Nothing where the network was not pruned, the dense one's images are not there, or none are wanted. They are drawn
    as those were, whatever ``sample.*`` says by now.
    """
    if not (config.eval.consistency_images and records(state) and DENSE_IMAGES in state.extra_parts):
        return Judgement()
    drawn = state.extra_metadata[DENSE_IMAGES]
    sample, seed = build(SampleConfig, drawn["sample"]), drawn["seed"]
    theirs = state.extra_parts[DENSE_IMAGES]["images"]
    alike = consistency_of_images(_draw(state.ema.network, config, len(theirs), sample, seed), theirs, seed)
    figures = alike.figures("prune")
    line = protocol(len(theirs), sampling_protocol(sample, seed), None, "the dense network")
    return Judgement(figures, dict.fromkeys(figures, line))


def _draw(network: UNet, config: CoreConfig, total: int, sample: SampleConfig, seed: int) -> Tensor:
    """Images of all classes in turn, by this process alone."""
    device = next(network.parameters()).device
    generator = Generator(network, config, pick_precision(config.train, device))
    return generator.images(round_robin(all_labels(network), range(total)), sample, seed)
