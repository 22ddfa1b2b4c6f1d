"""Training images with noise, on which pruning measures gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusion_core.config import CoreConfig
from diffusion_core.data.batches import Batches
from diffusion_core.data.datasets import Images
from diffusion_core.diffusion.denoiser import Denoiser
from diffusion_core.diffusion.draws import Draws, draw
from diffusion_core.diffusion.losses import diffusion_loss, noise_error
from diffusion_core.hardware import AUTOCAST, pick_precision
from diffusion_core.model.unet import UNet
from diffusion_core.randomness import Purpose, stream_seed
from diffusion_core.terminal.progress import Shown

MOST_AT_ONCE = 128
"""Most images that pass through the network at once: a checkpoint may come from a run of many GPUs."""


@dataclass(frozen=True)
class Calibration:
    """Batches of training images, drawn as in training but from random streams of their own.

    Every process measures the whole batches, in float32. A batch passes through the network in parts that need no more
    memory than training does.

    Attributes:
        batches: the images. Batch n is the same at every call.
        config: configuration of the run, with the seed of these streams.
        at_once: images that pass through the network at once.
        progress: whether to show a progress bar.
    """

    batches: Batches
    config: CoreConfig
    at_once: int
    progress: bool = False

    @classmethod
    def of(
        cls, images: Images, config: CoreConfig, device: torch.device, progress: bool = False, processes: int = 1
    ) -> Calibration:
        """Return batches of ``train.batch_size`` training images.

        Args:
            images: the training images.
            config: configuration of the run.
            device: where they are measured.
            progress: whether to show a progress bar.
            processes: number of processes that share a batch in training.
        """
        at_once = min(MOST_AT_ONCE, config.train.images_per_step // (config.train.accumulation * processes))
        if pick_precision(config.train, device) in AUTOCAST:
            at_once //= 2  # float32 takes twice the memory.
        config = config.model_copy(update={"seed": stream_seed(config.seed, Purpose.CALIBRATION)})
        batches = Batches(
            images,
            batch_size=config.train.images_per_step,
            seed=config.seed,
            draws=config.draws,
            horizontal_flip=config.data.flips,
            device=device,
        )
        return cls(batches, config, max(1, at_once), progress)

    def indices(self, count: int, what: str = "gradients") -> Iterable[int]:
        """Return the numbers of the first ``count`` batches, with a progress bar that says what is measured."""
        return Shown(range(count), what, count, "batch", shown=self.progress, leave=False)

    def draws(self, index: int, network: UNet, t: int | None = None) -> Draws:
        """Return batch ``index`` with its noise, at timestep ``t``, or at timesteps drawn as in training (None)."""
        drawn = draw(index, self.batches, self.config, self._denoiser(network).schedule)
        return drawn if t is None else replace(drawn, t_B=torch.full_like(drawn.t_B, t))

    def parts(self, drawn: Draws, memory: int = 1) -> list[Draws]:
        """Return a batch in equal parts that fit in memory.

        Args:
            drawn: the batch.
            memory: how much more memory an image takes than in training.
        """
        images = len(drawn.t_B)
        most = max(1, self.at_once // memory)
        return list(drawn.chunks(next(n for n in range(1, images + 1) if images % n == 0 and images <= n * most)))

    def loss(self, network: UNet, drawn: Draws) -> Tensor:
        """Return the training loss of each image, ``(B,)``, float32, with its graph."""
        return diffusion_loss(
            self._denoiser(network, drawn),
            drawn.x0_BCHW,
            drawn.noise_BCHW,
            drawn.t_B,
            drawn.labels_B,
            self.config.diffusion,
            drawn.shown_B,
        )

    def noise_error(self, network: UNet, drawn: Draws) -> Tensor:
        """Return the squared error of the noise that the network predicts, without weights, ``(B,)``, no gradient."""
        errors = [
            noise_error(
                self._denoiser(network, part), part.x0_BCHW, part.noise_BCHW, part.t_B, part.labels_B, part.shown_B
            )
            for part in self.parts(drawn)
        ]
        return torch.cat(errors)

    def gradients(self, network: UNet, count: int) -> Iterator[dict[str, Tensor]]:
        """Yield the gradient of the mean loss of each of the first ``count`` batches, by parameter."""
        for index in self.indices(count):
            yield self.gradient(network, index)

    def gradient(self, network: UNet, index: int) -> dict[str, Tensor]:
        """Return the gradient of the mean loss of batch ``index``, by parameter."""
        return self.gradient_of(network, self.draws(index, network))

    def gradient_of(self, network: UNet, drawn: Draws) -> dict[str, Tensor]:
        """Return the gradient of the mean loss of a batch, by parameter."""
        parameters, parts = dict(network.named_parameters()), self.parts(drawn)
        total: dict[str, Tensor] = {}
        for part in parts:
            loss = self.loss(network, part).mean() / len(parts)
            for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                total[name] = total[name] + gradient if name in total else gradient
        return total

    def _denoiser(self, network: UNet, drawn: Draws | None = None) -> Denoiser:
        device = next(network.parameters()).device
        denoiser = Denoiser.from_config(network, self.config.diffusion, self.config.model, device)
        return denoiser.with_given(drawn.given_BCHW if drawn else None)
