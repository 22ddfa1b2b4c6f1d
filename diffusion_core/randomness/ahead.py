"""Draw the random numbers of consecutive steps together.

The numbers of one step of a small network are too few for a GPU: launching the kernels that compute them takes longer
than the step itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusion_core.randomness.streams import Streams, streams

MOST_STEPS = 64
MOST_NUMBERS = {"cpu": 2**15, "cuda": 2**21}
"""Random numbers that are drawn together, by kind of device. Each takes 32 bytes while it is computed."""


class Ahead:
    """The random streams of steps, ``(*key, step)``, each at its start. A step's numbers are those of its own stream.

    All steps must make the same calls, in the same order.

    Args:
        version: version of the random draws.
        key: what the streams of all steps have in common.
        numbers: how many numbers a step draws, roughly.
        device: device of the numbers.
    """

    def __init__(self, version: int, key: tuple[int, ...], numbers: int, device: torch.device) -> None:
        self.version, self.key, self.device = version, key, device
        most = MOST_NUMBERS.get(device.type, MOST_NUMBERS["cpu"])
        self.together = max(1, min(MOST_STEPS, most // max(1, numbers)))
        self._first = -1
        self._source: Streams
        self._drawn: list[tuple[Any, Tensor]] = []

    def at(self, step: int) -> Streams:
        """Return the stream of a step, at its start."""
        first = step - step % self.together
        if first != self._first:
            keys = [(*self.key, number) for number in range(first, first + self.together)]
            self._first, self._source, self._drawn = first, streams(self.version, keys, self.device), []
        return _OfOneStep(self, step - first)

    def drawn(self, number: int, method: str, *arguments: Any) -> Tensor:
        """Return the result of a step's call, by its number, for all steps that are drawn together."""
        call = method, arguments
        if number == len(self._drawn):
            self._drawn.append((call, getattr(self._source, method)(*arguments)))
        made, result = self._drawn[number]
        assert made == call, f"steps that are drawn together made different calls: {made}, then {call}"
        return result


class _OfOneStep:
    """The numbers of one step, out of those of all steps that were drawn together."""

    def __init__(self, ahead: Ahead, row: int) -> None:
        self._ahead, self._row, self._calls = ahead, row, 0

    def _next(self, method: str, *arguments: Any) -> Tensor:
        numbers = self._ahead.drawn(self._calls, method, *arguments)
        self._calls += 1
        return numbers[self._row : self._row + 1]

    def normal(self, *shape: int) -> Tensor:
        return self._next("normal", *shape)

    def normal_float64(self, *shape: int) -> Tensor:
        return self._next("normal_float64", *shape)

    def uniform(self, *shape: int) -> Tensor:
        return self._next("uniform", *shape)

    def integers(self, high: int, *shape: int) -> Tensor:
        return self._next("integers", high, *shape)

    def permutation(self, total: int) -> Tensor:
        return self._next("permutation", total)
