"""Sums over the steps since the last row of figures. They are part of the training state: a row spans a stop."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

NAMES = ("loss", "norm")


class RowSums:
    """Loss and gradient norm, summed over the steps since the last row, and what these steps took.

    Attributes:
        steps: number of steps.
        skipped: number of steps among them that were skipped, as their gradients overflowed.
        seconds: their wall time, without callbacks.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.skipped = 0
        self.seconds = 0.0
        self._own: tuple[Tensor, Tensor] | None = None
        self._all: list[list[float]] = []
        """The sums of each process, if they are known: from a checkpoint, or by :meth:`share` after the last step."""

    def place(self, accelerator: Accelerator) -> None:
        """Continue, in this process and on its device, from the sums of a checkpoint. Other sums stay as they are."""
        if self._own is not None or not self._all:
            return
        if len(self._all) == accelerator.num_processes:
            own = self._all[accelerator.process_index]
        else:  # The run continues with another number of processes.
            own = [math.fsum(values) / len(self._all) for values in zip(*self._all, strict=True)]
        loss, norm = (torch.tensor(value, dtype=torch.float32, device=accelerator.device) for value in own)
        self._own = loss, norm

    def add(self, loss: Tensor, norm: Tensor, *, skipped: bool = False) -> None:
        """Count a step.

        Args:
            loss: its loss, a float32 scalar on the device of training.
            norm: the norm of its gradient, likewise.
            skipped: whether the step was skipped. Its norm then does not count.
        """
        if self._own is None:
            self._own = torch.zeros_like(loss), torch.zeros_like(norm)
        for total, value in zip(self._own, (loss,) if skipped else (loss, norm), strict=False):
            total += value
        self.steps += 1
        self.skipped += skipped
        self._all = []

    def means(self) -> Tensor:
        """Return the means of loss and norm over the steps, ``(2,)``, on the device. There is at least one step."""
        assert self._own is not None
        means = torch.stack(self._own) / self.steps
        if self.skipped:  # The norm is 0 if all were skipped.
            means[1] = self._own[1] / max(1, self.steps - self.skipped)
        return means

    def reset(self) -> None:
        """Begin the next row."""
        self.steps, self.skipped, self.seconds, self._own, self._all = 0, 0, 0.0, None, []

    def share(self, accelerator: Accelerator) -> None:
        """Collect the sums of all processes, each of which calls this before the first one writes a checkpoint."""
        if accelerator.num_processes > 1 and self._own is not None:
            self._all = accelerator.gather(torch.stack(self._own)[None]).tolist()

    def stored(self) -> dict[str, Any]:
        """Return the sums as JSON. Every float32 is exact. This waits for the device."""
        everyone = self._all
        if not everyone and self._own is not None:
            everyone = [torch.stack(self._own).tolist()]
        shown = [[value if math.isfinite(value) else str(value) for value in sums] for sums in everyone]
        skipped = {"skipped": self.skipped} if self.skipped else {}
        return {"steps": self.steps, "seconds": self.seconds, "sums": shown, **skipped}

    @classmethod
    def restored(cls, stored: Any) -> RowSums:
        """Return the sums that :meth:`stored` described. None, of an old checkpoint, gives empty ones.

        Raises:
            ValueError: if they are damaged.
        """
        self = cls()
        if stored is None:
            return self
        try:
            self.steps, self.seconds = int(stored["steps"]), float(stored["seconds"])
            self.skipped = int(stored.get("skipped", 0))
            self._all = [[float(value) for value in sums] for sums in stored["sums"]]
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"no sums of a row ({error!r})") from None
        finite = math.isfinite(self.seconds) and self.seconds >= 0
        if not 0 <= self.skipped <= self.steps or not finite or any(len(sums) != len(NAMES) for sums in self._all):
            raise ValueError("no sums of a row")
        if bool(self.steps) != bool(self._all):
            raise ValueError("steps without sums, or sums without steps")
        return self
