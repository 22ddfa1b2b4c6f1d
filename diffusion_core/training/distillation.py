"""Learning from a teacher besides the images: a pruned network from the dense one that it was.

Axes: B batch, C channels, H height, W width, N = H*W positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_core.model.unet import UNet, Watch


class Distillation:
    """A further loss, of what the student answered when it was last called, against the teacher's answer to the same.

    Args:
        teacher: its weights stay as they are.
        student: the network in training.
        output: weight of the mean squared distance between the answers (Hinton et al. 2015, for regression).
        features: weight of the mean squared distance between activation maps (Zagoruyko & Komodakis 2017).

    Raises:
        ValueError: if the teacher answers to other inputs than the student.
    """

    def __init__(self, teacher: UNet, student: UNet, output: float, features: float) -> None:
        for name in ("image_size", "num_classes", "input_channels"):
            if getattr(teacher, name) != getattr(student, name):
                raise ValueError(f"the teacher's {name} is {getattr(teacher, name)}, not {getattr(student, name)}")
        if teacher.conv_out.out_channels != student.conv_out.out_channels or len(teacher.down) != len(student.down):
            raise ValueError("the teacher answers otherwise: with other channels, or over other resolutions")
        self.teacher = teacher.eval().requires_grad_(False)
        self.output = output
        self.features = features
        self._student = student
        self._watch = student.watch = Watch()

    def loss(self) -> Tensor:
        """Unreduced, ``(B,)``, float32: of the batch that the student was called with last."""
        ours, theirs = self._watch, Watch()
        before, self.teacher.watch = self.teacher.watch, theirs
        try:
            with torch.no_grad():
                self.teacher(*ours.asked)
        finally:
            self.teacher.watch = before
        assert ours.answer is not None
        assert theirs.answer is not None
        loss_B = torch.zeros(len(ours.answer), device=ours.answer.device)
        if self.output:
            loss_B = loss_B + self.output * (ours.answer.float() - theirs.answer.float()).square().mean(dim=(1, 2, 3))
        if self.features:
            for our_BCHW, their_BCHW in zip(ours.features, theirs.features, strict=True):
                distance = (activation_map(our_BCHW) - activation_map(their_BCHW)).square().mean(dim=1)
                loss_B = loss_B + self.features / len(ours.features) * distance
        return loss_B

    def close(self) -> None:
        """Watch the student no longer."""
        if self._student.watch is self._watch:
            self._student.watch = None


def activation_map(features_BCHW: Tensor) -> Tensor:
    """Where a layer is active, ``(B, N)`` float32: mean squares over channels, scaled to a mean square of 1."""
    map_BN = features_BCHW.float().square().mean(dim=1).flatten(1)
    return F.normalize(map_BN, dim=1) * map_BN.shape[1] ** 0.5
