"""Sample any number of images from a network, each with its own random stream.

The image of a (seed, label, index) does not depend on the other images or on the batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_core.config import ConfigError, CoreConfig, SampleConfig
from diffusion_core.data.datasets import DataError, to_uint8, to_unit
from diffusion_core.diffusion.denoiser import Denoiser, DenoiserFunction, clipped
from diffusion_core.diffusion.sampling_steps import SamplingSteps
from diffusion_core.diffusion.schedule import NoiseSchedule, build_schedule
from diffusion_core.diffusion.upsampling import given
from diffusion_core.hardware import NOT_FINITE_REMEDY, Precision, autocast, fastest_convolutions, memory_format
from diffusion_core.model.compilation import compiled, pick_sampling_compilation
from diffusion_core.model.cuda_graphs import ReplayedNetwork, is_replayed
from diffusion_core.model.unet import NO_LABEL, UNet
from diffusion_core.randomness import Purpose
from diffusion_core.sampling.guidance import between_levels, decided, guided
from diffusion_core.sampling.noise import ImageNoise
from diffusion_core.sampling.samplers import NoiseFunction, StepCallback, build_sampler, start_scale, steps_of
from diffusion_core.terminal.progress import progress_of

REPLAYED_FROM = 8
"""Smallest number of sampling steps for which it pays off to record the network as a CUDA graph."""


@dataclass(frozen=True)
class Request:
    """An image to sample: its class (or ``NO_LABEL``), and its number among the images of that class."""

    label: int
    index: int


Lows = Callable[[Sequence[Request]], Tensor]
"""Returns the small images that requested images are upsampled from: uint8 ``(B, C, h, w)``, on any device."""


def requests(labels: Sequence[int], per_label: int) -> list[Request]:
    """Return requests for ``per_label`` images of each label, label by label."""
    return [Request(label, index) for label in labels for index in range(per_label)]


def round_robin(labels: Sequence[int], positions: Iterable[int]) -> list[Request]:
    """Return the images at some positions of an endless list in which the labels take turns."""
    return [Request(labels[position % len(labels)], position // len(labels)) for position in positions]


def all_labels(network: UNet) -> list[int]:
    """Return the labels of a network: its classes, or only ``NO_LABEL`` for a network without labels."""
    return list(range(network.num_classes)) or [NO_LABEL]


def in_parts(network: Callable[..., Tensor], size: int) -> Callable[..., Tensor]:
    """Return a network that takes batches of a multiple of ``size`` images, and evaluates ``size`` at once."""

    def whole(x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None) -> Tensor:
        labels = [None] * (len(x_BCHW) // size) if labels_B is None else labels_B.split(size)
        return torch.cat([network(*part) for part in zip(x_BCHW.split(size), t_B.split(size), labels, strict=True)])

    return whole


def _joined(parts: Iterable[list[Tensor]]) -> list[Tensor]:
    """Return frames of all images, from those of each batch."""
    return [torch.cat(frames) for frames in zip(*parts, strict=True)]


class Generator:
    """Samples images from a network.

    Args:
        network: the network, in evaluation mode, on the device to sample on.
        config: the configuration that it was trained with.
        precision: arithmetic of the network.
        reference: a weaker model, for autoguidance; None: classifier-free guidance.
        lows: the small images of a model that upsamples; None for other models.

    Raises:
        ConfigError: if a model that upsamples has no small images.
    """

    def __init__(
        self,
        network: UNet,
        config: CoreConfig,
        precision: Precision,
        reference: Generator | None = None,
        lows: Lows | None = None,
    ) -> None:
        if config.upsample.wanted and lows is None:
            raise ConfigError(f"upsample.factor = {config.upsample.factor}: there are no small images for this model")
        self.config = config
        self.device = next(network.parameters()).device
        # In place. The weights are the same, but their order in memory may change.
        self.network = network.to(memory_format=memory_format(self.device, precision))
        self.reference = reference
        self.lows = lows
        self.schedule = build_schedule(config.diffusion)  # On the processor: samplers know their steps there.
        self.precision = precision
        self.shape_CHW = (network.in_channels, network.image_size, network.image_size)
        # Models of a chain sample the same images, each from noise of its own.
        self._stage = (network.image_size,) if config.upsample.wanted and config.draws >= 3 else ()
        self._made: dict[tuple[str, bool], Callable[..., Tensor]] = {}

    def noise(self, wanted: Sequence[Request], seed: int) -> ImageNoise:
        """Return the noise of some images."""
        purpose = Purpose.UPSAMPLE if self._stage else Purpose.SAMPLE
        return ImageNoise(wanted, seed, self.shape_CHW, self.device, self.config.draws, purpose, self._stage)

    def given(self, wanted: Sequence[Request], seed: int) -> Tensor | None:
        """Return what a network that upsamples is given of the small images; None for another network."""
        upsample, (channels, size, _) = self.config.upsample, self.shape_CHW
        if upsample.factor is None or self.lows is None:
            return None
        shape = channels, size // upsample.factor, size // upsample.factor
        low_BChw = to_unit(self.lows(wanted)).to(self.device)
        if tuple(low_BChw.shape[1:]) != shape:
            raise ValueError(f"small images of {tuple(low_BChw.shape[1:])}; expected {shape}")
        level_B = torch.full((len(wanted),), upsample.sample_noise, device=self.device)
        noise = ImageNoise(wanted, seed, shape, self.device, self.config.draws, Purpose.LOW_SAMPLE, self._stage)
        return given(low_BChw, level_B, noise(), size)

    def denoiser(self, network: Callable[..., Tensor] | None = None, given_BCHW: Tensor | None = None) -> Denoiser:
        """Return the network, or a compiled form of it, as a denoiser without guidance. Each batch needs a new one.

        Args:
            network: the compiled form, or None.
            given_BCHW: the result of :meth:`given`; None also to look at the schedule alone.
        """
        network = self.network if network is None else network
        denoiser = Denoiser.from_config(network, self.config.diffusion, self.config.model, self.device)
        return denoiser.with_given(given_BCHW if self.config.upsample.wanted else None)

    def guided(self, denoiser: Denoiser, config: SampleConfig, steps: SamplingSteps | None = None) -> DenoiserFunction:
        """Return a denoiser with the configured guidance and clipping.

        Args:
            denoiser: the denoiser to guide.
            config: scale and interval of the guidance.
            steps: the steps at which it will be called; None: any. See :func:`decided`.
        """
        applies = known = None
        if config.guidance_interval:
            applies = between_levels(denoiser.schedule, *config.guidance_interval)
            if steps is not None:
                known = decided(between_levels(self.schedule, *config.guidance_interval), steps)
        reference = None
        if self.reference:
            reference = self.reference.at_levels_of(denoiser.schedule, denoiser.given_BCHW)
        wrapped = guided(denoiser, config.guidance, reference=reference, applies=applies, known=known)
        return clipped(wrapped) if config.clip_x0 else wrapped

    def at_levels_of(self, schedule: NoiseSchedule, given_BCHW: Tensor | None = None) -> DenoiserFunction:
        """Return this network as a denoiser of noisy images of another schedule.

        It rescales the images, and looks up timesteps by noise level. If it upsamples, it is given the same.
        """
        denoiser = self.denoiser(given_BCHW=given_BCHW)
        if schedule.equals(denoiser.schedule):
            return denoiser

        def translated(x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None) -> Tensor:
            alpha, sigma = schedule.at(t_B, x_BCHW)
            own_t_B = denoiser.schedule.position((sigma / alpha).flatten()).float()
            own_alpha, own_sigma = denoiser.schedule.at(own_t_B, x_BCHW)
            # At equal noise levels, this is own_alpha / alpha. It is also defined at alpha = 0 (pure noise).
            scale = torch.hypot(own_alpha, own_sigma) / torch.hypot(alpha, sigma)
            return denoiser(scale * x_BCHW, own_t_B, labels_B)

        return translated

    @torch.no_grad()
    def batch(
        self,
        wanted: Sequence[Request],
        config: SampleConfig,
        seed: int,
        callback: StepCallback | None = None,
        network: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Sample one batch of images: ``(B, C, H, W)`` float32 in [-1, 1] (unclipped), on the network's device."""
        noise = self.noise(wanted, seed)
        labels_B = torch.tensor([image.label for image in wanted], device=self.device)
        denoiser, steps = self.denoiser(network, self.given(wanted, seed)), steps_of(config, self.schedule)
        guided_denoiser = self.guided(denoiser, config, steps)
        return self.from_start(denoiser, guided_denoiser, noise(), labels_B, noise, config, steps, callback)

    def from_start(
        self,
        denoiser: Denoiser,
        guided_denoiser: DenoiserFunction,
        start_BCHW: Tensor,
        labels_B: Tensor,
        noise: NoiseFunction,
        config: SampleConfig,
        steps: SamplingSteps,
        callback: StepCallback | None = None,
    ) -> Tensor:
        """Sample one batch of images from initial noise of variance 1; the other arguments are those of samplers."""
        scale = start_scale(self.schedule, steps)
        with autocast(self.device, self.precision):
            sampler = build_sampler(config, denoiser)
            return sampler(guided_denoiser, scale * start_BCHW, steps, labels_B, noise=noise, callback=callback)

    def unrounded_batches(
        self, wanted: Sequence[Request], config: SampleConfig, seed: int, callback: StepCallback | None = None
    ) -> Iterator[tuple[Sequence[Request], Tensor]]:
        """Sample any number of images in batches of ``config.batch_size``, compiled as ``sample.compile`` says.

        Yields:
            The requests of a batch, and their images as :meth:`batch` returns them.
        """
        how = pick_sampling_compilation(config, self.network, self.device, len(wanted))
        for start in range(0, len(wanted), config.batch_size):
            batch = wanted[start : start + config.batch_size]
            # A last batch of another size is not compiled: it would need a compilation of its own.
            network = self._fast(how if len(batch) == config.batch_size else "none", config)
            with fastest_convolutions(self.config.train):
                images = self.batch(batch, config, seed, callback, network)
            yield batch, images

    def _fast(self, how: str, config: SampleConfig) -> Callable[..., Tensor]:
        """Return the network, compiled or not. On a GPU, record it as a CUDA graph if there are enough steps.

        Results are cached, because every recording takes about a second. Where only some steps are guided, a compiled
        network evaluates their doubled batch in two parts: one graph serves all steps.
        """
        replayed = is_replayed(config.cuda_graphs, self.device) and config.steps >= REPLAYED_FROM
        if (how, replayed) not in self._made:
            network = compiled(self.network) if how == "network" else self.network
            self._made[how, replayed] = ReplayedNetwork(network) if replayed else network
        network = self._made[how, replayed]
        return in_parts(network, config.batch_size) if how == "network" and config.guidance_interval else network

    def batches(
        self, wanted: Sequence[Request], config: SampleConfig, seed: int, *, progress: bool = False, finite: bool = True
    ) -> Iterator[tuple[Sequence[Request], Tensor]]:
        """Sample any number of images in batches, with a progress bar.

        Yields:
            The requests of a batch, and their images: ``(B, C, H, W)`` uint8 on the CPU.

        Raises:
            DataError: if an image is not finite, which ``finite`` forbids.
        """

        def advance(_index: int, x_BCHW: Tensor, _x0_BCHW: Tensor) -> None:
            bar.update(len(x_BCHW))

        with progress_of("sampling", len(wanted) * config.steps, "evaluation", shown=progress) as bar:
            for batch, x_BCHW in self.unrounded_batches(wanted, config, seed, advance):
                if finite and not bool(torch.isfinite(x_BCHW).all()):
                    raise DataError(f"sampled images are not finite; {NOT_FINITE_REMEDY}")
                yield batch, to_uint8(x_BCHW).cpu()

    def images(self, wanted: Sequence[Request], config: SampleConfig, seed: int, *, progress: bool = False) -> Tensor:
        """Sample any number of images: ``(N, C, H, W)`` uint8 on the CPU, black where they are not finite."""
        return torch.cat([images for _, images in self.batches(wanted, config, seed, progress=progress, finite=False)])

    def trajectory(
        self, wanted: Sequence[Request], config: SampleConfig, seed: int, keep: set[int], *, clean: bool = False
    ) -> list[Tensor]:
        """Sample images in batches. Return a frame before each of the steps in ``keep``, then the finished images.

        Args:
            wanted: the images.
            config: settings of the sampler.
            seed: seed of the images.
            keep: indices of steps, from 0.
            clean: show the network's estimates of the clean images instead of the noisy images.

        Returns:
            Frames of ``(N, C, H, W)`` uint8 on the CPU.
        """
        return _joined(both[clean] for both in self._trajectories(wanted, config, seed, keep))

    def trajectories(
        self, wanted: Sequence[Request], config: SampleConfig, seed: int, keep: set[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Sample images as :meth:`trajectory` does. Return the noisy frames, and what the network expected at each.

        The last frame of both is the finished images.
        """
        noisy, expected = zip(*self._trajectories(wanted, config, seed, keep), strict=True)
        return _joined(noisy), _joined(expected)

    def _trajectories(
        self, wanted: Sequence[Request], config: SampleConfig, seed: int, keep: set[int]
    ) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Yield the noisy and the expected frames of each batch of ``config.batch_size`` images."""
        frame = self.frame(config)
        for start in range(0, len(wanted), config.batch_size):
            frames: list[tuple[Tensor, Tensor]] = []

            def record(index: int, x_BCHW: Tensor, x0_BCHW: Tensor, kept: list[tuple[Tensor, Tensor]] = frames) -> None:
                if index in keep:
                    kept.append(frame(x_BCHW, x0_BCHW, index))

            batch = wanted[start : start + config.batch_size]
            finished = to_uint8(self.batch(batch, config, seed, record)).cpu()
            noisy, expected = zip(*frames, (finished, finished), strict=True)
            yield list(noisy), list(expected)

    def frame(self, config: SampleConfig) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
        """Return a function of noisy images, expected images and a step. It returns both as uint8 on the CPU."""
        levels = steps_of(config, self.schedule).levels

        def uint8(x_BCHW: Tensor, x0_BCHW: Tensor, index: int) -> tuple[Tensor, Tensor]:
            # Scale variance exploding images as in a variance preserving schedule.
            scale = 1.0 if self.schedule.variance_preserving else math.sqrt(1.0 + levels[index] ** 2)
            return to_uint8(x_BCHW / scale).cpu(), to_uint8(x0_BCHW).cpu()

        return uint8
