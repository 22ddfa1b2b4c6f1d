"""What each block contributes: how far the output of the network moves without it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from diffusion_core.model.depth import without_block
from diffusion_core.model.unet import UNet
from diffusion_core.model.watch import Watch
from pruning.calibration import Calibration


@torch.no_grad()
def output_losses(network: UNet, calibration: Calibration, batches: int, blocks: Sequence[str]) -> dict[str, float]:
    """Return the output loss of each block (LAPTOP-Diff, Zhang et al. 2024): ``E |f(x, t) - f_without(x, t)|^2``.

    f is the output of the network, and f_without that of the network without this block alone. The mean is over noisy
    training images, their timesteps as in training, and the values of the output.

    Args:
        network: the network; it does not change.
        calibration: the training images.
        batches: number of batches.
        blocks: names of the blocks.
    """
    measured = copy.deepcopy(network).eval()
    total = dict.fromkeys(blocks, 0.0)
    for index in calibration.indices(batches, "blocks"):
        parts = calibration.parts(calibration.draws(index, measured))
        for part in parts:
            watch = measured.watch = Watch()
            calibration.noise_error(measured, part)
            measured.watch = None
            asked, answer_BCHW, _ = watch.taken()
            for name in blocks:
                with without_block(measured, name):
                    change = measured(*asked) - answer_BCHW
                total[name] += float(change.double().square().mean()) / (batches * len(parts))
    return total
