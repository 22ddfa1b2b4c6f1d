"""Consistency models: a trained network learns to name the end of the path that leads through a noisy image.

Its clean images at a noise level and at a lower one, on the same path, become equal (Song et al. 2023). In consistency
tuning the data tell where the path leads. At first the lower level is far away, which is close to what the network has
learned. It then comes closer (Geng et al. 2024), at last to the timestep before. In consistency distillation a teacher
tells where the path leads.
Axes: B batch, C channels, H height, W width, S timesteps.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from diffusion_core.data.batches import Batches
from diffusion_core.diffusion.denoiser import Denoiser
from diffusion_core.diffusion.draws import Draws
from diffusion_core.diffusion.schedule import NoiseSchedule
from diffusion_core.model.unet import NO_LABEL
from diffusion_core.step_distillation.teaching import CLEAN, Lesson, amplitudes, clean_image, follow, truncated_snr

WIDER, STEEPNESS = 8.0, 1.0
"""``k`` and ``b`` of the mapping of Geng et al. 2024: small noise levels start from a wider distance."""


def lower_level(level_B: Tensor, doubling: int) -> Tensor:
    """Return the lower noise level of each pair: ``r = t (1 - n(t) / 2^a)``, at least 0 (Geng et al. 2024, section 3).

    ``n(t) = 1 + 8 sigmoid(-t)``, and ``a`` is the number of doublings so far.

    Args:
        level_B: noise levels ``sigma / alpha``.
        doubling: ``a``, from 1.
    """
    share_B = (1.0 + WIDER * torch.sigmoid(-STEEPNESS * level_B)) * 2.0**-doubling
    return level_B * (1.0 - share_B).clamp(min=0.0)


class ConsistencyTuning:
    """The objective of consistency tuning.

    The lower image is that of the same noise. With guidance, the data image is moved by what guidance adds to the
    teacher's estimate, so that the pair is on a path of the guided model. The target is the student's own answer at the
    lower level, without gradient and without dropout; at level 0 it is the clean image.

    Args:
        lesson: the stage. Its teacher is used with guidance only.
    """

    def __init__(self, lesson: Lesson) -> None:
        self.lesson = lesson

    def doubling(self, step: int) -> int:
        """Return how often the distance of the noise levels has been halved, from 1 to ``steps.doublings``."""
        lesson = self.lesson
        done = lesson.steps.doublings * (step - lesson.start) // max(1, lesson.end - lesson.start)
        return 1 + min(done, lesson.steps.doublings - 1)

    def draw(self, step: int, batches: Batches, schedule: NoiseSchedule) -> Draws:
        """Return a step's draws. ``later_BS`` holds the timestep of the lower noise level."""
        draws = self.lesson.draw(step, batches, schedule)
        lower_B = lower_level(schedule.level(draws.t_B), self.doubling(step))
        is_clean = lower_B < schedule.level(torch.zeros_like(draws.t_B))
        later_B = torch.where(is_clean, CLEAN, schedule.position(lower_B))
        # Closer than one timestep, the pair hardly differs: the student would learn from its own errors.
        later_B = torch.minimum(later_B, draws.t_B - 1.0)
        return replace(draws, later_BS=torch.where(later_B < 0.0, CLEAN, later_B).float()[:, None])

    def loss(self, denoiser: Denoiser, draws: Draws) -> Tensor:
        """Return the weighted distance of the two clean images, ``(B,)`` float32."""
        assert draws.later_BS is not None
        t_B, later_B, labels_B = draws.t_B, draws.later_BS[:, 0], draws.labels_B
        schedule = denoiser.schedule
        x_BCHW = schedule.add_noise(draws.x0_BCHW, draws.noise_BCHW, t_B)
        with torch.no_grad():
            data_BCHW = self._towards(denoiser, x_BCHW, draws)
            later_BCHW = follow(schedule, x_BCHW, data_BCHW, t_B, later_B)
            target_BCHW = self._own_answer(denoiser, later_BCHW, later_B.clamp(min=0.0), draws)
            is_clean = (later_B < 0.0)[:, None, None, None]
            target_BCHW = self.lesson.clip(torch.where(is_clean, data_BCHW, target_BCHW))
        ours_BCHW = clean_image(denoiser, x_BCHW, t_B, labels_B, draws.shown_B)
        return self.lesson.loss(ours_BCHW, target_BCHW) * self._weight(schedule, t_B, later_B, x_BCHW)

    def _towards(self, denoiser: Denoiser, x_BCHW: Tensor, draws: Draws) -> Tensor:
        """Return the clean images that the path of each noisy image leads towards."""
        if self.lesson.teacher is None:
            return draws.x0_BCHW
        return draws.x0_BCHW + self._guidance(denoiser, x_BCHW, draws)

    def _guidance(self, denoiser: Denoiser, x_BCHW: Tensor, draws: Draws) -> Tensor:
        """Return what guidance adds to the teacher's estimate of the clean images."""
        lesson, teacher = self.lesson, self.lesson.teach(denoiser)
        labels = torch.cat([draws.labels_B, torch.full_like(draws.labels_B, NO_LABEL)])
        both = teacher(x_BCHW.repeat(2, 1, 1, 1), draws.t_B.repeat(2), labels)
        with_label, without = both.chunk(2)
        guided = without + lesson.guidance * (with_label - without)
        added = lesson.clip(guided) - lesson.clip(with_label)
        applies = lesson.applies(denoiser.schedule)
        return added if applies is None else added * applies(draws.t_B)[:, None, None, None]

    def _own_answer(self, denoiser: Denoiser, x_BCHW: Tensor, t_B: Tensor, draws: Draws) -> Tensor:
        """Return the student's clean images without dropout."""
        network = denoiser.network
        if not (isinstance(network, nn.Module) and network.training):
            return clean_image(denoiser, x_BCHW, t_B, draws.labels_B, draws.shown_B)
        network.eval()
        try:
            return clean_image(denoiser, x_BCHW, t_B, draws.labels_B, draws.shown_B)
        finally:
            network.train()

    def _weight(self, schedule: NoiseSchedule, t_B: Tensor, later_B: Tensor, like_BCHW: Tensor) -> Tensor:
        """Return the weight of each image, ``(B,)`` float32."""
        how = self.lesson.steps.weighting
        if how in ("auto", "uniform"):
            return torch.ones_like(t_B)
        if how == "truncated_snr":
            return truncated_snr(schedule, t_B)
        alpha, sigma = amplitudes(schedule, later_B, like_BCHW)
        return (schedule.level(t_B) - (sigma / alpha).flatten()).reciprocal().float()


