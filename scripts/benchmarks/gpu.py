"""Training and sampling on a GPU against its own floors: the matrix rate and the bandwidth, measured first."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from benchmarks.fid import random_weights
from benchmarks.networks import cifar_config, lively_network
from benchmarks.options import Options
from benchmarks.rows import Row
from benchmarks.timing import alternating, timed
from benchmarks.training_step import our_step, peer_step
from diffusion_core.compilation import forward_flops
from diffusion_core.config import CoreConfig
from diffusion_core.evaluation.frechet import Moments
from diffusion_core.evaluation.inception import read_inception
from diffusion_core.generation import Generator, requests
from diffusion_core.unet import NO_LABEL, UNet
from pruning.config import PruneConfig
from pruning.structural import prune_channels

SUBJECT = "gpu"
TRAIN_BATCH, SAMPLE_BATCH, SAMPLE_STEPS = 512, 1024, 50
TRAIN_TARGET, TRAIN_SHARE_TARGET, PEER_TARGET = 9000.0, 0.40, 2.5
SAMPLE_SHARE_TARGET, SAMPLES_TARGET_MIN, SAMPLES = 0.50, 5.0, 50_000
KEEP, PRUNED_TARGET = 0.5, 1.6
FID_DIM = 2048
STEPS = 20


def matrix_rate(device: torch.device, size: int, rounds: int) -> float:
    """Floating point operations a second of a bf16 matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = min(timed(lambda: a @ b) for _ in range(4 * rounds))
    return 2.0 * size**3 / best


def bandwidth(device: torch.device, count: int, rounds: int) -> float:
    """Bytes a second, read and written, of a copy."""
    source = torch.zeros(count, device=device)
    target = torch.empty_like(source)
    best = min(timed(lambda: target.copy_(source)) for _ in range(4 * rounds))
    return 2.0 * source.nbytes / best


def compile_on(device: torch.device) -> str:
    """What the compile knobs are set to: a processor's compiler is not what is measured here."""
    return "network" if device.type == "cuda" else "none"


def pruned_to_half(network: UNet, config: CoreConfig) -> UNet:
    """The network with channels removed until half of its multiply-accumulates are left."""
    prune = PruneConfig(method="structured", importance="l2", target="macs", keep=KEEP)
    return prune_channels(network, prune, config.seed)[0]


def sampler(network: UNet, config: CoreConfig) -> Callable[[], torch.Tensor]:
    """Draw a batch in bf16: uint8, on the CPU."""
    generator = Generator(network.eval().requires_grad_(False), config, "bf16")
    wanted = requests([NO_LABEL], config.sample.batch_size)
    return lambda: generator.images(wanted, config.sample, 0)


def measure(options: Options) -> list[Row]:
    """Floors first, then training and sampling. Without a GPU nothing is measured (a short run tries the code)."""
    if not torch.cuda.is_available() and not options.short:
        return [Row(SUBJECT, what, None, note="no GPU here") for what in ("floors", "training", "sampling")]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = matrix_rate(device, 512 if options.short else 8192, options.rounds)
    moved = bandwidth(device, 2**20 if options.short else 2**29, options.rounds)
    rows = [
        Row(SUBJECT, "floor: bf16 matrix product", rate / 1e12, "TFLOP/s"),
        Row(SUBJECT, "floor: copy, bytes read and written", moved / 1e9, "GB/s"),
    ]
    return rows + training(options, device, rate) + sampling(options, device, rate)


def training(options: Options, device: torch.device, rate: float) -> list[Row]:
    """Images a second of the whole loop, in bf16: against Diffusers' example loop in bf16, and pruned."""
    batch, steps = (4, 1) if options.short else (TRAIN_BATCH, STEPS)
    config = cifar_config(
        options.short, train__batch_size=batch, train__precision="bf16", train__compile=compile_on(device)
    )
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    works = {
        "ours": our_step(config, accelerator, batch, steps),
        "pruned": our_step(config, accelerator, batch, steps, lambda network: pruned_to_half(network, config)),
        "diffusers, bf16": peer_step(config, accelerator, batch, "bf16", steps),
    }
    times = alternating(works, options.rounds, options.say)
    images = {name: steps * batch / taken for name, taken in times.items()}
    share = 3.0 * images["ours"] * forward_flops(lively_network(config, device)) / rate
    shown = {name: f"{value:,.0f} images/s" for name, value in images.items()}
    what = f"training, bf16, batch {batch}, whole loop"
    return [
        Row(SUBJECT, what, images["ours"], "images/s", TRAIN_TARGET, details=times),
        Row(SUBJECT, f"{what}: share of the matrix rate", share, "of it", TRAIN_SHARE_TARGET),
        Row(
            SUBJECT,
            f"{what}, against diffusers' in bf16",
            images["ours"] / images["diffusers, bf16"],
            target=PEER_TARGET,
            ours=shown["ours"],
            peer=shown["diffusers, bf16"],
        ),
        Row(
            SUBJECT,
            f"{what}, pruned to {KEEP:.0%} of the MACs, against dense",
            images["pruned"] / images["ours"],
            target=PRUNED_TARGET,
            ours=shown["pruned"],
            peer=shown["ours"],
        ),
    ]


def sampling(options: Options, device: torch.device, rate: float) -> list[Row]:
    """DDIM: as a share of the matrix rate, pruned, and with the features that an FID needs."""
    batch, steps = (4, 2) if options.short else (SAMPLE_BATCH, SAMPLE_STEPS)
    config = cifar_config(
        options.short, sample__steps=steps, sample__batch_size=batch, sample__compile=compile_on(device)
    )
    network = lively_network(config, device)
    operations = batch * steps * forward_flops(network)
    with tempfile.TemporaryDirectory() as folder:
        random_weights(Path(folder) / "weights.pth")
        inception = read_inception(Path(folder) / "weights.pth", device)
    draw = sampler(network, config)
    moments = Moments.empty(FID_DIM)
    works = {
        "ours": draw,
        "pruned": sampler(pruned_to_half(network, config), config),
        "with features": lambda: moments.add(inception(draw()).features_BD.float().cpu()),
    }
    times = alternating(works, options.rounds, options.say)
    minutes = SAMPLES / batch * times["with features"] / 60.0
    what = f"sampling, DDIM {steps}, batch {batch}"
    shown = {name: f"{batch / taken:,.0f} images/s" for name, taken in times.items()}
    share = operations / times["ours"] / rate
    return [
        Row(SUBJECT, f"{what}: share of the matrix rate", share, "of it", SAMPLE_SHARE_TARGET, ours=shown["ours"]),
        Row(
            SUBJECT,
            f"{what}, pruned to {KEEP:.0%} of the MACs, against dense",
            times["ours"] / times["pruned"],
            target=PRUNED_TARGET,
            ours=shown["pruned"],
            peer=shown["ours"],
        ),
        Row(
            SUBJECT,
            f"{SAMPLES:,} samples with Inception features and moments, from one batch of {batch}",
            minutes,
            "min",
            SAMPLES_TARGET_MIN,
            at_least=False,
            ours=shown["with features"],
            details=times,
        ),
    ]
