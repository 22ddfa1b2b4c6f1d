"""Numbers that are drawn for several steps together are each step's own."""

from __future__ import annotations

import pytest
import torch

from diffusion_core.randomness import Purpose, Streams, streams
from diffusion_core.randomness.ahead import MOST_NUMBERS, MOST_STEPS, Ahead

CPU = torch.device("cpu")
KEY = 5, Purpose.NOISE


def some(source: Streams) -> list[torch.Tensor]:
    return [
        source.normal(3, 2),
        source.integers(1000, 7),
        source.uniform(7),
        source.normal_float64(3),
        source.permutation(5),
        source.normal(3, 2),
    ]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("numbers", [1, 2**13, 2**40])
def test_a_step_gets_the_numbers_of_its_own_stream(version: int, numbers: int) -> None:
    ahead = Ahead(version, KEY, numbers, CPU)
    for step in (0, 1, 2, 3, 4, 5, 64, 63, 7, 7, 1_000_003):  # A resumed run begins anywhere; validation goes back.
        alone = some(streams(version, [(*KEY, step)]))
        for given, expected in zip(some(ahead.at(step)), alone, strict=True):
            assert torch.equal(given, expected)
            assert given.dtype == expected.dtype


def test_few_numbers_are_drawn_for_many_steps_at_once_and_many_for_one() -> None:
    assert Ahead(2, KEY, 1, CPU).together == MOST_STEPS
    assert Ahead(2, KEY, MOST_NUMBERS["cpu"] // 4, CPU).together == 4
    assert Ahead(2, KEY, 2**40, CPU).together == 1


def test_steps_that_draw_differently_are_a_fault() -> None:
    ahead = Ahead(2, KEY, 1, CPU)
    ahead.at(0).normal(3)
    with pytest.raises(AssertionError, match="different calls"):
        ahead.at(1).normal(4)
