"""Record what a network was asked last, what it answered, and its feature maps. Distillation compares two records."""

from __future__ import annotations

from torch import Tensor


class Watch:
    """A record of the last call of a network: inputs, output, and feature maps.

    A network fills the record that it holds (:attr:`UNet.watch <diffusion_core.model.unet.UNet.watch>`), also if it is
    compiled. Hooks would not work there: a compiled network skips those registered after compilation.

    Attributes:
        asked: inputs of the call.
        answer: output of the call.
        features: outputs of the last residual block of each level on the way down, of the middle, and of each level on
            the way up.
    """

    def __init__(self) -> None:
        self.asked: tuple[Tensor | None, ...] = ()
        self.answer: Tensor | None = None
        self.features: list[Tensor] = []

    def taken(self) -> tuple[tuple[Tensor | None, ...], Tensor, list[Tensor]]:
        """Return what the last call left, and forget it: kept, it would keep the call's graph for gradients alive."""
        assert self.answer is not None
        last = self.asked, self.answer, self.features
        self.asked, self.answer, self.features = (), None, []
        return last

    def __deepcopy__(self, _memo: object) -> None:
        """Return None: a copy of a network is not watched."""
