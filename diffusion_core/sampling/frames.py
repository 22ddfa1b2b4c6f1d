"""Keep some images, and frames of their sampling, while a longer list of images is sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from diffusion_core.sampling.generation import Request

FrameOf = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Maps noisy images, expected images and a step to their frames, uint8 on the CPU."""


class Frames:
    """What a grid and a GIF need of a list of images that is sampled for another purpose.

    Args:
        sampled: the list, in the order in which one process samples it.
        wanted: images to keep.
        moving: images whose frames to keep.
        moments: steps before which a frame is kept.
        frame: makes frames, as :meth:`~diffusion_core.sampling.generation.Generator.frame` does.

    Raises:
        ValueError: if the list lacks an image.
    """

    def __init__(
        self,
        sampled: Sequence[Request],
        wanted: Sequence[Request],
        moving: Sequence[Request],
        moments: set[int],
        frame: FrameOf,
    ) -> None:
        places = {request: place for place, request in enumerate(sampled)}
        if not places.keys() >= {*wanted, *moving}:
            raise ValueError("some images are not in the list")
        self.wanted, self.moving = [places[one] for one in wanted], [places[one] for one in moving]
        self.moments, self.frame = moments, frame
        self._images: dict[int, Tensor] = {}
        self._frames: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._start = self._next = 0

    def __call__(self, index: int, x_BCHW: Tensor, x0_BCHW: Tensor) -> None:
        """Keep frames of a batch: a callback of samplers, which is called at every step of each batch in turn."""
        if index == 0:
            self._start, self._next = self._next, self._next + len(x_BCHW)
        inside = [place for place in self.moving if self._start <= place < self._next]
        if inside and index in self.moments:
            rows = [place - self._start for place in inside]
            for place, noisy, expected in zip(inside, *self.frame(x_BCHW[rows], x0_BCHW[rows], index), strict=True):
                self._frames[index, place] = noisy, expected

    def keep(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of uint8 images and their labels as they are, and keep images."""
        start, kept = 0, {*self.wanted, *self.moving}
        for images_BCHW, labels_B in batches:
            inside = range(start, start + len(images_BCHW))
            self._images |= {place: images_BCHW[place - start] for place in inside if place in kept}
            start = inside.stop
            yield images_BCHW, labels_B

    @property
    def is_complete(self) -> bool:
        """Whether the whole list was sampled."""
        return self._images.keys() >= {*self.wanted, *self.moving}

    def taken(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the wanted images, the noisy frames, and the expected frames; the last frame of both is the images."""

        def side(number: int) -> list[Tensor]:
            frames = [[self._frames[moment, place][number] for place in self.moving] for moment in sorted(self.moments)]
            return [torch.stack(images) for images in [*frames, [self._images[place] for place in self.moving]]]

        return torch.stack([self._images[place] for place in self.wanted]), side(0), side(1)
