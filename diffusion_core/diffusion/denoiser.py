"""Wrap a network of any parametrisation as a denoiser (:mod:`diffusion_core.diffusion.predictions`).

Guidance and samplers work on denoisers: ``(x_BCHW, t_B, labels_B | None) -> x0_BCHW``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffusion_core.config import DiffusionConfig, ModelConfig
from diffusion_core.diffusion.predictions import PredictionRecord
from diffusion_core.diffusion.schedule import NoiseSchedule, build_schedule
from diffusion_core.registries import PREDICTIONS

DenoiserFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Maps noisy images, timesteps 0..T-1 and labels (None: no class) to the expected clean images, in [-1, 1]."""


class Denoiser:
    """A network that estimates clean images.

    Args:
        network: ``(x_BCHW, t_B, labels_B | None) -> output``. With self-conditioning, it takes twice the channels, and
            with a given image (:meth:`with_given`) those of that. With a learned variance, it returns twice the
            channels.
        schedule: the noise schedule that the network was trained with.
        prediction: parametrisation of its output, a key of ``PREDICTIONS``.
        learned_variance: whether the second half of the output's channels interpolates the log variance of a reverse
            step between its bounds (Nichol & Dhariwal 2021, eq. 15).
        self_conditioning: whether the network takes its previous estimate of the clean images as an input (Chen et al.
            2022, Analog Bits). The denoiser stores it between calls: create a new denoiser for every batch to sample.
    """

    def __init__(
        self,
        network: nn.Module | Callable[..., Tensor],
        schedule: NoiseSchedule,
        prediction: str = "eps",
        *,
        learned_variance: bool = False,
        self_conditioning: bool = False,
    ) -> None:
        self.network = network
        self.schedule = schedule
        self.record: PredictionRecord = PREDICTIONS[prediction]
        self.learned_variance = learned_variance
        self.self_conditioning = self_conditioning
        self.given_BCHW: Tensor | None = None
        self.fraction_BCHW: Tensor | None = None
        self._estimate_BCHW: Tensor | None = None

    @classmethod
    def from_config(
        cls,
        network: nn.Module | Callable[..., Tensor],
        diffusion: DiffusionConfig,
        model: ModelConfig,
        device: torch.device,
    ) -> Denoiser:
        """Return a network as a denoiser, with the schedule and parametrisation of a configuration."""
        return cls(
            network,
            build_schedule(diffusion).to(device),
            diffusion.prediction,
            learned_variance=model.learned_variance,
            self_conditioning=model.self_conditioning,
        )

    def with_given(self, given_BCHW: Tensor | None) -> Denoiser:
        """Return this denoiser for images that the network is given more of (:mod:`.upsampling`); None: the same one.

        A batch may hold the images several times over, as guidance does.
        """
        if given_BCHW is None:
            return self
        other = copy.copy(self)
        other.given_BCHW = given_BCHW
        return other

    def predict(
        self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None, estimate_BCHW: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the network's output, float32, and the variance fraction in [0, 1] if it is learned.

        Args:
            x_BCHW: noisy images.
            t_B: timesteps.
            labels_B: classes.
            estimate_BCHW: for self-conditioning, an earlier estimate of the clean images; None: zeros.
        """
        inputs = x_BCHW
        if self.record.inputs is not None:
            inputs = self.record.inputs(x_BCHW, *self.schedule.at(t_B, x_BCHW))
        if self.self_conditioning:
            inputs = torch.cat([inputs, torch.zeros_like(x_BCHW) if estimate_BCHW is None else estimate_BCHW], dim=1)
        if self.given_BCHW is not None:
            inputs = torch.cat([inputs, _fitted(self.given_BCHW, len(inputs))], dim=1)
        output = self.network(inputs, t_B, labels_B).float()
        if not self.learned_variance:
            return output, None
        output, between = output.chunk(2, dim=1)
        return output, (between + 1.0) / 2.0

    def target(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Return the training target of the network's output."""
        return self.record.target(x0_BCHW, noise_BCHW, *self.schedule.at(t_B, x0_BCHW))

    def clean(self, output_BCHW: Tensor, x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Return the clean images that correspond to the network's output."""
        return self.record.clean(output_BCHW, x_BCHW, *self.schedule.at(t_B, x_BCHW))

    def error_scale(self, t_B: Tensor) -> Tensor:
        """Return the squared error of the output per squared error of the clean images, ``(B,)`` float32.

        This converts weights of one error to weights of the other. It is SNR for eps, 1 for x0, SNR + 1 for v, and the
        EDM weighting for edm.
        """
        return self.record.error_scale(*self._amplitudes(t_B))

    def snr(self, t_B: Tensor) -> Tensor:
        """Return the signal-to-noise ratios ``(alpha / sigma) ** 2``, ``(B,)`` float32."""
        alpha, sigma = self._amplitudes(t_B)
        return (alpha / sigma).square()

    def _amplitudes(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma of each image, ``(B,)`` each."""
        alpha, sigma = (part.flatten() for part in self.schedule.at(t_B, t_B[:, None, None, None].float()))
        return alpha, sigma

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None) -> Tensor:
        """Estimate the clean images, float32.

        Store the variance fraction and, with self-conditioning, the estimate for the next call.
        """
        output, self.fraction_BCHW = self.predict(x_BCHW, t_B, labels_B, self._remembered(x_BCHW))
        x0_BCHW = self.clean(output, x_BCHW, t_B)
        if self.self_conditioning:
            self._estimate_BCHW = x0_BCHW.clamp(-1.0, 1.0)
        return x0_BCHW

    def _remembered(self, x_BCHW: Tensor) -> Tensor | None:
        """Return the stored estimate for a batch."""
        return None if self._estimate_BCHW is None else _fitted(self._estimate_BCHW, len(x_BCHW))


def _fitted(tensor_BCHW: Tensor, batch: int) -> Tensor:
    """Return what belongs to the images of a batch that guidance may have doubled, or halved again, since."""
    known = len(tensor_BCHW)
    if known == batch:
        return tensor_BCHW
    return tensor_BCHW[:batch] if known > batch else tensor_BCHW.repeat(batch // known, 1, 1, 1)


def clipped(denoiser: DenoiserFunction) -> DenoiserFunction:
    """Clip a denoiser's images to [-1, 1], as Ho et al. 2020 do at every sampling step."""

    def clipped_denoiser(x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None) -> Tensor:
        return denoiser(x_BCHW, t_B, labels_B).clamp(-1.0, 1.0)

    return clipped_denoiser
