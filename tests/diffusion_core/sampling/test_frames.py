"""Pictures taken from images that are sampled anyway are those that would be sampled for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import NUM_CLASSES, tiny_config, tiny_network
from torch import Tensor

from diffusion_core.data.datasets import to_uint8
from diffusion_core.sampling.frames import Frames
from diffusion_core.sampling.generation import Generator, requests, round_robin

EXPLODING = {"diffusion__prediction": "edm", "diffusion__schedule": "karras"}


@pytest.mark.parametrize("knobs", [{}, EXPLODING])
@pytest.mark.parametrize("batch_size", [5, 64])
def test_frames_are_those_of_a_sampling_of_their_own(batch_size: int, knobs: dict[str, Any]) -> None:
    config = tiny_config(sample__steps=4, sample__guidance=2.0, sample__batch_size=batch_size, **knobs)
    generator = Generator(tiny_network(config), config, "fp32")
    labels = range(NUM_CLASSES)
    sampled = round_robin(labels, range(4 * NUM_CLASSES + 1))
    wanted, moving, moments = requests(labels, 3), requests([0, NUM_CLASSES - 1], 2), {0, 2, 3}
    frames = Frames(sampled, wanted, moving, moments, generator.frame(config.sample))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch, images in generator.unrounded_batches(sampled, config.sample, 7, frames):
            yield to_uint8(images), torch.tensor([one.label for one in batch])

    assert not frames.is_complete
    passed = torch.cat([images for images, _ in frames.keep(batches())])
    assert len(passed) == len(sampled)
    assert frames.is_complete
    images, noisy, expected = frames.taken()
    alone = generator.trajectories(moving, config.sample, 7, moments)
    assert [len(noisy), len(expected)] == [4, 4]
    for found, one in zip((noisy, expected), alone, strict=True):
        for mine, theirs in zip(found, one, strict=True):
            assert (mine.int() - theirs.int()).abs().max() <= 1  # The batch may change the rounding.
    grid = generator.images(wanted, config.sample, 7)
    assert (images.int() - grid.int()).abs().max() <= 1
    assert noisy[0].int().sub(noisy[-1].int()).abs().max() > 20


def test_images_that_are_not_sampled_are_refused() -> None:
    generator = Generator(tiny_network(), tiny_config(), "fp32")
    frame = generator.frame(tiny_config().sample)
    with pytest.raises(ValueError, match="not in the list"):
        Frames(requests([0], 2), requests([0], 3), [], {0}, frame)
