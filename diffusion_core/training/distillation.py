"""Train a student network with a teacher, such as a pruned network with the dense one that it was made from.

Axes: B batch, C channels, H height, W width, N = H*W positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_core.model.unet import UNet
from diffusion_core.model.watch import Watch


class Distillation:
    """A loss between the student's last output and the teacher's output for the same inputs.

    Args:
        teacher: its weights do not change.
        student: the network in training.
        output: weight of the mean squared distance between the outputs (Hinton et al. 2015, for regression).
        features: weight of the mean squared distance between activation maps (Zagoruyko & Komodakis 2017).

    Raises:
        ValueError: if the teacher takes other inputs than the student, or returns other outputs.
    """

    def __init__(self, teacher: UNet, student: UNet, output: float, features: float) -> None:
        for name in ("image_size", "num_classes", "input_channels"):
            if getattr(teacher, name) != getattr(student, name):
                raise ValueError(f"the teacher's {name} is {getattr(teacher, name)}, not {getattr(student, name)}")
        if teacher.conv_out.out_channels != student.conv_out.out_channels or len(teacher.down) != len(student.down):
            raise ValueError("the teacher has other output channels or other resolutions than the student")
        self.teacher = teacher.eval().requires_grad_(False)
        self.output = output
        self.features = features
        self._student = student
        self._watch = student.watch = Watch()

    def loss(self) -> Tensor:
        """Return the unreduced loss, ``(B,)``, float32, of the batch that the student was called with last."""
        asked, ours_BCHW, our_maps = self._watch.taken()
        before, self.teacher.watch = self.teacher.watch, Watch()
        try:
            with torch.no_grad():
                self.teacher(*asked)
            _, theirs_BCHW, their_maps = self.teacher.watch.taken()
        finally:
            self.teacher.watch = before
        loss_B = torch.zeros(len(ours_BCHW), device=ours_BCHW.device)
        if self.output:
            loss_B = loss_B + self.output * (ours_BCHW.float() - theirs_BCHW.float()).square().mean(dim=(1, 2, 3))
        if self.features:
            for our_BCHW, their_BCHW in zip(our_maps, their_maps, strict=True):
                distance = (activation_map(our_BCHW) - activation_map(their_BCHW)).square().mean(dim=1)
                loss_B = loss_B + self.features / len(our_maps) * distance
        return loss_B

    def close(self) -> None:
        """Stop recording the student's activations."""
        if self._student.watch is self._watch:
            self._student.watch = None


def activation_map(features_BCHW: Tensor) -> Tensor:
    """Return mean squares over channels, ``(B, N)`` float32, scaled to a mean square of 1."""
    map_BN = features_BCHW.float().square().mean(dim=1).flatten(1)
    return F.normalize(map_BN, dim=1) * map_BN.shape[1] ** 0.5
