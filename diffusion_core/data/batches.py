"""Training batches. Which images form the batch of step n is a pure function of the seed and n.

Axes: N images of a data set, B batch, C channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_core.data.datasets import Images, to_unit
from diffusion_core.hardware import sent
from diffusion_core.randomness import Purpose, Streams, streams
from diffusion_core.randomness.ahead import Ahead

DEVICE_SHARE = 0.25
"""Share of a GPU's free memory that a data set may take up; a larger one stays in main memory."""


class Batches:
    """Training batches: ``batches.at(step)`` depends on the seed and the step alone.

    Every epoch shows each image once, in an order of its own; batches run on across the ends of epochs.

    Args:
        images: the training images; copied to ``device`` where they fit.
        batch_size: images a batch, over all processes.
        seed: the run's seed.
        draws: version of the random draws.
        horizontal_flip: mirror each image with probability 1/2.
        device: where batches are wanted.
        rank: this process; it gets its share of every batch, in order.
        world_size: number of processes; must divide ``batch_size``.
    """

    def __init__(
        self,
        images: Images,
        *,
        batch_size: int,
        seed: int,
        draws: int = 2,
        horizontal_flip: bool,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert batch_size % world_size == 0
        self.images = images.to(device) if _fits(images.images_NCHW, device) else images
        self.batch_size = batch_size
        self.seed = seed
        self.draws = draws
        self.horizontal_flip = horizontal_flip
        self.device = device
        local = batch_size // world_size
        self.share = slice(rank * local, (rank + 1) * local)
        self._orders: dict[int, Tensor] = {}
        numbers = batch_size * images.images_NCHW[0].numel()
        self._ahead = {
            purpose: Ahead(draws, (seed, purpose), count, place)
            for purpose, count, place in (
                (Purpose.NOISE, numbers, device),
                (Purpose.LOW_NOISE, numbers, device),
                (Purpose.AUGMENT, batch_size, torch.device("cpu")),  # Its numbers decide how many images to mirror.
            )
        }

    def stream(self, purpose: Purpose, step: int) -> Streams:
        """Return the random stream of a step, one of NOISE, LOW_NOISE (on the batches' device) and AUGMENT (CPU)."""
        return self._ahead[purpose].at(step)

    def indices(self, step: int) -> Tensor:
        """Which images form the batch of a step, for all processes, ``(batch_size,)``."""
        total = len(self.images)
        first = step * self.batch_size
        epochs = range(first // total, (first + self.batch_size - 1) // total + 1)
        offset = first - epochs[0] * total
        parts = [self._order(epoch) for epoch in epochs]
        if len(parts) == 1:
            return parts[0][offset : offset + self.batch_size]
        return torch.cat(parts)[offset : offset + self.batch_size]

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            (order,) = streams(self.draws, [(self.seed, Purpose.ORDER, epoch)]).permutation(len(self.images))
            order = sent(order, self.images.labels_N.device)
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1} | {epoch: order}
        return self._orders[epoch]

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """This process's share of the batch of a step: images ``(B, C, H, W)`` in [-1, 1], labels ``(B,)``."""
        batch = self.images.select(self.indices(step)[self.share])
        images_BCHW, labels_B = sent(batch.images_NCHW, self.device), sent(batch.labels_N, self.device)
        if self.horizontal_flip:
            (draws_B,) = self.stream(Purpose.AUGMENT, step).uniform(self.batch_size)
            mirrored = sent((draws_B[self.share] < 0.5).nonzero().flatten(), self.device)
            images_BCHW.index_copy_(0, mirrored, images_BCHW.index_select(0, mirrored).flip(3))
        return to_unit(images_BCHW), labels_B


def _fits(tensor: Tensor, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return tensor.nbytes <= DEVICE_SHARE * free
