"""Measure how cost grows with batch size, width, image size, number of steps and processes; and memory per image."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.measurement.networks import lively_network
from benchmarks.measurement.options import Options
from benchmarks.measurement.rows import Row
from benchmarks.measurement.timing import alternating
from diffusion_core.config import CoreConfig, build
from diffusion_core.data.batches import Batches
from diffusion_core.data.datasets import Images
from diffusion_core.hardware import pick_precision
from diffusion_core.model.compilation import forward_flops
from diffusion_core.model.unet import NO_LABEL
from diffusion_core.report.plots import BLUE, GREY, log_ticks, marker, panels, save
from diffusion_core.run_folder import HISTORY_FILE
from diffusion_core.sampling.generation import Generator, requests
from diffusion_core.training.batch_size import largest_share, training_memory
from diffusion_core.training.trainer import TrainState, train

SUBJECT = "scaling"
ROOT = Path(__file__).resolve().parents[2]
BASE: dict[str, Any] = {
    "data.image_size": 32,
    "model.channels": 64,
    "model.class_conditional": False,
    "train.batch_size": 8,
    "train.steps": 10**6,
    "train.warmup_steps": 0,
    "log.every": 1,
    "log.progress": False,
    "sample.steps": 10,
    "sample.batch_size": 8,
}
AXES: dict[str, tuple[str, tuple[int, ...]]] = {
    "batch size": ("train.batch_size", (1, 2, 4, 8, 16, 32)),
    "width": ("model.channels", (32, 64, 128)),
    "image size": ("data.image_size", (16, 32, 64)),
    "sampling steps": ("sample.steps", (5, 10, 20, 40)),
}
PROCESSES = (1, 2)
LARGEST = 2**16
"""Limit of the batch sizes to try, larger than any in practice."""
PROCESS_STEPS = 60


@dataclass(frozen=True)
class Point:
    """The cost of one setting.

    Attributes:
        axis: the quantity that varies.
        value: its value.
        seconds: time of an optimizer step, or of a batch of samples.
        work: its floating point operations, counted.
        memory: bytes that training keeps per image of a batch; None without training.
        largest: the batch size that `train.batch_size=auto` finds on this machine; None without training.
    """

    axis: str
    value: int
    seconds: float
    work: float
    memory: int | None = None
    largest: int | None = None

    @property
    def note(self) -> str:
        """Memory and largest batch size as text."""
        if self.memory is None:
            return ""
        return f"{self.memory / 1e6:.1f} MB an image; train.batch_size=auto: {self.largest:,}"


def step_of(config: CoreConfig, accelerator: Accelerator) -> tuple[Callable[[], object], float, int, int]:
    """Return an optimizer step, its floating point operations, the bytes per image, and the largest batch size."""
    state = TrainState.start(lively_network(config, accelerator.device), config.train, config.ema)
    batch = config.train.images_per_step
    pixels = torch.zeros((batch, *config.data.image_shape), dtype=torch.uint8)
    images = Images(pixels, torch.zeros(batch, dtype=torch.long))
    batches = Batches(images, batch_size=batch, seed=0, horizontal_flip=False, device=accelerator.device)
    memory = training_memory(state.network, config).per_image
    largest = largest_share(state.network, config, accelerator, LARGEST)
    work = 3.0 * batch * forward_flops(state.network)
    step = partial(next_step, state, batches, config, accelerator)
    return step, work, memory, largest


def next_step(state: TrainState, batches: Batches, config: CoreConfig, accelerator: Accelerator) -> None:
    train(state, batches, config, accelerator=accelerator, until=state.step + 1)


def samples_of(config: CoreConfig, accelerator: Accelerator) -> tuple[Callable[[], object], float]:
    """Return a function that samples a batch, and its floating point operations."""
    network = lively_network(config, accelerator.device).eval()
    generator = Generator(network, config, pick_precision(config.train, accelerator.device))
    wanted = requests([NO_LABEL], config.sample.batch_size)
    work = float(len(wanted) * config.sample.steps * forward_flops(network))
    return lambda: generator.images(wanted, config.sample, 0), work


def measure_axis(axis: str, options: Options, accelerator: Accelerator) -> list[Point]:
    """Measure the points along one axis, in turns."""
    key, values = AXES[axis]
    values = values[:2] if options.short else values
    small = {"model.channels": 16} if options.short and key != "model.channels" else {}
    works: dict[str, Callable[[], object]] = {}
    counted: dict[int, Sequence[Any]] = {}
    for value in values:
        config = build(CoreConfig, BASE, small, {key: value}, _attention(key, value))
        if axis == "sampling steps":
            works[str(value)], work = samples_of(config, accelerator)
            counted[value] = (work, None, None)
        else:
            works[str(value)], *counted[value] = step_of(config, accelerator)
    times = alternating(works, options.rounds, lambda line: options.say(f"{axis}: {line}"))
    return [Point(axis, value, times[str(value)], *counted[value]) for value in values]


def _attention(key: str, value: int) -> dict[str, Any]:
    return {"model.attention_resolutions": [value // 2]} if key == "data.image_size" else {}


def measure_processes(options: Options) -> list[Point]:
    """Measure steps of the digits preset with one process, and with two that share the batch, through accelerate."""
    points = []
    steps = 4 if options.short else PROCESS_STEPS
    for count in PROCESSES:
        with tempfile.TemporaryDirectory() as name:
            words = ["--preset=digits", f"--train.steps={steps}", f"--log.every={steps // 2}", "--eval.every=0",
                     "--train.batch_size=128", "--sample.every=0", "--log.progress=false",
                     f"--log.dir={name}/run"]  # fmt: skip
            launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu",
                      f"--num_processes={count}", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no",
                      "--num_cpu_threads_per_process=1", "--main_process_port=0"]  # fmt: skip
            environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
            subprocess.run([*launch, "-m", "agent", *words], cwd=name, env=environment, check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
            lines = (Path(name) / "run" / HISTORY_FILE).read_text(encoding="utf-8").splitlines()
        rate = [json.loads(line)["train/images_per_second"] for line in lines][-1]
        options.say(f"processes: {count}: {rate:.1f} images/s")
        points.append(Point("processes", count, 128.0 / rate, 1.0 / count))
    return points


def growth(points: Sequence[Point]) -> float:
    """Return the exponent by which time grows with work: the slope of a least-squares line through the logarithms."""
    xs = [math.log(point.work) for point in points]
    ys = [math.log(point.seconds) for point in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)


def plot(axes: dict[str, list[Point]], file: Path) -> None:
    """Plot one panel per axis: measured seconds, and seconds in proportion to the counted work from the first point."""
    figure, row = panels(3.6 * len(axes), 3.4, len(axes))
    for panel, (axis, points) in zip(row, axes.items(), strict=True):
        values = [point.value for point in points]
        panel.plot(values, [point.seconds for point in points], marker(0), linestyle="-", color=BLUE, label="measured")
        expected = [points[0].seconds * point.work / points[0].work for point in points]
        panel.plot(values, expected, "--", color=GREY, label="in proportion to the work")
        log_ticks(panel, "x")
        log_ticks(panel, "y")
        panel.set_xticks(values, [str(value) for value in values])
        panel.set(xlabel=axis, ylabel="seconds")
    row[0].legend(frameon=False)
    save(figure, file)


def measure(options: Options) -> list[Row]:
    """Measure one row per point. The last row of each axis states how time grows with the work."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    axes = {axis: measure_axis(axis, options, accelerator) for axis in AXES}
    processes = measure_processes(options)
    if options.plots is not None:
        options.plots.mkdir(parents=True, exist_ok=True)
        plot(axes, options.plots / "scaling.png")
    rows = []
    for axis, points in axes.items():
        for point in points:
            rows.append(Row(SUBJECT, f"{axis} {point.value}", point.seconds, "s", note=point.note))
        what = f"{axis}: exponent by which time grows with the counted work"
        rows.append(Row(SUBJECT, what, growth(points), "", note="1: in proportion"))
    rows += [Row(SUBJECT, f"{point.axis} {point.value}", point.seconds, "s") for point in processes]
    speedup = processes[0].seconds / processes[-1].seconds
    rows.append(Row(SUBJECT, f"{processes[-1].value} processes against one", speedup))
    return rows
