"""Training and sampling on a GPU against its own floors: the matrix rate and the bandwidth, measured first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator

from benchmarks.networks import cifar_config, lively_network
from benchmarks.options import Options
from benchmarks.rows import Row
from benchmarks.timing import alternating, timed
from benchmarks.training_step import our_step, peer_step
from diffusion_core.compilation import compile_network, forward_flops
from diffusion_core.config import CoreConfig
from diffusion_core.generation import Generator, requests
from diffusion_core.unet import NO_LABEL

SUBJECT = "gpu"
TRAIN_BATCH, SAMPLE_BATCH, SAMPLE_STEPS = 512, 1024, 50
TRAIN_TARGET, TRAIN_SHARE_TARGET, PEER_TARGET = 9000.0, 0.40, 2.5
SAMPLE_SHARE_TARGET, SAMPLES_TARGET_MIN, SAMPLES = 0.50, 5.0, 50_000
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


def sampler(config: CoreConfig, device: torch.device, batch: int) -> tuple[Callable[[], object], int]:
    """Draw a batch with a compiled network; and the operations that takes."""
    network = lively_network(config, device).eval().requires_grad_(False)
    work = batch * config.sample.steps * forward_flops(network)
    compile_network(network, "network" if device.type == "cuda" else "none")
    generator = Generator(network, config, "bf16")
    wanted = requests([NO_LABEL], batch)
    return lambda: generator.images(wanted, config.sample, 0), work


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
    """Images a second of the whole loop, compiled, in bf16, against Diffusers' example loop in bf16."""
    batch, steps = (4, 1) if options.short else (TRAIN_BATCH, STEPS)
    how = "network" if device.type == "cuda" else "none"
    config = cifar_config(options.short, train__batch_size=batch, train__precision="bf16", train__compile=how)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    ours, peer = our_step(config, accelerator, batch, steps), peer_step(config, accelerator, batch, "bf16", steps)
    times = alternating({"ours": ours, "diffusers, bf16": peer}, options.rounds, options.say)
    images = steps * batch / times["ours"]
    peer_images = steps * batch / times["diffusers, bf16"]
    share = 3.0 * images * forward_flops(lively_network(config, device)) / rate
    shown = {"ours": f"{images:,.0f} images/s", "peer": f"{peer_images:,.0f} images/s"}
    what = f"training, bf16, batch {batch}, whole loop"
    return [
        Row(SUBJECT, what, images, "images/s", TRAIN_TARGET, details=times),
        Row(SUBJECT, f"{what}: share of the matrix rate", share, "of it", TRAIN_SHARE_TARGET),
        Row(SUBJECT, f"{what}, against diffusers' in bf16", images / peer_images, target=PEER_TARGET, **shown),
    ]


def sampling(options: Options, device: torch.device, rate: float) -> list[Row]:
    """DDIM with a compiled network, as a share of the matrix rate."""
    batch, steps = (4, 2) if options.short else (SAMPLE_BATCH, SAMPLE_STEPS)
    config = cifar_config(options.short, sample__steps=steps, sample__batch_size=batch)
    work, operations = sampler(config, device, batch)
    times = alternating({"ours": work}, options.rounds, options.say)
    share = operations / times["ours"] / rate
    minutes = SAMPLES / batch * times["ours"] / 60.0
    what = f"sampling, DDIM {steps}, batch {batch}"
    rate_shown = f"{batch / times['ours']:,.0f} images/s"
    return [
        Row(SUBJECT, f"{what}: share of the matrix rate", share, "of it", SAMPLE_SHARE_TARGET, ours=rate_shown),
        Row(SUBJECT, f"{SAMPLES:,} samples without features", minutes, "min", SAMPLES_TARGET_MIN, at_least=False),
    ]
