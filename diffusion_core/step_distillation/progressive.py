"""Progressive distillation (Salimans & Ho 2022): one step of the student replaces two of its teacher.

Axes: B batch, C channels, H height, W width, S timesteps.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from diffusion_core.data.batches import Batches
from diffusion_core.diffusion.denoiser import Denoiser
from diffusion_core.diffusion.draws import Draws
from diffusion_core.diffusion.sampling_steps import Spacing
from diffusion_core.diffusion.schedule import NoiseSchedule
from diffusion_core.hardware import sent
from diffusion_core.step_distillation.teaching import CLEAN, Lesson, amplitudes, clean_image, follow, truncated_snr

SPACING: Spacing = "trailing"
"""The spacing whose steps nest: those of a student are every second one of its teacher's."""


class ProgressiveDistillation:
    """The objective of one stage. The student learns where two DDIM steps of the teacher lead.

    Args:
        lesson: the stage, and its teacher.
    """

    def __init__(self, lesson: Lesson) -> None:
        assert lesson.teacher is not None
        self.lesson = lesson
        steps, level = lesson.schedule.steps, lesson.start_level
        self.visited = torch.tensor([*steps(lesson.count, SPACING, level).timesteps, CLEAN])
        self.between = torch.tensor(steps(2 * lesson.count, SPACING, level).timesteps[1::2])

    def draw(self, step: int, batches: Batches, schedule: NoiseSchedule) -> Draws:
        """Return a step's draws: a timestep of the student, and in ``later_BS`` the next two of the teacher."""
        draws, count = self.lesson.draw(step, batches, schedule), self.lesson.count
        # The noisiest of the student's steps comes first.
        index_B = (count - 1 - (draws.t_B.double() * count / self.lesson.known).floor().long()).clamp(0, count - 1)
        device = draws.t_B.device
        grid, middle = sent(self.visited, device), sent(self.between, device)
        later_BS = torch.stack([middle[index_B], grid[index_B + 1]], dim=1)
        return replace(draws, t_B=grid[index_B].float(), later_BS=later_BS.float())

    def loss(self, denoiser: Denoiser, draws: Draws) -> Tensor:
        """Return the weighted distance of the student's clean image from the target, ``(B,)`` float32."""
        assert draws.later_BS is not None
        t_B, (middle_B, end_B) = draws.t_B, draws.later_BS.unbind(dim=1)
        schedule = denoiser.schedule
        x_BCHW = schedule.add_noise(draws.x0_BCHW, draws.noise_BCHW, t_B)
        with torch.no_grad():
            target_BCHW = self.target(denoiser, x_BCHW, t_B, middle_B, end_B, draws.labels_B)
        ours_BCHW = clean_image(denoiser, x_BCHW, t_B, draws.labels_B, draws.shown_B)
        loss_B = self.lesson.loss(ours_BCHW, target_BCHW)
        if self.lesson.steps.weighting == "uniform":
            return loss_B
        return loss_B * truncated_snr(schedule, t_B)

    def target(
        self,
        denoiser: Denoiser,
        x_BCHW: Tensor,
        t_B: Tensor,
        middle_B: Tensor,
        end_B: Tensor,
        labels_B: Tensor,
    ) -> Tensor:
        """Return the clean images with which one step leads where two of the teacher do (algorithm 2)."""
        schedule = denoiser.schedule
        teacher = self.lesson.guided(self.lesson.teach(denoiser))
        middle_BCHW = follow(schedule, x_BCHW, teacher(x_BCHW, t_B, labels_B), t_B, middle_B)
        end_BCHW = follow(schedule, middle_BCHW, teacher(middle_BCHW, middle_B, labels_B), middle_B, end_B)
        alpha, sigma = schedule.at(t_B, x_BCHW)
        alpha_end, sigma_end = amplitudes(schedule, end_B, x_BCHW)
        ratio = sigma_end / sigma
        return (end_BCHW - ratio * x_BCHW) / (alpha_end - ratio * alpha)
