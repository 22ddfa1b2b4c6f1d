"""Counter-based random numbers: the published vectors, arithmetic of unbounded integers, and their distributions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from diffusion_core.randomness import Purpose, stream_seed, streams
from diffusion_core.randomness.philox import Philox, philox, round_keys

VECTORS = [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
"""Known answers of philox4x32-10 that its authors publish with their library, Random123."""

word = st.integers(0, 2**32 - 1)


def block(counter: list[int], key: list[int]) -> list[int]:
    """Figure 2 and section 3.3 of Salmon et al. 2011, with Python's unbounded integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (right >> 32) ^ b ^ k, right % 2**32, (left >> 32) ^ d ^ m, left % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return [a, b, c, d]


def ours(counter: list[int], key: list[int]) -> list[int]:
    words = philox(torch.tensor(counter).view(4, 1), round_keys(torch.tensor(key).view(2, 1)))
    return words.flatten().tolist()


@pytest.mark.parametrize(("counter", "key", "answer"), VECTORS)
def test_the_published_vectors(counter: list[int], key: list[int], answer: str) -> None:
    assert block(counter, key) == [int(text, 16) for text in answer.split()], "the test's own arithmetic"
    assert ours(counter, key) == [int(text, 16) for text in answer.split()]


@settings(max_examples=50, deadline=None)
@given(st.lists(word, min_size=4, max_size=4), st.lists(word, min_size=2, max_size=2))
def test_any_block_equals_unbounded_arithmetic(counter: list[int], key: list[int]) -> None:
    assert ours(counter, key) == block(counter, key)


def test_words_are_the_blocks_of_the_key_and_the_call() -> None:
    seed = stream_seed(7, 3, 1)
    source = Philox([0, seed])
    first, second = source.words(6), source.words(5)
    key = [seed % 2**32, seed >> 32]
    assert first[1].tolist() == [*block([0, 0, 0, 0], key), *block([1, 0, 0, 0], key)[:2]]
    assert second[1].tolist() == [*block([0, 0, 1, 0], key), *block([1, 0, 1, 0], key)[:1]]
    assert first[0].tolist() != first[1].tolist()


def test_a_normal_number_is_that_of_box_and_muller() -> None:
    words = Philox([5]).words(4)[0].tolist()
    radius = math.sqrt(-2.0 * math.log((words[0] + 1) / 2**32))
    angle = 2.0 * math.pi * words[1] / 2**32
    numbers = Philox([5]).normal_float64(3)[0].tolist()
    assert numbers[:2] == pytest.approx([radius * math.cos(angle), radius * math.sin(angle)], rel=1e-12)
    assert Philox([5]).normal(3)[0].tolist() == [torch.tensor(number).item() for number in numbers]


@pytest.mark.parametrize("version", [1, 2])
def test_a_stream_does_not_depend_on_those_beside_it(version: int) -> None:
    keys: list[tuple[int, ...]] = [(0, 7, label, 3) for label in range(5)]

    def draw(keys: list[tuple[int, ...]]) -> list[torch.Tensor]:
        source = streams(version, keys)
        shapes = source.normal(3, 5), source.uniform(7), source.integers(1000, 9), source.permutation(11)
        return [*shapes, source.normal_float64(5), source.normal(1)]

    for whole, alone in zip(draw(keys), draw(keys[3:4]), strict=True):
        assert torch.equal(whole[3:4], alone)


def test_version_1_are_the_generators_of_pytorch() -> None:
    key = (11, Purpose.NOISE, 40)
    source, theirs = streams(1, [key]), torch.Generator().manual_seed(stream_seed(*key))
    assert torch.equal(source.normal(30, 2, 4)[0], torch.randn((30, 2, 4), generator=theirs))
    assert torch.equal(source.integers(1000, 30)[0], torch.randint(1000, (30,), generator=theirs))
    assert torch.equal(source.uniform(30)[0], torch.rand((30,), generator=theirs))
    assert torch.equal(source.permutation(30)[0], torch.randperm(30, generator=theirs))
    assert torch.equal(source.normal_float64(3)[0], torch.randn((3,), generator=theirs, dtype=torch.float64))


def test_seeds_that_agree_in_32_bits_are_different_streams() -> None:
    seeds = [5, 5 + (1 << 32), 5 + (1 << 62)]
    drawn = Philox(seeds).normal(4)
    assert len({tuple(row) for row in drawn.tolist()}) == 3
    theirs = [torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    assert torch.equal(theirs[0], theirs[2]), "why there is a version 2"


def test_distributions() -> None:
    source = streams(2, [(3, 1), (4, 1)])
    normal = source.normal(50_000)
    assert stats.kstest(normal[0].numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(normal[1, ::2].numpy(), "norm").pvalue > 1e-3
    assert abs(float(torch.corrcoef(normal)[0, 1])) < 0.02, "streams are independent"
    assert abs(float(torch.corrcoef(torch.stack([normal[0, :-1], normal[0, 1:]]))[0, 1])) < 0.02
    uniform = source.uniform(50_000)[0]
    assert 0.0 <= float(uniform.min()) < float(uniform.max()) < 1.0
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 1e-3
    counts = source.integers(10, 50_000)[0].bincount(minlength=10)
    assert len(counts) == 10
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_permutations_are_permutations_and_every_order_is_as_likely() -> None:
    source = streams(2, [(1, i) for i in range(6_000)])
    orders = source.permutation(3)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(3).expand(6_000, 3))
    counts = (orders * torch.tensor([9, 3, 1])).sum(1).bincount().to_sparse().values()
    assert len(counts) == 6
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
