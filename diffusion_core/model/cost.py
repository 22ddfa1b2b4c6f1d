"""Count and measure what a network costs: parameters, multiply-accumulates, time, memory."""

from __future__ import annotations

import inspect
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusion_core.model.structure import sizes
from diffusion_core.model.unet import AttentionBlock, UNet

LATENCY_BATCH = 16
"""The larger of the two batch sizes at which latency and memory are measured."""
LATENCY_SECONDS = 0.1
"""Seconds after which a measurement of latency ends."""


@dataclass(frozen=True)
class Cost:
    """Cost of one network evaluation for one image.

    Attributes:
        channels: output channels of all convolutions and linear layers, except those of the image.
        params: number of parameters.
        nonzero_params: parameters that are not pruned by masks. A weight that merely is zero, such as those of layers
            that start at zero, is not pruned.
        macs: multiply-accumulates of convolutions, linear layers and norms, counted as torch-pruning and the published
            figures for Diff-Pruning do. The two matrix products of attention are not counted.
        nonzero_macs: those of ``macs`` with weights that are not pruned by masks.
        macs_with_attention: ``macs``, and the two matrix products of attention: of queries and keys, and of their
            softmax and values (Vaswani et al. 2017, eq. 1). These grow with the square of the number of pixels.
    """

    channels: int
    params: int
    nonzero_params: int
    macs: int
    nonzero_macs: int
    macs_with_attention: int


@dataclass(frozen=True)
class Layer:
    """The properties that determine the cost of a layer, besides its widths.

    Attributes:
        kind: its type.
        kernel: weights per pair of an input and an output channel; for an embedding, its number of rows.
        positions: number of times that its weights are applied to one image.
    """

    kind: type[nn.Module]
    kernel: int
    positions: int


def example_inputs(network: UNet, batch: int = 1) -> tuple[Tensor, ...]:
    """Return example inputs of the network's ``forward``, on its device."""
    device = next(network.parameters()).device
    size = network.image_size
    image = torch.zeros(batch, network.input_channels, size, size, device=device)
    t = torch.zeros(batch, dtype=torch.long, device=device)
    return (image, t, t.clone()) if network.num_classes else (image, t)


def count_cost(network: UNet, masks: Mapping[str, Tensor] | None = None) -> Cost:
    """Count the cost of a network.

    Args:
        network: the network, of any widths.
        masks: True for each weight that is kept, by name of the weight; None: no weight is masked.
    """
    layers = network_layers(network)
    channels, params, macs = count_sizes(layers, {name: sizes(network.get_submodule(name)) for name in layers})
    masked = masked_macs = 0
    for name, mask in (masks or {}).items():
        pruned = mask.numel() - int(mask.sum())
        masked += pruned
        masked_macs += pruned * layers[name.removesuffix(".weight")].positions
    return Cost(
        channels, params, params - masked, macs, macs - masked_macs, macs + _attention_products(network, layers)
    )


def _attention_products(network: UNet, layers: Mapping[str, Layer]) -> int:
    """Return the multiply-accumulates of the matrix products of attention, of all blocks and heads."""
    products = 0
    for name, module in network.named_modules():
        if isinstance(module, AttentionBlock):
            pairs = layers[f"{name}.query"].positions ** 2
            products += pairs * (module.query.out_features + module.value.out_features)
    return products


def network_layers(network: UNet) -> dict[str, Layer]:
    """Return the layers of a network that have a cost, by name. The result does not depend on their widths."""
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
    """Return channels, parameters and multiply-accumulates of layers with given sizes (see :class:`Cost`)."""
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


# Measurements.


@torch.no_grad()
def latencies(networks: Sequence[UNet], batch: int, seconds: float = LATENCY_SECONDS, least: int = 1) -> list[float]:
    """Measure the seconds of a forward pass of a batch in float32. Return the fastest of several for each network.

    The networks take turns, so that other load on the machine affects all of them equally.

    Args:
        networks: networks on one device.
        batch: images per batch.
        seconds: time after which no further pass starts.
        least: smallest number of passes of each network, even if they take longer, after one warm-up pass.
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
    """Return the largest number of bytes that tensors take during a forward pass of a batch, with weights and inputs.

    Bytes are counted per operation, in the same way on every device. An allocator's figures would include everything
    else that the process keeps on a GPU. Temporary memory inside an operation is not counted.
    """
    given = example_inputs(network, batch)
    held = sum(tensor.untyped_storage().nbytes() for tensor in (*network.state_dict().values(), *given))
    with _Allocations() as allocations:
        network(*given)
    return held + allocations.peak


def measured_costs(counted: Mapping[UNet, Cost], batch: int) -> list[dict[str, Any]]:
    """Return what networks cost, as plain values by name: counts, times in milliseconds, memory in bytes.

    Args:
        counted: the networks, with what was counted of them.
        batch: number of images of ``latency`` and ``peak_memory``; ``..._single`` are those of one image.
    """
    single, several = (latencies(list(counted), size, 1.0, least=3) for size in (1, batch))
    return [
        asdict(cost)
        | {
            "latency": 1000.0 * several[i],
            "latency_batch": batch,
            "latency_single": 1000.0 * single[i],
            "peak_memory": peak_memory(network, batch),
            "peak_memory_single": peak_memory(network, 1),
        }
        for i, (network, cost) in enumerate(counted.items())
    ]


class _Allocations(TorchDispatchMode):
    """Tracks the bytes of all storages that operations create, until these are freed."""

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


# PyTorch hides a mode from its compiler with a decorator, which imports the compiler when called.
setattr(_Allocations, "__torch_dispatch__", inspect.unwrap(_Allocations.__torch_dispatch__))  # noqa: B010 - a method
