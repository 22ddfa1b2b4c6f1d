"""Learning from a teacher besides the images: a pruned network from the dense one that it was.

Axes: B batch, C channels, H height, W width, N = H*W positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_core.unet import Level, UNet


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
        self._asked: tuple[Any, ...] = ()
        self._seen: dict[UNet, dict[str, Tensor]] = {student: {}, teacher: {}}
        self._student = student
        self._handles = [student.register_forward_pre_hook(self._note_question)]
        for network in (student, teacher):
            for name, module in watched(network).items():
                self._handles.append(module.register_forward_hook(self._note_answer(network, name)))

    def _note_question(self, _network: nn.Module, asked: tuple[Any, ...]) -> None:
        self._asked = asked

    def _note_answer(self, network: UNet, name: str) -> Callable[..., None]:
        def note(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self._seen[network][name] = output

        return note

    def loss(self) -> Tensor:
        """Unreduced, ``(B,)``, float32: of the batch that the student was called with last."""
        with torch.no_grad():
            self.teacher(*self._asked)
        ours, theirs = self._seen[self._student], self._seen[self.teacher]
        loss_B = torch.zeros(len(ours[""]), device=ours[""].device)
        if self.output:
            loss_B = loss_B + self.output * (ours[""].float() - theirs[""].float()).square().mean(dim=(1, 2, 3))
        if self.features:
            names = [name for name in ours if name]
            for name in names:
                distance = (activation_map(ours[name]) - activation_map(theirs[name])).square().mean(dim=1)
                loss_B = loss_B + self.features / len(names) * distance
        return loss_B

    def close(self) -> None:
        """Watch the networks no longer."""
        for handle in self._handles:
            handle.remove()


def watched(network: UNet) -> dict[str, nn.Module]:
    """The layers whose outputs are compared: the network itself (named ""), and the last block of each resolution."""
    layers: dict[str, nn.Module] = {"": network, "middle": network.middle[-1]}
    for way in ("down", "up"):
        for depth, level in enumerate(getattr(network, way)):
            assert isinstance(level, Level)
            layers[f"{way}.{depth}"] = level.blocks[-1]
    return layers


def activation_map(features_BCHW: Tensor) -> Tensor:
    """Where a layer is active, ``(B, N)`` float32: mean squares over channels, scaled to a mean square of 1."""
    map_BN = features_BCHW.float().square().mean(dim=1).flatten(1)
    return F.normalize(map_BN, dim=1) * map_BN.shape[1] ** 0.5
