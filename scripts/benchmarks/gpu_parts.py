"""Run one part of the GPU benchmark in its own process: ``python -m benchmarks.gpu_parts NAME FOLDER [--short]``.

Compiling takes longer than measuring. All parts therefore start together and compile in parallel. Each creates
NAME.ready in FOLDER, waits for the file ``go`` there, measures alone under a lock, and writes NAME.json there.
"""

from __future__ import annotations

import fcntl
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.fid import random_weights
from benchmarks.measurement.networks import cifar_config, lively_network
from benchmarks.measurement.profile import by_kind
from benchmarks.measurement.timing import timed
from benchmarks.training_step import our_step, peer_step
from diffusion_core.config import PRESETS, CoreConfig, build
from diffusion_core.data.batches import Batches
from diffusion_core.data.datasets import load_data
from diffusion_core.evaluation.distances import Moments
from diffusion_core.evaluation.extractors.inception import read_inception
from diffusion_core.files import write_json
from diffusion_core.messages import Parser
from diffusion_core.model.compilation import forward_flops
from diffusion_core.model.unet import NO_LABEL, UNet, build_network
from diffusion_core.sampling.generation import Generator, requests
from diffusion_core.training.trainer import TrainState, train
from pruning.channels.removal import prune_channels
from pruning.config import PruneConfig

KEEP = 0.5
FID_DIM = 2048
ROUNDS = 5
FIRST_STEPS = 8
"""Steps of each call of the training loop that are not timed: the step is warmed up and recorded as a graph."""


@dataclass
class Part:
    """A part of the benchmark: its device, the amount of work, and its results."""

    name: str
    folder: Path
    short: bool
    device: torch.device
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def accelerator(self) -> Accelerator:
        return Accelerator(cpu=self.device.type == "cpu", mixed_precision="no")

    def size(self, whole: int, short: int) -> int:
        return short if self.short else whole

    def config(self, **knobs: Any) -> CoreConfig:
        how = "network" if self.device.type == "cuda" else "none"
        return cifar_config(self.short, train__precision="bf16", train__compile=how, sample__compile=how, **knobs)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Report that the part is ready, and wait until no other part measures."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        self.found["ready_s"] = round(time.time() - STARTED, 1)
        (self.folder / f"{self.name}.ready").touch()
        while not (self.folder / "go").exists():
            time.sleep(0.05)
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def rate(self, work: Callable[[], object], amount: int) -> float:
        """Return the amount of work per second, from the median time of several calls."""
        return amount / statistics.median(timed(work) for _ in range(1 if self.short else ROUNDS))

    def steady_rate(self, timer: Steady, run: Callable[[], object], amount: int) -> float:
        """Return the amount of work per second, from the median time of the timed steps of several calls."""
        return amount / statistics.median(timer.seconds(run) for _ in range(1 if self.short else 3))


class Steady:
    """A callback of the training loop that times its steps, without the first ones and what follows the last one."""

    def __init__(self, device: torch.device, first: int, steps: int) -> None:
        self.device, self.first, self.last = device, first, first + steps
        self.steps, self.started, self.ended = 0, 0.0, 0.0

    def __call__(self, state: TrainState, row: dict[str, Any]) -> None:
        self.steps += 1
        if self.steps == self.first:
            self.started = self.now()
        elif self.steps == self.last:
            self.ended = self.now()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, run: Callable[[], object]) -> float:
        """Call the loop and return the seconds of its timed steps."""
        self.steps = 0
        run()
        assert self.steps == self.last
        return self.ended - self.started


def floors(part: Part) -> None:
    """Measure operations per second of a bf16 matrix product, and bytes per second, read and written, of a copy."""
    size, count = part.size(8192, 256), part.size(2**29, 2**20)
    a, b = (torch.randn(size, size, device=part.device, dtype=torch.bfloat16) for _ in range(2))
    with part.turn():
        a @ b
        part.found["flops"] = max(part.rate(lambda: a @ b, 2 * size**3) for _ in range(4))
        source = torch.zeros(count, device=part.device)
        target = torch.empty_like(source)
        part.found["bytes"] = max(part.rate(lambda: target.copy_(source), 2 * source.nbytes) for _ in range(4))


def pruned_to_half(network: UNet, config: CoreConfig, round_to: int | None = None) -> UNet:
    """Return the network with channels removed until half of its multiply-accumulates are left."""
    prune = PruneConfig(method="structured", importance="l2", target="macs", keep=KEEP, round_to=round_to)
    return prune_channels(network, prune, config.seed)[0]


def pruned_to_64(network: UNet, config: CoreConfig) -> UNet:
    """Return the same with widths that are multiples of 64."""
    return pruned_to_half(network, config, 64)


