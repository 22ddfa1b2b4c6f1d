"""Check the environment variables with which launchers start several processes, such as ``accelerate launch``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from diffusion_core.config import ConfigError
from diffusion_core.messages import one_line

# accelerate reads these, in this order.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
PORT = "MASTER_PORT"


@contextmanager
def launch_errors() -> Iterator[None]:
    """Report in one line why this process cannot join others. Set up processes inside this context.

    Raises:
        ConfigError: if a launcher's variables contradict each other, or the other processes cannot be reached. The
            message names the variable.
    """
    values = {name: _integer(name) for name in (*SIZES, *RANKS, *LOCAL_RANKS, PORT)}
    named = next((name for name in SIZES if (values[name] or 0) > 1), None)
    local = values["LOCAL_RANK"]
    if named is None and local is not None and local >= 0:
        named = "LOCAL_RANK"
    if named is None:
        yield
        return
    size = values[named] if named in SIZES else None
    rank_name = next((name for name in RANKS if values[name] is not None), None)
    remedy = f"start them with `accelerate launch`, or unset {named} to run one process"
    said = f"{named} = {os.environ[named]!r}: says that this is one of several processes"
    if not os.environ.get("MASTER_ADDR"):
        raise ConfigError(f"{said}, but MASTER_ADDR, the address of the first one, is not set; {remedy}")
    if rank_name is None:
        raise ConfigError(f"{said}, but RANK is not set; {remedy}")
    rank = values[rank_name]
    if size is not None and rank is not None and rank >= size:
        raise ConfigError(f"{rank_name} = {rank}: expected 0 to {size - 1} with {named}={size}; {remedy}")
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"{said}, but it cannot join them ({one_line(error)}); {remedy}") from None


def _integer(name: str) -> int | None:
    """Return the value of a variable; None if it is not set.

    Raises:
        ConfigError: if it is no integer.
    """
    text = os.environ.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} = {text!r}: expected an integer; correct or unset it") from None