class ConsistencyDistillation(ConsistencyTuning):
    """The objective of consistency distillation (Song et al. 2023, algorithm 2).

    The lower image is where the teacher leads, so that pairs do not scatter as with data. The distance of the two noise
    levels is that of ``steps.doublings`` from the first step on.
    """

    def doubling(self, step: int) -> int:
        """Return ``steps.doublings``."""
        return self.lesson.steps.doublings

    def _towards(self, denoiser: Denoiser, x_BCHW: Tensor, draws: Draws) -> Tensor:
        """Return the mean of the teacher's clean images at both ends of a step, as in Heun's method.

        By its clean image at the start alone, steps of this distance lose a tenth of the variance of digits.
        """
        assert draws.later_BS is not None
        teacher = self.lesson.guided(self.lesson.teach(denoiser))
        t_B, later_B, labels_B = draws.t_B, draws.later_BS[:, 0], draws.labels_B
        first_BCHW = teacher(x_BCHW, t_B, labels_B)
        there_BCHW = follow(denoiser.schedule, x_BCHW, first_BCHW, t_B, later_B)
        second_BCHW = teacher(there_BCHW, later_B.clamp(min=0.0), labels_B)
        is_clean = (later_B < 0.0)[:, None, None, None]
        return torch.where(is_clean, first_BCHW, 0.5 * (first_BCHW + second_BCHW))
