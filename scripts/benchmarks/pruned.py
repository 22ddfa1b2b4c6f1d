"""Measure the forward pass of a network pruned to half the multiply-accumulates, against the dense network."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.measurement.networks import cifar_config, lively_network
from benchmarks.measurement.options import Options
from benchmarks.measurement.rows import Row, seconds
from benchmarks.measurement.timing import alternating
from diffusion_core.hardware import Precision, autocast, memory_format, pick_device, pick_precision
from diffusion_core.model.cost import count_cost
from diffusion_core.model.unet import UNet
from pruning.channels.removal import prune_channels
from pruning.config import PruneConfig

SUBJECT = "pruned"
BATCH, KEEP, TARGET = 16, 0.5, 0.62


def measure(options: Options) -> list[Row]:
    """Measure the latency of a batch, in the default precision and in float32."""
    config = cifar_config(options.short)
    device = pick_device(config.train)
    dense = lively_network(config, device).eval()
    prune = PruneConfig(method="structured", importance="l2", target="macs", keep=KEEP)
    smaller = prune_channels(dense, prune, config.seed)[0].eval()
    share = count_cost(smaller).macs / count_cost(dense).macs
    images = torch.randn(BATCH, 3, 32, 32, device=device)
    times_B = torch.full((BATCH,), 500, device=device)

    @torch.no_grad()
    def forward(network: UNet, precision: str) -> None:
        with autocast(device, "bf16" if precision == "bf16" else "fp32"):
            network(images, times_B)

    def say(precision: str, line: str) -> None:
        options.say(f"{precision}: {line}")

    rows = []
    precisions: tuple[Precision, ...] = (pick_precision(config.train, device), "fp32")
    for precision in dict.fromkeys(precisions):
        for network in (smaller, dense):
            network.to(memory_format=memory_format(device, precision))  # In place.
        works = {
            "pruned": lambda precision=precision: forward(smaller, precision),
            "dense": lambda precision=precision: forward(dense, precision),
        }
        times = alternating(works, options.rounds, partial(say, precision))
        rows.append(
            Row(
                SUBJECT,
                f"forward at batch {BATCH}, {precision}, {share:.3f} of the MACs: latency over the dense network's",
                times["pruned"] / times["dense"],
                "of it",
                TARGET,
                at_least=False,
                ours=seconds(times["pruned"]),
                peer=seconds(times["dense"]),
                details=times,
            )
        )
    return rows
