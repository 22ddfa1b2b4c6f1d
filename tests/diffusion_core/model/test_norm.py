"""Group norm by channel, pixels doubled by expansion: what a GPU computes, against PyTorch's own operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import CUDA, fake_tensors

from diffusion_core.model.norm import group_norm, normalise_by_channel, normalised
from diffusion_core.model.unet import expanded


def example(dtype: torch.dtype, offset: float = 0.0) -> torch.Tensor:
    return (torch.randn(3, 24, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + offset).to(
        dtype
    )


@pytest.mark.parametrize("groups", [1, 8, 24])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_it_is_group_norm_with_its_gradients(groups: int, offset: float) -> None:
    ours, theirs = (example(torch.float32, offset).requires_grad_() for _ in range(2))
    source = torch.Generator().manual_seed(1)
    weights = [[torch.randn(24, generator=source.manual_seed(2 + i)).requires_grad_() for i in range(2)] for _ in "ab"]
    (scale, shift), (their_scale, their_shift) = weights
    upstream = torch.randn(3, 24, 5, 4, generator=source)
    got = normalise_by_channel(ours, groups, scale, shift, 1e-6)
    wanted = F.group_norm(theirs, groups, their_scale, their_shift, 1e-6)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    got.backward(upstream)
    wanted.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-3)


def test_statistics_are_float32_whatever_the_input() -> None:
    # Far from zero, bf16 sums of squares would lose the variance altogether.
    x = example(torch.bfloat16, 30.0)
    norm = group_norm(24, 8)
    got = normalise_by_channel(x, 8, norm.weight, norm.bias, norm.eps)
    assert got.dtype == torch.bfloat16
    exact = F.group_norm(x.double(), 8, norm.weight.double(), norm.bias.double(), norm.eps)
    assert (got.double() - exact).abs().max() < 0.02


def test_bf16_on_a_gpu_stays_bf16_and_all_else_is_pytorchs() -> None:
    with fake_tensors(), CUDA:
        x = torch.empty(3, 24, 5, 4, dtype=torch.bfloat16)
        assert normalised(group_norm(24, 8), x).dtype == torch.bfloat16
    norm = group_norm(24, 8)
    x = example(torch.float32)
    assert torch.equal(normalised(norm, x), F.group_norm(x, 8, norm.weight, norm.bias, norm.eps))


def test_pixels_are_doubled_as_interpolate_does_it() -> None:
    ours, theirs = (example(torch.float32).requires_grad_() for _ in range(2))
    got, wanted = expanded(ours), F.interpolate(theirs, scale_factor=2.0, mode="nearest")
    assert torch.equal(got, wanted)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    got.backward(upstream)
    wanted.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad)
