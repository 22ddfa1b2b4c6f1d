"""What the methods of step distillation share: a stage's settings, its teacher, distances and weights.

Axes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from diffusion_core.config import CoreConfig, StepsConfig
from diffusion_core.data.batches import Batches
from diffusion_core.diffusion.denoiser import Denoiser, DenoiserFunction, clipped
from diffusion_core.diffusion.draws import Draws, draw
from diffusion_core.diffusion.losses import shown_estimate
from diffusion_core.diffusion.schedule import NoiseSchedule, build_schedule
from diffusion_core.model.unet import UNet
from diffusion_core.sampling.guidance import between_levels, guided

CLEAN = -1.0
"""The timestep of the clean image, one before timestep 0."""

HUBER_C = 0.00054
"""Default of ``steps.huber_c`` per root of the number of values in an image (Song & Dhariwal 2023, section 3.3)."""


@dataclass(frozen=True)
class Lesson:
    """One stage of step distillation.

    Attributes:
        config: every knob of the core.
        steps: the knobs of step distillation.
        start: optimizer steps before the stage.
        end: its last step.
        count: steps an image of the student.
        guidance: guidance that the student is to learn from the teacher.
        start_level: noise level at which the student starts; None: the last one.
        teacher: the teacher network, in evaluation mode; None if the method needs none.
    """

    config: CoreConfig
    steps: StepsConfig
    start: int
    end: int
    count: int
    guidance: float
    start_level: float | None
    teacher: UNet | None = None

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule, on the processor: reading timesteps off a GPU would wait for it in every step."""
        return build_schedule(self.config.diffusion)

    @cached_property
    def known(self) -> int:
        """Number of timesteps up to the noise level at which the student starts."""
        return self.schedule.timesteps_to(self.start_level)

    def teach(self, denoiser: Denoiser) -> Denoiser:
        """Return the teacher as a denoiser like the student, without memory of earlier calls."""
        assert self.teacher is not None
        return like(denoiser, self.teacher)

    def guided(self, teacher: Denoiser) -> DenoiserFunction:
        """Return a teacher with the guidance and the clipping that it is sampled with.

        Guidance does not change images without label.
        """
        with_guidance = guided(teacher, self.guidance, applies=self.applies(teacher.schedule))
        return clipped(with_guidance) if self.config.sample.clip_x0 else with_guidance

    def applies(self, schedule: NoiseSchedule) -> Callable[[Tensor], Tensor] | None:
        """Return which timesteps are guided (``sample.guidance_interval``); None: all."""
        interval = self.config.sample.guidance_interval
        return between_levels(schedule, *interval) if interval else None

    def clip(self, x0_BCHW: Tensor) -> Tensor:
        """Return clean images, clipped if they are in sampling (``sample.clip_x0``)."""
        return x0_BCHW.clamp(-1.0, 1.0) if self.config.sample.clip_x0 else x0_BCHW

    def draw(self, step: int, batches: Batches, schedule: NoiseSchedule) -> Draws:
        """Return a training step's draws, with timesteps up to the noise level at which the student starts."""
        draws = draw(step, batches, self.config, schedule)
        known, t_B = self.known, draws.t_B
        if known < schedule.timesteps:
            t_B = t_B.clamp(max=known - 1) if t_B.is_floating_point() else t_B * known // schedule.timesteps
        return replace(draws, t_B=t_B.float())  # One type for all calls, so that a network is compiled once.

    def loss(self, student_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        """Return the distance of clean images, ``(B,)`` float32."""
        return distance(student_BCHW, target_BCHW, self.steps)


def like(denoiser: Denoiser, network: UNet) -> Denoiser:
    """Return another network as a denoiser of the same schedule, parametrisation and given images."""
    other = Denoiser(network, denoiser.schedule)
    other.record = denoiser.record
    other.learned_variance = denoiser.learned_variance
    other.self_conditioning = denoiser.self_conditioning
    return other.with_given(denoiser.given_BCHW)


def clean_image(denoiser: Denoiser, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor, shown_B: Tensor | None) -> Tensor:
    """Return a student's clean images in training. See :func:`~diffusion_core.diffusion.losses.shown_estimate`."""
    estimate_BCHW = shown_estimate(denoiser, x_BCHW, t_B, labels_B, shown_B)
    output, _ = denoiser.predict(x_BCHW, t_B, labels_B, estimate_BCHW)
    return denoiser.clean(output, x_BCHW, t_B)


def amplitudes(schedule: NoiseSchedule, t_B: Tensor, like_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma at timesteps, shaped to broadcast against images; 1 and 0 where ``t_B`` is ``CLEAN``."""
    alpha, sigma = schedule.at(t_B.clamp(min=0.0), like_BCHW)
    is_clean = (t_B < 0.0).view(-1, 1, 1, 1).to(like_BCHW.device)
    return torch.where(is_clean, 1.0, alpha), torch.where(is_clean, 0.0, sigma)


def follow(schedule: NoiseSchedule, x_BCHW: Tensor, clean_BCHW: Tensor, t_B: Tensor, later_B: Tensor) -> Tensor:
    """Return noisy images after a step of DDIM without noise (Song et al. 2021) from ``t_B`` to ``later_B``."""
    alpha, sigma = schedule.at(t_B, x_BCHW)
    alpha_later, sigma_later = amplitudes(schedule, later_B, x_BCHW)
    return alpha_later * clean_BCHW + sigma_later * (x_BCHW - alpha * clean_BCHW) / sigma


def distance(ours_BCHW: Tensor, theirs_BCHW: Tensor, steps: StepsConfig) -> Tensor:
    """Return the distance of images, ``(B,)`` float32: mean square, or pseudo-Huber of whole images.

    The pseudo-Huber distance is ``sqrt(|difference|^2 + c^2) - c`` (Song & Dhariwal 2023, eq. 7).
    """
    square_B = (ours_BCHW.float() - theirs_BCHW.float()).square().flatten(1).sum(dim=1)
    values = ours_BCHW[0].numel()
    if steps.loss == "l2":
        return square_B / values
    c = HUBER_C * math.sqrt(values) if steps.huber_c is None else steps.huber_c
    if c == 0.0:
        # The gradient of the norm at zero is not defined. Half the smallest float keeps it finite.
        return (square_B + torch.finfo(torch.float32).tiny).sqrt()
    return (square_B + c**2).sqrt() - c


def truncated_snr(schedule: NoiseSchedule, t_B: Tensor) -> Tensor:
    """Return the signal-to-noise ratio, at least 1, ``(B,)`` float32 (Salimans & Ho 2022, section 4)."""
    return schedule.level(t_B).pow(-2).clamp(min=1.0).float()
