"""Group norm, with its own computation in bf16 on a GPU.

Axes: B batch, C channels, H height, W width, G groups, K channels of a group.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def group_norm(channels: int, max_groups: int, epsilon: float = 1e-6) -> nn.GroupNorm:
    """Return group norm (Wu & He 2018) with the greatest common divisor of channels and ``max_groups`` as groups."""
    return nn.GroupNorm(math.gcd(channels, max_groups), channels, eps=epsilon)


def normalised(norm: nn.GroupNorm, x_BCHW: Tensor) -> Tensor:
    """Apply group norm to a batch. In bf16 on a GPU, only the statistics are float32, and the result is bf16.

    PyTorch's autocast would compute the norm, and the operations after it, in float32. Its kernel does not support
    channels-last memory before torch 2.15, so that the input would be copied twice.
    """
    if x_BCHW.is_cuda and x_BCHW.dtype == torch.bfloat16:
        return normalise_by_channel(x_BCHW, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return norm(x_BCHW)


def normalise_by_channel(x_BCHW: Tensor, groups: int, weight_C: Tensor, bias_C: Tensor, epsilon: float) -> Tensor:
    """Compute group norm from the moments of each channel, combined into those of its group.

    The moments of a channel are sums over pixels only. In channels-last memory, neighbouring threads then read
    neighbouring addresses. The remaining work is one multiplication and one addition per element, which the compiler
    fuses with the activation. Statistics are float32 (Welford's algorithm). The result has the type of the input.

    Args:
        x_BCHW: the batch, of any floating type.
        groups: number of groups; must divide C.
        weight_C: gain of each channel.
        bias_C: offset of each channel.
        epsilon: added to the variances.
    """
    batch, channels = x_BCHW.shape[:2]
    variance_BC, mean_BC = torch.var_mean(x_BCHW.float(), dim=(2, 3), correction=0)
    variance_BGK, mean_BGK = variance_BC.view(batch, groups, -1), mean_BC.view(batch, groups, -1)
    mean_BG1 = mean_BGK.mean(dim=2, keepdim=True)
    variance_BG1 = (variance_BGK + (mean_BGK - mean_BG1).square()).mean(dim=2, keepdim=True)
    scale_BGK = weight_C.view(1, groups, -1) * (variance_BG1 + epsilon).rsqrt()
    shift_BGK = bias_C.view(1, groups, -1) - mean_BG1 * scale_BGK
    scale, shift = (part.reshape(batch, channels, 1, 1) for part in (scale_BGK, shift_BGK))
    return (x_BCHW * scale + shift).to(x_BCHW.dtype)
