"""Record work once as a CUDA graph, and replay it: the CPU then launches one graph instead of each kernel.

A replay runs the recorded kernels on the recorded addresses. Inputs are therefore copied into fixed tensors, and
recorded work must not read values on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion_core.messages import one_line

WARM_UP = 3
"""Number of ordinary calls before a recording. In these, libraries select algorithms and the compiler compiles, which
must not happen while recording."""


def is_replayed(wanted: bool, device: torch.device, processes: int = 1) -> bool:
    """Return whether to record and replay work: if wanted, and on one GPU only."""
    return wanted and device.type == "cuda" and processes == 1


class Replayed:
    """A function of tensors on one GPU that is recorded after a few ordinary calls, and then replayed.

    Every call does the function's work exactly once, as an ordinary call or as a replay. The work may change tensors in
    place (weights, moments). These must keep their addresses until :meth:`forget`.

    Args:
        function: takes tensors (or None) and returns tensors. It may draw from the GPU's default generator, which a
            replay advances as an ordinary call does.
        on_recording: called with True before each recording and with False after it.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        on_recording: Callable[[bool], None] = lambda _recording: None,
    ) -> None:
        self.function = function
        self.on_recording = on_recording
        self.forget()

    def forget(self) -> None:
        """Free the recording and start over with ordinary calls. Call it if tensors that the work uses are replaced."""
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor | None] = []
        self._outputs: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """Return the function's result. A replay overwrites the previous result: use it before the next call."""
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._beside(inputs)
        if self._graph is None:
            self._inputs = [None if tensor is None else tensor.clone() for tensor in inputs]
            self._record()
        else:
            for place, tensor in zip(self._inputs, inputs, strict=True):
                if place is not None and tensor is not None:
                    place.copy_(tensor)
        assert self._graph is not None
        self._graph.replay()
        return self._outputs

    def _beside(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """Make an ordinary call on another stream, as PyTorch requires before a recording."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            outputs = self.function(*inputs)
        current.wait_stream(stream)
        for tensor in inputs:
            if tensor is not None:
                tensor.record_stream(stream)
        for tensor in outputs:
            tensor.record_stream(current)
        return outputs

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        self.on_recording(True)
        try:
            with torch.cuda.graph(graph):
                self._outputs = self.function(*self._inputs)
        except RuntimeError as error:
            raise RuntimeError(
                f"could not record a CUDA graph ({one_line(error)}); set train.cuda_graphs=false "
                f"or sample.cuda_graphs=false"
            ) from error
        finally:
            self.on_recording(False)
        self._graph = graph


class ReplayedNetwork:
    """A network without gradients whose forward pass is replayed, with one recording per shape of its inputs.

    Args:
        network: ``(x_BCHW, t_B, labels_B | None) -> output``, on a GPU. Its weights may change in place.
    """

    def __init__(self, network: Callable[..., Tensor]) -> None:
        self.network = network
        self._replayed: dict[Any, Replayed] = {}

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """Replay the forward pass. Record it first if the inputs have a new shape."""
        key = x_BCHW.shape, x_BCHW.dtype, t_B.dtype, labels_B is None
        replayed = self._replayed.setdefault(key, Replayed(self._forward))
        return replayed(x_BCHW, t_B, labels_B)[0].clone()  # Samplers keep outputs across steps.

    def _forward(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None) -> tuple[Tensor, ...]:
        # Without autocast's cache: its bf16 weights would be in the graph's memory, and later calls would use them.
        dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False):
            return (self.network(x_BCHW, t_B, labels_B),)
