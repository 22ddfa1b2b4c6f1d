"""Compare the images of a pruned network with those of the dense one, from the same seeds and labels.

The dense network's images are stored in the run's checkpoints. So they are available to a run that resumes elsewhere
without the dense weights, and to a run that starts from a pruned checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffusion_core.checkpoint import Checkpoint
from diffusion_core.config import CoreConfig, SampleConfig, build
from diffusion_core.evaluation.consistency import consistency_of_images
from diffusion_core.evaluation.protocol import protocol, sampling_protocol
from diffusion_core.evaluation.suite import Judgement
from diffusion_core.hardware import pick_precision
from diffusion_core.model.unet import UNet
from diffusion_core.randomness import drawn_as
from diffusion_core.sampling.generation import Generator, Lows, Request, all_labels, round_robin
from diffusion_core.sampling.lows import stored
from diffusion_core.training.trainer import TrainState
from pruning.pruner import records

DENSE_IMAGES = "dense_images"
"""The checkpoint's part with the images, and the key of their sampling settings in the metadata."""


LOWS = "lows"
"""The tensor of that part with the small images of a model that upsamples."""


class KeepDenseImages:
    """A training callback that stores images of the network before pruning. It must precede all that prune.

    Args:
        config: every knob of the core.
        step: optimizer steps before pruning.
        from_parent: whether training started from another run's weights. Otherwise images at step 0 are noise.
        lows: the small images of a model that upsamples.
    """

    def __init__(self, config: CoreConfig, step: int, *, from_parent: bool, lows: Lows | None = None) -> None:
        self.config = config
        self.lows = lows
        self.step = step
        self.from_parent = from_parent

    def __call__(self, state: TrainState, _row: dict[str, Any]) -> None:
        """Draw and keep the images at the step of the pruning."""
        if state.step == self.step and (state.step or self.from_parent):
            keep_dense_images(state, state.ema.network, self.config, self.lows)


def keep_dense_images(state: TrainState, network: UNet, config: CoreConfig, lows: Lows | None = None) -> None:
    """Store images of a network in a state, unless it has some or ``eval.consistency_images`` is 0.

    The small images that they were upsampled from are stored beside them.
    """
    if config.eval.consistency_images and DENSE_IMAGES not in state.extra_parts:
        wanted = round_robin(all_labels(network), range(config.eval.consistency_images))
        images = _draw(network, config, wanted, config.sample, config.seed, lows)
        state.extra_parts[DENSE_IMAGES] = {"images": images} | ({LOWS: lows(wanted).cpu()} if lows else {})
        state.extra_metadata[DENSE_IMAGES] = {
            "sample": config.sample.model_dump(mode="json"),
            "seed": config.seed,
            "draws": config.draws,
        }


def inherit_dense_images(state: TrainState, checkpoint: Checkpoint) -> None:
    """Copy the dense network's images, if any, from the checkpoint that a state was made from."""
    if DENSE_IMAGES in checkpoint.parts:
        state.extra_parts[DENSE_IMAGES] = checkpoint.tensors(DENSE_IMAGES)
        state.extra_metadata[DENSE_IMAGES] = checkpoint.metadata["extra"][DENSE_IMAGES]


def dense_consistency(state: TrainState, config: CoreConfig) -> Judgement:
    """Compare images of a state's averaged network with those of the dense one (``prune/consistency_*``).

    Both are sampled with the settings stored with the dense network's images, whatever ``sample.*`` is now; a student
    of step distillation is sampled as such. The result
    is empty if the network was not pruned, images of the dense one are missing, or ``eval.consistency_images`` is 0.
    """
    if not (config.eval.consistency_images and records(state) and DENSE_IMAGES in state.extra_parts):
        return Judgement()
    drawn = state.extra_metadata[DENSE_IMAGES]
    sample, seed = build(SampleConfig, drawn["sample"]), drawn["seed"]
    part = state.extra_parts[DENSE_IMAGES]
    theirs, network = part["images"], state.ema.network
    wanted = round_robin(all_labels(network), range(len(theirs)))
    lows = stored(wanted, part[LOWS]) if LOWS in part else None
    sample = state.sampling(sample)
    config = config.model_copy(update={"draws": drawn_as(drawn)})
    alike = consistency_of_images(_draw(network, config, wanted, sample, seed, lows), theirs, seed)
    figures = alike.figures("prune")
    line = protocol(len(theirs), sampling_protocol(sample, seed), None, "the dense network")
    return Judgement(figures, dict.fromkeys(figures, line))


def _draw(
    network: UNet, config: CoreConfig, wanted: Sequence[Request], sample: SampleConfig, seed: int, lows: Lows | None
) -> Tensor:
    """Sample images in this process only."""
    device = next(network.parameters()).device
    generator = Generator(network, config, pick_precision(config.train, device), lows=lows)
    return generator.images(wanted, sample, seed)
