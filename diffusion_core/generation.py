"""Drawing images from a network: any number of them, each from a random stream of its own.

The image of a (seed, label, index) is the same whatever else is drawn beside it and however many at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion_core.config import CoreConfig, SampleConfig
from diffusion_core.data import to_uint8
from diffusion_core.denoiser import Denoiser, DenoiserFunction, clipped
from diffusion_core.guidance import between_levels, guided
from diffusion_core.hardware import Precision, autocast
from diffusion_core.randomness import Purpose, generator
from diffusion_core.samplers import StepCallback, build_sampler
from diffusion_core.schedule import NoiseSchedule
from diffusion_core.unet import NO_LABEL, UNet


@dataclass(frozen=True)
class Request:
    """Which image is wanted: its class (or ``NO_LABEL``) and its number among those of that class."""

    label: int
    index: int


def requests(labels: Sequence[int], per_label: int) -> list[Request]:
    """``per_label`` images of each label, label by label."""
    return [Request(label, index) for label in labels for index in range(per_label)]


def all_labels(network: UNet) -> list[int]:
    """The labels that a network knows: its classes, or ``NO_LABEL`` alone for a network without labels."""
    return list(range(network.num_classes)) or [NO_LABEL]


class ImageNoise:
    """Standard normal noise with one generator an image, so that an image does not depend on its batch.

    Args:
        wanted: the images; with the seed, each names its random stream.
        seed: the run's or the user's seed.
        shape_CHW: shape of an image.
        device: where the noise is wanted. It is drawn on the CPU, so that every device sees the same noise.
    """

    def __init__(
        self, wanted: Sequence[Request], seed: int, shape_CHW: tuple[int, int, int], device: torch.device
    ) -> None:
        self.generators = [generator(seed, Purpose.SAMPLE, image.label, image.index) for image in wanted]
        self.shape_CHW = shape_CHW
        self.device = device

    def __call__(self) -> Tensor:
        """The next noise of every image, ``(B, C, H, W)`` float32."""
        noise_BCHW = torch.empty((len(self.generators), *self.shape_CHW))
        for row_CHW, source in zip(noise_BCHW, self.generators, strict=True):
            row_CHW.normal_(generator=source)
        return noise_BCHW.to(self.device, non_blocking=True)


class Generator:
    """Draws images from a network.

    Args:
        network: in evaluation mode, on the device where sampling is to run.
        config: its noise schedule is what the network was trained with.
        precision: arithmetic of the network.
        reference: a weaker model to guide away from (autoguidance); None guides away from the absence of a label.
    """

    def __init__(
        self, network: UNet, config: CoreConfig, precision: Precision, reference: Generator | None = None
    ) -> None:
        self.network = network
        self.config = config
        self.device = next(network.parameters()).device
        self.reference = reference
        self.precision = precision
        self.shape_CHW = (network.in_channels, network.image_size, network.image_size)

    def denoiser(self) -> Denoiser:
        """The network as a denoiser, without guidance; a fresh one for each batch."""
        return Denoiser.from_config(self.network, self.config, self.device)

    def guided(self, denoiser: Denoiser, config: SampleConfig) -> DenoiserFunction:
        """A denoiser with the guidance and clipping that are asked for."""
        interval = config.guidance_interval
        applies = between_levels(denoiser.schedule, *interval) if interval else None
        reference = self.reference.at_levels_of(denoiser.schedule) if self.reference else None
        wrapped = guided(denoiser, config.guidance, reference=reference, applies=applies)
        return clipped(wrapped) if config.clip_x0 else wrapped

    def at_levels_of(self, schedule: NoiseSchedule) -> DenoiserFunction:
        """This network as a denoiser of another schedule's noisy images: rescaled, and looked up by noise level."""
        denoiser = self.denoiser()
        if schedule.equals(denoiser.schedule):
            return denoiser

        def translated(x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None) -> Tensor:
            alpha, sigma = schedule.at(t_B, x_BCHW)
            own_t_B = denoiser.schedule.position((sigma / alpha).flatten()).float()
            own_alpha, _ = denoiser.schedule.at(own_t_B, x_BCHW)
            return denoiser(x_BCHW / alpha * own_alpha, own_t_B, labels_B)

        return translated

    @torch.no_grad()
    def batch(
        self, wanted: Sequence[Request], config: SampleConfig, seed: int, callback: StepCallback | None = None
    ) -> Tensor:
        """Draw images at once: ``(B, C, H, W)`` float32 in [-1, 1] (unclipped), on the network's device."""
        noise = ImageNoise(wanted, seed, self.shape_CHW, self.device)
        labels_B = torch.tensor([image.label for image in wanted], device=self.device)
        denoiser = self.denoiser()
        steps = denoiser.schedule.steps(config.steps, config.spacing)
        # Of a variance preserving schedule the start has unit variance, however little signal is left at T-1.
        start_BCHW = noise() * (1.0 if denoiser.schedule.variance_preserving else float(steps.sigmas[0]))
        with autocast(self.device, self.precision):
            sampler = build_sampler(config, denoiser)
            return sampler(self.guided(denoiser, config), start_BCHW, steps, labels_B, noise=noise, callback=callback)

    def batches(
        self, wanted: Sequence[Request], config: SampleConfig, seed: int, *, progress: bool = False
    ) -> Iterator[tuple[Sequence[Request], Tensor]]:
        """Draw any number of images, ``config.batch_size`` at once, and hand out each batch as it is done.

        Yields:
            What was wanted, and its images: ``(B, C, H, W)`` uint8 on the CPU.
        """

        def advance(_index: int, x_BCHW: Tensor, _x0_BCHW: Tensor) -> None:
            bar.update(len(x_BCHW))

        with tqdm(total=len(wanted) * config.steps, desc="sampling", unit="eval", disable=not progress) as bar:
            for start in range(0, len(wanted), config.batch_size):
                batch = wanted[start : start + config.batch_size]
                yield batch, to_uint8(self.batch(batch, config, seed, advance)).cpu()

    def images(self, wanted: Sequence[Request], config: SampleConfig, seed: int, *, progress: bool = False) -> Tensor:
        """Draw any number of images: ``(N, C, H, W)`` uint8 on the CPU."""
        return torch.cat([images for _, images in self.batches(wanted, config, seed, progress=progress)])

    def trajectory(self, wanted: Sequence[Request], config: SampleConfig, seed: int, keep: set[int]) -> list[Tensor]:
        """The noisy images before the steps in ``keep``, then the finished ones, each ``(B, C, H, W)`` uint8."""
        frames: list[Tensor] = []

        def record(index: int, x_BCHW: Tensor, _: Tensor) -> None:
            if index in keep:
                frames.append(to_uint8(x_BCHW).cpu())

        images = self.batch(wanted, config, seed, record)
        return [*frames, to_uint8(images).cpu()]