def training(part: Part, change: Callable[[UNet, CoreConfig], UNet] | None = None) -> None:
    """Measure images per second of the whole loop, and GPU time by kind of kernel."""
    batch, steps, first = part.size(512, 4), part.size(40, 1), part.size(FIRST_STEPS, 1)
    config, timer = part.config(train__batch_size=batch), Steady(part.device, first, steps)
    run = our_step(
        config, part.accelerator, batch, first + steps, lambda net: change(net, config) if change else net, [timer]
    )
    run()
    with part.turn():
        if part.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        part.found["images"] = part.steady_rate(timer, run, steps * batch)
        part.found["flops_an_image"] = 3.0 * forward_flops(lively_network(config, part.device))
        if part.device.type == "cuda":
            part.found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            part.found["kernels_ms_a_step"] = by_kind(run, first + steps)


def peer(part: Part) -> None:
    """Measure images per second of Diffusers' example loop in bf16."""
    batch, steps = part.size(512, 4), part.size(10, 1)
    run = peer_step(part.config(train__batch_size=batch), part.accelerator, batch, "bf16", steps)
    with part.turn():
        run()
        part.found["images"] = part.rate(run, steps * batch)


def sampling(part: Part, change: Callable[[UNet, CoreConfig], UNet] | None = None) -> None:
    """Measure images per second of DDIM, and for the dense network also of Inception features."""
    batch, steps = part.size(1024, 4), part.size(50, 2)
    config = part.config(sample__steps=steps, sample__batch_size=batch)
    network = lively_network(config, part.device)
    dense_flops = forward_flops(network)
    if change:
        network = change(network, config)
    generator = Generator(network.eval().requires_grad_(False), config, "bf16")
    wanted = requests([NO_LABEL], batch)

    def draw() -> torch.Tensor:
        return generator.images(wanted, config.sample, 0)

    draw()
    with part.turn():
        part.found["images"] = part.rate(draw, len(wanted))
        part.found["flops_an_image"] = steps * dense_flops
        if change:
            return
        if part.device.type == "cuda":
            part.found["kernels_ms_a_batch"] = by_kind(draw, 1)
        with tempfile.TemporaryDirectory() as folder:
            random_weights(Path(folder) / "weights.pth")
            inception = read_inception(Path(folder) / "weights.pth", part.device)
        moments = Moments.empty(FID_DIM)
        images = draw()

        def look() -> None:
            for some in images.split(256):
                moments.add(inception(some).features_BD.float().cpu())

        look()
        part.found["looked_at"] = part.rate(look, len(wanted))


def digits(part: Part) -> None:
    """Measure steps per second of the whole loop on digits, batch 256."""
    how = "network" if part.device.type == "cuda" else "none"
    steps, first = part.size(500, 2), part.size(FIRST_STEPS, 1)
    knobs = {"log.progress": False, "train.precision": "bf16", "train.batch_size": 256, "train.compile": how}
    config = build(CoreConfig, PRESETS["digits"], knobs)
    data = load_data(config.data)
    state = TrainState.start(build_network(config, data.num_classes).to(part.device), config.train, config.ema)
    batches = Batches(data.train, batch_size=256, seed=0, horizontal_flip=False, device=part.device)
    accelerator, timer = part.accelerator, Steady(part.device, first, steps)

    def run() -> None:
        train(state, batches, config, [timer], accelerator=accelerator, until=state.step + first + steps)

    run()
    with part.turn():
        part.found["steps"] = part.steady_rate(timer, run, steps)
        if part.device.type == "cuda":
            part.found["kernels_ms_a_step"] = by_kind(run, first + steps)


def start(part: Part) -> None:
    """Measure the seconds from the start of the process to the end of the first step."""
    part.found["imported_s"] = round(time.time() - STARTED, 1)
    batch = part.size(512, 4)
    take_step = our_step(part.config(train__batch_size=batch), part.accelerator, batch, 1)
    part.found["built_s"] = round(time.time() - STARTED, 1)
    take_step()
    if part.device.type == "cuda":
        torch.cuda.synchronize()
    part.found["first_step_s"] = round(time.time() - STARTED, 1)


PARTS: dict[str, Callable[[Part], None]] = {
    "floors": floors,
    "training": training,
    "peer": peer,
    "sampling": sampling,
    "digits": digits,
    "training-pruned": lambda part: training(part, pruned_to_half),
    # The network of a short run is too narrow for multiples of 64.
    "training-pruned-64": lambda part: training(part, pruned_to_half if part.short else pruned_to_64),
    "sampling-pruned": lambda part: sampling(part, pruned_to_half),
}


def main(argv: list[str]) -> None:
    parser = Parser("gpu_parts")
    parser.add_argument("name", choices=[*PARTS, "start"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--started", type=float, default=time.time())
    arguments = parser.parse_args(argv)
    global STARTED
    STARTED = arguments.started
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    part = Part(arguments.name, arguments.folder, arguments.short, device)
    (PARTS | {"start": start})[arguments.name](part)
    write_json(arguments.folder / f"{arguments.name}.json", part.found)


STARTED = time.time()

if __name__ == "__main__":
    main(sys.argv[1:])
