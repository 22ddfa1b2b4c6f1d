"""Check on a GPU, in about three minutes, that what the processor's tests cannot see is right.

  python scripts/gpu_check.py                      all checks, on the GPU if there is one
  python scripts/gpu_check.py graphs masks         some of them
  python scripts/gpu_check.py --out check.json     the figures as JSON too

Each check prints one line: pass or FAIL, and its figure. The exit status is 1 if a check failed.
"""

from __future__ import annotations

if __name__ == "__main__":
    from diffusion_core.signals import leave_at_once

    leave_at_once()  # Until main handles signals: the imports take seconds.

import copy
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from agent.command import fail, run_and_leave
from diffusion_core.config import PRESETS, CoreConfig, build
from diffusion_core.data.batches import Batches
from diffusion_core.data.datasets import Dataset, load_data
from diffusion_core.evaluation.classifier.training import RECIPES, train_classifier
from diffusion_core.files import new_file, write_json
from diffusion_core.hardware import algorithms
from diffusion_core.messages import Parser, UserError, one_line, out_file
from diffusion_core.model.cost import peak_memory
from diffusion_core.model.structure import maskable
from diffusion_core.model.unet import build_network
from diffusion_core.sampling.generation import Generator, requests
from diffusion_core.sampling.lows import held_out
from diffusion_core.training.distillation import Distillation
from diffusion_core.training.trainer import TrainState, train
from pruning.calibration import Calibration
from pruning.config import PruneConfig
from pruning.masks.gradual import GradualPruning, Ramp
from pruning.masks.mask import held_masks, hold_masks
from pruning.pruner import prune_state

LEVELS = 8
"""Largest difference, in uint8 levels, between an image of the processor and one of the GPU."""


@dataclass(frozen=True)
class Machine:
    """Where the checks run, and how much work they do."""

    device: torch.device
    steps: int

    @cached_property
    def accelerator(self) -> Accelerator:
        """One process on the device."""
        return Accelerator(cpu=self.device.type == "cpu", mixed_precision="no")

    @cached_property
    def digits(self) -> Dataset:
        """The built-in digits."""
        return load_data(self.config().data)

    def config(self, **knobs: Any) -> CoreConfig:
        """The digits preset in exact arithmetic; a dot in a knob's name is written as two underscores."""
        fixed = {"log.progress": False, "log.every": 10, "train.precision": "fp32", "train.compile": "none"}
        return build(CoreConfig, PRESETS["digits"], fixed, {key.replace("__", "."): v for key, v in knobs.items()})

    def fresh(self, config: CoreConfig) -> tuple[TrainState, Batches]:
        """A network with fresh weights, and its batches."""
        network = build_network(config, self.digits.num_classes).to(self.device)
        batches = Batches(
            self.digits.train,
            batch_size=config.train.images_per_step,
            seed=config.seed,
            draws=config.draws,
            horizontal_flip=True,
            device=self.device,
        )
        return TrainState.start(network, config.train, config.ema), batches

    def trained(self, config: CoreConfig, *callbacks: Any) -> TrainState:
        """A state after a few steps."""
        state, batches = self.fresh(config)
        return train(state, batches, config, callbacks, accelerator=self.accelerator, until=self.steps)


