"""Work of several processes: stop after the same step, divide images, sum figures, watch for lost processes."""

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
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import broadcast, gather, reduce
from torch import Tensor, distributed, nn

from diffusion_core.config import ConfigError, TrainConfig
from diffusion_core.hardware import pick_device
from diffusion_core.machine.launch import launch_errors

WATCH_EVERY_S = 0.5
LEAVE_AFTER_S = 5.0
"""Grace period after a process was lost: a collective operation may fail first, with a message of its own."""

PATIENCE = timedelta(days=7)
"""Timeout for the first process, which evaluates, samples and uploads alone. :meth:`Peers.watch` detects a dead one."""


def make_accelerator(train: TrainConfig) -> Accelerator:
    """Set up processes and devices as ``accelerate launch`` asks. ``train.precision`` alone sets the precision.

    Raises:
        ConfigError: if the processes cannot find each other, or cannot share the batch evenly.
    """
    # Exchange gradients in place, without a copy. (A static graph would support unused parameters and recomputed
    # activations; this network has none.)
    exchange = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    cpu = pick_device(train).type == "cpu"
    with launch_errors():
        accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[exchange])
    if train.batch_size != "auto":  # Else a share per process is chosen later.
        check_share(train, accelerator.num_processes)
    return accelerator


def check_share(train: TrainConfig, processes: int, hint: str = "") -> None:
    """Check that processes can share a batch evenly.

    Args:
        train: with a number as its batch size.
        processes: number of processes.
        hint: ends the message: what to do.

    Raises:
        ConfigError: if they cannot.
    """
    share, remainder = divmod(train.images_per_step, processes)
    if remainder or share % train.accumulation:
        raise ConfigError(
            f"train.batch_size = {train.batch_size}: expected a multiple of the number of processes "
            f"({processes}) times train.accumulation ({train.accumulation}){hint and f'; {hint}'}"
        )


@contextmanager
def first_process_first(processes: Accelerator | PartialState) -> Iterator[None]:
    """Run the body in the first process, then in all others.

    The others wait up to ``PATIENCE``: NCCL's operations fail after ten minutes, and a large download takes longer.
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
    """The other processes of a trial.

    Args:
        accelerator: as ``accelerate launch`` set it up; with one process all methods return at once.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank = accelerator.process_index
        self.count = accelerator.num_processes
        self.lost: int | None = None
        """The rank of a process that ended before the trial did, or None."""
        self._over = threading.Event()
        self._group: Any = None
        self._here: dict[int, int] = {}
        if self.count > 1:
            # A group on the CPU: agreeing after every step must not wait for a GPU.
            self._group = distributed.new_group(backend="gloo", timeout=PATIENCE)
            everyone: list[Any] = [None] * self.count
            me = (socket.gethostname(), os.getpid())
            distributed.all_gather_object(everyone, me, group=self._group)
            self._here = {rank: pid for rank, (host, pid) in enumerate(everyone) if host == me[0] and rank != self.rank}

    def agree(self, number: int) -> int:
        """Return the largest of all processes' numbers; every process calls this equally often."""
        if self.count == 1:
            return number
        largest = torch.tensor(number)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=self._group)
        return int(largest)

    def wait(self) -> None:
        """Return when every process has called this."""
        if self.count > 1:
            distributed.barrier(group=self._group)

    def watch(self, on_loss: Callable[[], object]) -> None:
        """Exit this process when another one on this machine ends before :meth:`part`.

        A collective operation with a dead process may block for ever, and Python cannot interrupt it.

        Args:
            on_loss: called on another thread right before the exit.
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
        """Return whether another process on this machine has ended; sets :attr:`lost`."""
        if self.lost is None and not self._over.is_set():
            self.lost = next((rank for rank, pid in self._here.items() if not _is_alive(pid)), None)
        return self.lost is not None

    def loss(self) -> str:
        """Return the message for a lost process."""
        return f"process {self.lost} of {self.count} ended before the trial did; this one ends too"

    def part(self) -> None:
        """Stop watching the peers."""
        self._over.set()


def _is_alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
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


def own_positions(total: int) -> list[int]:
    """Return the positions in ``range(total)`` that this process works on: every n-th one, for n processes.

    All processes get equally many. Shorter lists are padded with positions >= total, which are dropped after gathering.
    """
    state = PartialState()
    each = -(-total // state.num_processes)
    return [state.process_index + i * state.num_processes for i in range(each)]


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, on the tensor's device."""
    state = PartialState()
    if state.num_processes == 1:
        return tensor
    return reduce(tensor.to(state.device), "sum").to(tensor.device)


def gather_in_order(rows: Tensor, total: int) -> Tensor:
    """Return all processes' rows ordered by :func:`own_positions`, ``(total, ...)``, on the rows' device."""
    state = PartialState()
    if state.num_processes == 1:
        return rows[:total]
    everyone = gather(rows.to(state.device).contiguous()).view(state.num_processes, *rows.shape)
    return everyone.transpose(0, 1).flatten(0, 1)[:total].to(rows.device)


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all processes, by rank. They are pickled, so they may be of any type."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, value)
    return everyone


def broadcast_weights(network: nn.Module) -> None:
    """Copy the first process's weights and buffers to all other processes, in place."""
    state = PartialState()
    if state.num_processes > 1:
        with torch.no_grad():
            for tensor in network.state_dict().values():
                tensor.copy_(broadcast(tensor.to(state.device)).to(tensor.device))
