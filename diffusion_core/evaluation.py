"""Figures that say how good a model is. Each is named for what it measures, and none is called FID that is not."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from diffusion_core.config import CoreConfig
from diffusion_core.data import Dataset, Images, to_unit
from diffusion_core.denoiser import Denoiser
from diffusion_core.hardware import Precision, autocast
from diffusion_core.losses import diffusion_loss
from diffusion_core.randomness import Purpose, generator
from diffusion_core.unet import UNet

VALIDATION_SEED = 0
"""Validation noise does not follow the run's seed: runs with different seeds are compared on the same noise."""

VALIDATION_BATCH = 256


@torch.no_grad()
def validation_loss(network: UNet, images: Images, config: CoreConfig, precision: Precision) -> float:
    """The training loss on held-out images, with labels, with noise and timesteps that are always the same.

    Timesteps are spread evenly over 0..T-1. Comparable between runs of equal schedule, loss and prediction only.

    Args:
        network: in evaluation mode.
        images: held-out images; the first ``eval.val_images`` of a fixed shuffle are used.
        config: the run's configuration.
        precision: arithmetic of the network.
    """
    device = next(network.parameters()).device
    denoiser = Denoiser.from_config(network, config, device)
    source = generator(VALIDATION_SEED, Purpose.VALIDATION)
    order = torch.randperm(len(images), generator=source)[: config.eval.val_images]
    position_N = (torch.arange(len(order)) + 0.5) / len(order)
    t_N = (position_N * config.diffusion.timesteps).long()
    total = 0.0
    for chunk, t_B in zip(order.split(VALIDATION_BATCH), t_N.split(VALIDATION_BATCH), strict=True):
        batch = images.select(chunk).to(device)
        x0_BCHW = to_unit(batch.images_NCHW)
        noise_BCHW = torch.randn(x0_BCHW.shape, generator=source).to(device)
        with autocast(device, precision):
            loss_B = diffusion_loss(denoiser, x0_BCHW, noise_BCHW, t_B.to(device), batch.labels_N, config.diffusion)
        total += float(loss_B.double().sum())
    return total / len(order)


class PixelClassifier:
    """A support vector machine on pixels, trained on the real training images.

    Attributes:
        accuracy: share of the real held-out images that it classifies rightly, in [0, 1].
    """

    def __init__(self, dataset: Dataset) -> None:
        from sklearn.svm import SVC  # Slow to import; not needed where nothing is evaluated.

        # RBF width and penalty that suit pixels in 0..16, the digits' own scale (scikit-learn's digits example).
        self._machine = SVC(C=10.0, gamma=0.001)
        self._machine.fit(_pixels(dataset.train.images_NCHW), dataset.train.labels_N.numpy())
        self.accuracy = float(self._machine.score(_pixels(dataset.val.images_NCHW), dataset.val.labels_N.numpy()))

    def agreement(self, images_NCHW: Tensor, labels: list[int]) -> float:
        """Share of uint8 images, in [0, 1], in which the classifier sees the label that was asked for."""
        return float(np.mean(self._machine.predict(_pixels(images_NCHW)) == np.asarray(labels)))


def _pixels(images_NCHW: Tensor) -> np.ndarray:
    return images_NCHW.flatten(1).numpy().astype(np.float64) * (16.0 / 255.0)


def build_classifier(config: CoreConfig, dataset: Dataset) -> PixelClassifier | None:
    """The classifier that a configuration asks for, or None."""
    return PixelClassifier(dataset) if config.has_classifier else None