def same(one: TrainState, other: TrainState) -> bool:
    """Whether two networks have the same weights, bit for bit."""
    pairs = zip(one.network.parameters(), other.network.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def levels_apart(one: Tensor, other: Tensor) -> int:
    """Largest difference of two batches of uint8 images."""
    return int((one.int() - other.int()).abs().max())


def graphs(machine: Machine) -> list[tuple[str, bool, Any]]:
    """A replayed step and replayed images equal launched ones, bit for bit."""
    found: list[tuple[str, bool, Any]] = []
    for name, knobs in (
        ("plain", {}),
        ("dropout, two parts, bf16", {"model__dropout": 0.2, "train__accumulation": 2, "train__precision": "bf16"}),
        ("self-conditioning, learned variance", {"model__self_conditioning": True, "model__learned_variance": True}),
        ("upsampling", {"upsample__factor": 2}),
    ):
        configs = [
            machine.config(train__deterministic=True, train__cuda_graphs=on, sample__cuda_graphs=on, **knobs)
            for on in (True, False)
        ]
        one, other = (machine.trained(config) for config in configs)
        found.append((f"steps, {name}", same(one, other), None))
        lows, wanted = held_out(machine.digits, configs[0].upsample), requests([0, 1], 3)
        images = [
            Generator(copy.deepcopy(one.ema.network), config, "fp32", lows=lows).images(wanted, config.sample, 0)
            for config in configs
        ]
        apart = levels_apart(*images)
        found.append((f"images, {name}: levels apart", apart == 0, apart))
    return found


def determinism(machine: Machine) -> list[tuple[str, bool, Any]]:
    """``train.deterministic`` gives the same weights twice, and what it calls has deterministic algorithms."""
    config = machine.config(train__deterministic=True)
    found = [("twice the same weights", same(machine.trained(config), machine.trained(config)), None)]
    with algorithms(config.train, "fp32"):
        train_classifier(machine.digits.train, 10, RECIPES["tiny"], mirrored=False, device=machine.device)
    return [*found, ("the classifier trains", True, None)]


def processor(machine: Machine) -> list[tuple[str, bool, Any]]:
    """Images of the processor and of this device from the same weights."""
    network = machine.trained(machine.config()).ema.network
    found: list[tuple[str, bool, Any]] = []
    for sampler in ("ddim", "ddpm", "dpmpp_2m"):
        config = machine.config(sample__sampler=sampler)
        images = [
            Generator(copy.deepcopy(network).to(device), config, "fp32").images(requests([0, 1], 4), config.sample, 0)
            for device in (machine.device, torch.device("cpu"))
        ]
        apart = levels_apart(*images)
        found.append((f"{sampler}: levels apart", apart <= LEVELS, apart))
    return found


def masks(machine: Machine) -> list[tuple[str, bool, Any]]:
    """Pruned weights stay zero under replayed steps, and masks go where their weights are."""
    found: list[tuple[str, bool, Any]] = []
    config = machine.config()
    gradual = GradualPruning(Ramp(2, machine.steps - 2, 4), config.seed, PruneConfig(method="gradual", keep=0.3))
    state = machine.trained(config, gradual)
    held, weights = held_masks(state) or {}, maskable(state.network)
    zero = all(bool((weight[~held[name]] == 0).all()) for name, weight in weights.items())
    found.append(("gradual: masked weights are zero", zero and bool(held), None))
    for method in ("snip", "synflow", "structured"):
        state, batches = machine.fresh(config)
        prune = PruneConfig(method=method, keep=0.5, calibration_batches=1)
        report = prune_state(state, config, prune, Calibration.of(machine.digits.train, config, machine.device))
        train(state, batches, config, accelerator=machine.accelerator, until=4)
        found.append((f"{method}: share removed", 0.3 < report.sparsity < 0.7, round(report.sparsity, 4)))
    state, _ = machine.fresh(config)
    hold_masks(state, {name: torch.rand(weight.shape) > 0.3 for name, weight in maskable(state.network).items()})
    prune_state(state, config, PruneConfig(method="synflow", keep=0.5), None)
    return [*found, ("synflow over masks of a checkpoint", True, None)]


def memory(machine: Machine) -> list[tuple[str, bool, Any]]:
    """The peak memory of a network is its own, whatever else the process holds."""
    network = build_network(machine.config(), 10).to(machine.device).eval()
    alone = peak_memory(network, 16)
    ballast = torch.empty(2**26, device=machine.device)
    beside = peak_memory(network, 16)
    del ballast
    return [("peak memory beside other tensors", alone == beside, [alone, beside])]


def waits(machine: Machine) -> list[tuple[str, bool, Any]]:
    """A step waits for the GPU nowhere; a row of figures once."""
    config = machine.config(log__every=1000)
    state, batches = machine.fresh(config)
    train(state, batches, config, accelerator=machine.accelerator, until=6)
    if machine.device.type != "cuda":
        return [("waits in 10 steps (no GPU: not measured)", True, None)]
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            train(state, batches, config, accelerator=machine.accelerator, until=16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchroniz" in str(w.message)})
    return [("places that wait in 10 steps: schedule, epoch and row at most", len(places) <= 3, places)]


class Noting(Distillation):
    """A distillation that notes how many feature maps of the student it sees."""

    seen = 0

    def loss(self) -> Tensor:
        self.seen = len(self._watch.features)
        return super().loss()


def distillation(machine: Machine) -> list[tuple[str, bool, Any]]:
    """A compiled student shows its feature maps to a distillation that began after it was compiled."""
    config = machine.config(train__compile="blocks" if machine.device.type == "cuda" else "none")
    state, batches = machine.fresh(config)
    train(state, batches, config, accelerator=machine.accelerator, until=2)
    teaching = Noting(copy.deepcopy(state.ema.network), state.network, 1.0, 1.0)
    train(state, batches, config, accelerator=machine.accelerator, until=8, distillation=teaching)
    teaching.close()
    expected = 2 * len(config.model.channel_multipliers) + 1
    return [("feature maps seen", teaching.seen == expected, teaching.seen)]


CHECKS: dict[str, Callable[[Machine], list[tuple[str, bool, Any]]]] = {
    check.__name__: check for check in (graphs, determinism, processor, masks, memory, waits, distillation)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 if a check failed."""
    parser = Parser("gpu_check.py", description=__doc__)
    parser.add_argument("check", nargs="*", metavar="CHECK", help=f"one or more of {', '.join(CHECKS)} (all)")
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="training steps of each check (30)")
    parser.add_argument("--out", type=out_file, metavar="FILE", help="write the figures there as JSON")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.check if name not in CHECKS]
    if unknown:
        parser.error(f"CHECK = {unknown[0]!r}: expected one of {', '.join(CHECKS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = Machine(device, max(12, arguments.steps))
    print(f"torch {torch.__version__} on {torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'}")
    report: dict[str, Any] = {}
    failed = 0
    for name in arguments.check or CHECKS:
        started = time.perf_counter()
        try:
            found = CHECKS[name](machine)
        except Exception as error:  # One broken check must not hide the others.
            traceback.print_exc(limit=4)
            found = [(f"{type(error).__name__}: {one_line(error)}", False, None)]
        for what, holds, figure in found:
            failed += not holds
            print(f"{'pass' if holds else 'FAIL'}  {name}: {what}{'' if figure is None else f' {figure}'}", flush=True)
        report[name] = {
            "seconds": round(time.perf_counter() - started, 1),
            "found": [{"what": what, "holds": holds, "figure": figure} for what, holds, figure in found],
        }
        if arguments.out:
            try:
                with new_file(arguments.out, "--out") as temporary:
                    write_json(temporary, report)
            except UserError as error:
                return fail(str(error))
    return 1 if failed else 0


if __name__ == "__main__":
    run_and_leave(main, interruptible=True)
