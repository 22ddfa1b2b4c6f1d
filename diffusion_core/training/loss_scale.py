"""Loss scaling for float16, whose smallest numbers are larger than many gradients (Micikevicius et al. 2018).

The loss is multiplied by a scale before the backward pass, and gradients are divided by it before they are used. If a
gradient overflows, the step is skipped and the scale is halved. After many steps without overflow it is doubled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusion_core.hardware import Precision

LEAST_SCALE = 2.0**-14
"""Scale below which gradients are not finite for another reason than scaling."""


class LossScale:
    """The scale of a training, which checkpoints store. With other precisions than fp16 it does nothing.

    Attributes:
        skipped: whether the last step was skipped.
    """

    def __init__(self) -> None:
        self.skipped = False
        self._scaler: torch.amp.GradScaler | None = None
        self._stored: dict[str, Any] | None = None

    def place(self, device: torch.device, precision: Precision) -> None:
        """Begin, or continue from the scale of a checkpoint, if the precision needs one."""
        if precision != "fp16":
            self._scaler = None
        elif self._scaler is None:
            self._scaler = torch.amp.GradScaler(device.type)
            if self._stored is not None:
                self._scaler.load_state_dict(self._stored)

    @property
    def value(self) -> float | None:
        """The scale, or None if losses are not scaled. This waits for the device."""
        return None if self._scaler is None else self._scaler.get_scale()

    @property
    def is_exhausted(self) -> bool:
        """Whether gradients overflow at any scale."""
        return self.value is not None and self.value < LEAST_SCALE

    def describe(self) -> str:
        """Describe an exhausted scale, as a part of a message; empty for others."""
        return f"gradients are not finite at a loss scale of {self.value:g}: " if self.is_exhausted else ""

    def scaled(self, loss: Tensor) -> Tensor:
        """Return a loss to run the backward pass from."""
        return loss if self._scaler is None else self._scaler.scale(loss)

    def step(self, optimizer: torch.optim.Optimizer, clip: Callable[[], Tensor]) -> Tensor:
        """Divide the gradients by the scale, clip them, and update the weights unless a gradient is not finite.

        Args:
            optimizer: its gradients are those of scaled losses.
            clip: clips the gradients and returns their norm.

        Returns:
            That norm. With a scale, this waits for the device.
        """
        if self._scaler is None:
            norm = clip()
            optimizer.step()
            return norm
        self._scaler.unscale_(optimizer)
        norm = clip()
        before = self._scaler.get_scale()
        self._scaler.step(optimizer)
        self._scaler.update()
        self.skipped = self._scaler.get_scale() < before
        return norm

    def stored(self) -> dict[str, Any] | None:
        """Return the scale as JSON, or None if losses are not scaled."""
        return self._stored if self._scaler is None else self._scaler.state_dict()

    @classmethod
    def restored(cls, stored: Any) -> LossScale:
        """Return the scale that :meth:`stored` described. None gives a new one.

        Raises:
            ValueError: if it is damaged.
        """
        self = cls()
        if stored is None:
            return self
        expected = torch.amp.GradScaler("cpu").state_dict()
        if not isinstance(stored, dict) or stored.keys() != expected.keys():
            raise ValueError("no scale of losses")
        numbers = all(type(value) in (int, float) and math.isfinite(value) for value in stored.values())
        if not numbers or stored["scale"] <= 0 or stored["_growth_tracker"] < 0:
            raise ValueError("no scale of losses")
        self._stored = dict(stored)
        return self
