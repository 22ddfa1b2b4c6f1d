"""Measure the update of averaged weights, against ema-pytorch."""

from __future__ import annotations

import torch

from benchmarks.measurement.networks import cifar_config, lively_network
from benchmarks.measurement.options import Options
from benchmarks.measurement.rows import Row, seconds
from benchmarks.measurement.timing import alternating
from diffusion_core.hardware import pick_device
from diffusion_core.training.ema import Ema

SUBJECT = "ema"
TARGET = 3.0
UPDATES = 20


def measure(options: Options) -> list[Row]:
    """Measure twenty updates of one exponential average."""
    from ema_pytorch import EMA

    config = cifar_config(options.short)
    device = pick_device(config.train)
    network = lively_network(config, device)
    ours = Ema(network, config.ema)
    theirs = EMA(network, beta=config.ema.decay, update_after_step=0, update_every=1)

    def update_ours() -> None:
        for _ in range(UPDATES):
            ours.update(network)

    def update_theirs() -> None:
        for _ in range(UPDATES):
            theirs.update()

    weights_N = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
    target_N = torch.empty_like(weights_N)

    def copy() -> None:
        for _ in range(UPDATES):
            target_N.copy_(weights_N)

    works = {"ours": update_ours, "ema-pytorch": update_theirs, "copy": copy}
    times = alternating(works, options.rounds, options.say)
    # Bytes per second: per weight, an update reads two numbers and writes one; a copy reads one and writes one.
    rates = {name: moves * weights_N.nbytes * UPDATES / times[name] / 1e9 for name, moves in (("ours", 3), ("copy", 2))}
    return [
        Row(
            SUBJECT,
            f"update of {len(weights_N) / 1e6:.1f} M weights, against ema-pytorch",
            times["ema-pytorch"] / times["ours"],
            target=TARGET,
            ours=seconds(times["ours"] / UPDATES),
            peer=seconds(times["ema-pytorch"] / UPDATES),
            note=f"moves {rates['ours']:.1f} GB/s; the floor: a plain copy moves {rates['copy']:.1f} GB/s",
            details=times,
        )
    ]
