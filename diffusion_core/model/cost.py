"""What a network costs: parameters, multiply-accumulates, time, memory."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusion_core.model.structure import maskable, sizes
from diffusion_core.model.unet import UNet

LATENCY_BATCH = 16
"""The larger one of the two batches on which latency and memory are measured."""
LATENCY_SECONDS = 0.1
"""Time after which a measurement of latency is over."""


@dataclass(frozen=True)
class Cost:
    """Cost of one network evaluation for one image.

    Attributes:
        channels: output channels of all convolutions and linear layers, but for those of the image.
        params: number of parameters.
        nonzero_params: parameters that are not pruned: all but the exact zeros among the maskable weights.
        macs: multiply-accumulates of convolutions, linear layers and norms, as torch-pruning counts them (the
            published figures for Diff-Pruning are counted so); attention's two products are not in it.
        nonzero_macs: of these, those with weights that are not pruned.
    """

    channels: int
    params: int
    nonzero_params: int
    macs: int
    nonzero_macs: int


@dataclass(frozen=True)
class Layer:
    """What the cost of a layer follows from.

    Attributes:
        kind: its type.
        kernel: weights per pair of channels; of an embedding its rows.
        positions: how often its weights are applied to one image.
    """

    kind: type[nn.Module]
    kernel: int
    positions: int


def example_inputs(network: UNet, batch: int = 1) -> tuple[Tensor, ...]:
    """Inputs of a batch, on the network's device, as its ``forward`` takes them."""
    device = next(network.parameters()).device
    size = network.image_size
    image = torch.zeros(batch, network.input_channels, size, size, device=device)
    t = torch.zeros(batch, dtype=torch.long, device=device)
    return (image, t, t.clone()) if network.num_classes else (image, t)


def count_cost(network: UNet) -> Cost:
    """Count what a network costs."""
    layers = network_layers(network)
    channels, params, macs = count_sizes(layers, {name: sizes(network.get_submodule(name)) for name in layers})
    zeros = masked_macs = 0
    for name, weight in maskable(network).items():
        pruned = int((weight == 0).sum())
        zeros += pruned
        masked_macs += pruned * layers[name.removesuffix(".weight")].positions
    return Cost(channels, params, params - zeros, macs, macs - masked_macs)


def network_layers(network: UNet) -> dict[str, Layer]:
    """The layers of a network that cost anything, by name; widths do not matter to what is said of them."""
    layers: dict[str, Layer] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: Any, _inputs: Any, output: Tensor) -> None:
            kernel, positions = 1, 1
            if isinstance(module, nn.Conv2d):
                kernel, positions = module.kernel_size[0] * module.kernel_size[1], output.shape[2] * output.shape[3]
            elif isinstance(module, nn.GroupNorm):
                positions = output[0, 0].numel()
            elif isinstance(module, nn.Linear):
                positions = output[0, ..., 0].numel()
            elif isinstance(module, nn.Embedding):
                kernel = module.num_embeddings
            layers[name] = Layer(type(module), kernel, positions)

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in network.named_modules() if sizes(module)]
    was_training = network.training
    try:
        with torch.no_grad():
            network.eval()(*example_inputs(network))
    finally:
        network.train(was_training)
        for handle in handles:
            handle.remove()
    return {name: layers[name] for name, module in network.named_modules() if sizes(module)}


def count_sizes(layers: Mapping[str, Layer], widths: Mapping[str, Mapping[str, int]]) -> tuple[int, int, int]:
    """Channels, parameters and multiply-accumulates of layers of given sizes, see :class:`Cost`."""
    channels = params = macs = 0
    for name, layer in layers.items():
        size = widths[name]
        if layer.kind is nn.GroupNorm:
            params += 2 * size["num_channels"]
            macs += 2 * size["num_channels"] * layer.positions
        elif layer.kind is nn.Embedding:
            params += layer.kernel * size["embedding_dim"]
        else:
            taken, given = (size[key] for key in (("in_channels", "out_channels") if layer.kind is nn.Conv2d else
                                                  ("in_features", "out_features")))  # fmt: skip
            weights = taken * given * layer.kernel
            params += weights + given
            # torch-pruning counts the bias of a convolution at every position, that of a linear layer once.
            macs += weights * layer.positions + given * (layer.positions if layer.kind is nn.Conv2d else 1)
            channels += given if name != "conv_out" else 0
    return channels, params, macs


# Measured.


@torch.no_grad()
def latencies(networks: Sequence[UNet], batch: int, seconds: float = LATENCY_SECONDS, least: int = 1) -> list[float]:
    """Seconds that a forward pass of a batch takes, of each network the fastest of several, in float32.

    The networks take turns, so that a busy machine slows all of them.

    Args:
        networks: on one device.
        batch: images at once.
        seconds: passes are made until that time is over,
        least: but at least so many of each, after one to warm up.
    """
    modes = [network.training for network in networks]
    device = next(networks[0].parameters()).device
    inputs = [example_inputs(network.eval(), batch) for network in networks]
    times: list[list[float]] = [[] for _ in networks]
    for network, given in zip(networks, inputs, strict=True):
        network(*given)
    started = time.perf_counter()
    while len(times[0]) < least or time.perf_counter() - started < seconds:
        for network, given, taken in zip(networks, inputs, times, strict=True):
            _wait(device)
            before = time.perf_counter()
            network(*given)
            _wait(device)
            taken.append(time.perf_counter() - before)
    for network, mode in zip(networks, modes, strict=True):
        network.train(mode)
    return [min(taken) for taken in times]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def peak_memory(network: UNet, batch: int) -> int:
    """The most bytes that tensors take during a forward pass of a batch, weights and inputs among them.

    Counted by operation, in the same way on every device: an allocator's own figures hold whatever else the process
    keeps on a GPU. What an operation takes for itself while it runs is not counted.
    """
    given = example_inputs(network, batch)
    held = sum(tensor.untyped_storage().nbytes() for tensor in (*network.state_dict().values(), *given))
    with _Allocations() as allocations:
        network(*given)
    return held + allocations.peak


class _Allocations(TorchDispatchMode):
    """Adds up the storages that operations make, and takes off those that die."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in self.known | before:
                    self.known.add(id(storage))
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._dead, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _dead(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size
