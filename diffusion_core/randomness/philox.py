"""Counter-based random numbers: Philox4x32-10 of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".

A number is a function of its stream's key and of its position. Integer arithmetic alone decides its bits, so they are
the same on every device, and all streams are computed together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_core.hardware import sent

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF
WORDS = 4
"""Words of 32 bits of a block."""


def round_keys(key_2N: Tensor) -> list[Tensor]:
    """Return the key of each round for :func:`philox`: ``(2, N)`` each, int64 with values of 32 bits."""
    weyl = sent(torch.tensor(WEYL), key_2N.device).view(2, *(1,) * (key_2N.dim() - 1))
    keys = [(key_2N + number * weyl) & MASK for number in range(ROUNDS)]
    return [key if number % 2 else key.flip(0) for number, key in enumerate(keys)]


def philox(counter_4N: Tensor, keys: Sequence[Tensor]) -> Tensor:
    """Return the random block of each counter: ``(4, N)`` int64 with values of 32 bits.

    Args:
        counter_4N: the counters' words, least significant first, int64 with values of 32 bits; N may be several axes.
        keys: from :func:`round_keys`; each can be broadcast to the shape of two words of the counters.
    """
    multipliers = sent(torch.tensor(MULTIPLIERS), counter_4N.device).view(2, *(1,) * (counter_4N.dim() - 1))
    even, odd = counter_4N[0::2], counter_4N[1::2]
    for key in keys:
        product = even * multipliers  # 64 bits: they overflow into the sign, and all are there.
        # A round exchanges the halves. Leave them, and let every other round work on exchanged ones: it is faster.
        even = (product >> 32).bitwise_and_(MASK).bitwise_xor_(odd.flip(0)).bitwise_xor_(key)
        odd = product.bitwise_and_(MASK)
        multipliers = multipliers.flip(0)
    return torch.stack([even[0], odd[0], even[1], odd[1]])


class Philox:
    """Streams of random numbers. Each call takes its numbers from blocks of its own.

    Args:
        seeds: a seed of at most 64 bits per stream: its key.
        device: device of the numbers.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        words = [[seed & MASK for seed in seeds], [seed >> 32 & MASK for seed in seeds]]
        self.keys = round_keys(sent(torch.tensor(words), device).unsqueeze(-1))
        self.calls = 0

    def words(self, count: int) -> Tensor:
        """Return random words of every stream, ``(streams, count)`` int64 in [0, 2**32)."""
        device = self.keys[0].device
        blocks = torch.arange(math.ceil(count / WORDS), device=device)
        other = torch.zeros_like(blocks)
        counter_4N = torch.stack([blocks & MASK, blocks >> 32, other + self.calls, other])
        self.calls += 1
        words_4RN = philox(counter_4N.unsqueeze(1).expand(-1, self.keys[0].shape[1], -1), self.keys)
        return words_4RN.permute(1, 2, 0).flatten(1)[:, :count]

    def normal_float64(self, *shape: int) -> Tensor:
        """Return standard normal numbers of every stream, ``(streams, *shape)`` float64, by Box and Muller 1958.

        The largest is 6.7, since they are made from words of 32 bits.
        """
        count = math.prod(shape)
        pairs = self.words(2 * math.ceil(count / 2)).double().unflatten(1, (-1, 2))
        radius = ((pairs[..., 0] + 1.0) * 2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = pairs[..., 1] * (2.0**-31 * math.pi)
        numbers = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
        return numbers.flatten(1)[:, :count].reshape(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers of every stream, ``(streams, *shape)`` float32.

        Computed in float64: where devices differ in a last bit, these are rounded to the same float32 but once in a
        hundred million.
        """
        return self.normal_float64(*shape).float()

    def uniform(self, *shape: int) -> Tensor:
        """Return numbers of every stream in [0, 1), multiples of 2**-24, ``(streams, *shape)`` float32."""
        return ((self.words(math.prod(shape)) >> 8).float() * 2.0**-24).reshape(-1, *shape)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Return integers of every stream in [0, high), ``(streams, *shape)`` int64, for ``high`` up to 2**31.

        Their probabilities differ by at most 2**-32.
        """
        return (self.words(math.prod(shape)) * high >> 32).reshape(-1, *shape)

    def permutation(self, total: int) -> Tensor:
        """Return the integers below ``total`` in random order, of every stream, ``(streams, total)`` int64.

        The order of 62 random bits each; equal ones, which are as good as impossible, keep their order.
        """
        low, high = self.words(2 * total).unflatten(1, (-1, 2)).unbind(-1)
        return torch.argsort((high >> 2) << 32 | low, dim=1, stable=True)
