"""The update of the averaged weights, against ema-pytorch."""

from __future__ import annotations

from benchmarks.networks import cifar_config, lively_network
from benchmarks.options import Options
from benchmarks.rows import Row, seconds
from benchmarks.timing import alternating
from diffusion_core.ema import Ema
from diffusion_core.hardware import pick_device

SUBJECT = "ema"
TARGET = 3.0
UPDATES = 20


def measure(options: Options) -> list[Row]:
    """Twenty updates of one exponential average."""
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

    times = alternating({"ours": update_ours, "ema-pytorch": update_theirs}, options.rounds, options.say)
    weights = sum(parameter.nbytes for parameter in network.parameters())
    moved = 3 * weights * UPDATES / times["ours"] / 1e9
    return [
        Row(
            SUBJECT,
            f"update of {weights / 4e6:.1f} M weights, against ema-pytorch",
            times["ema-pytorch"] / times["ours"],
            target=TARGET,
            ours=seconds(times["ours"] / UPDATES),
            peer=seconds(times["ema-pytorch"] / UPDATES),
            note=f"two reads and a write of every weight: {moved:.1f} GB/s",
            details=times,
        )
    ]
