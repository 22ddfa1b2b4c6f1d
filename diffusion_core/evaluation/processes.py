"""Evaluation by several processes: each takes an equal share of the images, and all come to the same figures.

With one process these functions do nothing.
"""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather, reduce
from torch import Tensor, nn


def shared_out(total: int) -> list[int]:
    """The positions, of ``total``, that this process takes: every n-th one.

    All processes take equally many; where that does not come out even, the last ones take positions from ``total`` on,
    which stand for nothing and are left out in the end.
    """
    state = PartialState()
    each = -(-total // state.num_processes)
    return [state.process_index + i * state.num_processes for i in range(each)]


def add_up(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on its own device."""
    state = PartialState()
    if state.num_processes == 1:
        return tensor
    return reduce(tensor.to(state.device), "sum").to(tensor.device)


def bring_together(rows: Tensor, total: int) -> Tensor:
    """All processes' rows in the order of :func:`shared_out`'s positions, ``(total, ...)``, on the rows' device."""
    state = PartialState()
    if state.num_processes == 1:
        return rows[:total]
    everyone = gather(rows.to(state.device).contiguous()).view(state.num_processes, *rows.shape)
    return everyone.transpose(0, 1).flatten(0, 1)[:total].to(rows.device)


def agree(network: nn.Module) -> None:
    """Give every process the first one's weights."""
    state = PartialState()
    if state.num_processes > 1:
        with torch.no_grad():
            for tensor in network.state_dict().values():
                tensor.copy_(broadcast(tensor.to(state.device)).to(tensor.device))
