"""Several processes: they stop after the same step, share out images, and add up figures."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast, gather, reduce
from torch import Tensor, distributed, nn

WATCH_EVERY_S = 0.5
LEAVE_AFTER_S = 5.0
"""How long a process that lost another one may take to notice by itself, in a collective operation that fails."""

PATIENCE = timedelta(days=7)
"""Processes wait this long for the first one, which alone evaluates, draws and uploads; a dead one is noticed."""


@contextmanager
def first_process_first(processes: Accelerator | PartialState) -> Iterator[None]:
    """The first process runs what is inside this context, then all others do; these wait for as long as it takes.

    The GPUs' own group would not: a collective operation of theirs fails after ten minutes, and a large download or a
    large folder takes longer.
    """
    if processes.num_processes == 1:
        yield
        return
    group: Any = distributed.new_group(backend="gloo", timeout=PATIENCE)
    if processes.process_index != 0:
        distributed.barrier(group=group)
    yield
    if processes.process_index == 0:
        distributed.barrier(group=group)
    distributed.destroy_process_group(group)


class Peers:
    """The processes of a trial, as one of them sees the others.

    Args:
        accelerator: as ``accelerate launch`` set it up; one process alone has no peers, and all this costs nothing.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank = accelerator.process_index
        self.count = accelerator.num_processes
        self.lost: int | None = None
        """The rank of a process that ended before the trial did."""
        self._over = threading.Event()
        self._group: Any = None
        self._here: dict[int, int] = {}
        if self.count > 1:
            # On the processor, beside the GPUs' own group: agreeing after every step must not wait for a GPU.
            self._group = distributed.new_group(backend="gloo", timeout=PATIENCE)
            everyone: list[Any] = [None] * self.count
            me = (socket.gethostname(), os.getpid())
            distributed.all_gather_object(everyone, me, group=self._group)
            self._here = {rank: pid for rank, (host, pid) in enumerate(everyone) if host == me[0] and rank != self.rank}

    def agree(self, number: int) -> int:
        """The largest of the numbers that the processes give; each calls this equally often."""
        if self.count == 1:
            return number
        largest = torch.tensor(number)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=self._group)
        return int(largest)

    def wait(self) -> None:
        """Return once every process is here."""
        if self.count > 1:
            distributed.barrier(group=self._group)

    def watch(self, on_loss: Callable[[], object]) -> None:
        """From now on, end this process when another one of this machine ends before :meth:`part`.

        A process that waits for a dead one in a collective operation may wait for ever, out of reach of Python.

        Args:
            on_loss: called, on another thread, before the process is ended by force.
        """
        if self._here:
            threading.Thread(target=self._watch, args=(on_loss,), name="peers", daemon=True).start()

    def _watch(self, on_loss: Callable[[], object]) -> None:
        while not self._over.wait(WATCH_EVERY_S):
            if self.are_gone():
                time.sleep(LEAVE_AFTER_S)
                if not self._over.is_set():
                    print(f"error: {self.loss()}", file=sys.stderr, flush=True)
                    on_loss()
                    os._exit(1)
                return

    def are_gone(self) -> bool:
        """Whether any other process of this machine has ended; :attr:`lost` says which one."""
        if self.lost is None and not self._over.is_set():
            self.lost = next((rank for rank, pid in self._here.items() if not _is_alive(pid)), None)
        return self.lost is not None

    def loss(self) -> str:
        """What happened, if :attr:`lost` says that something did."""
        return f"process {self.lost} of {self.count} ended before the trial did; this one ends too"

    def part(self) -> None:
        """Nobody needs the others any more."""
        self._over.set()


def _is_alive(pid: int) -> bool:
    """Whether a process runs: one that ended but was not waited for yet does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        pass
    if os.path.isdir("/proc/self"):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


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
