"""Write a model as a file that other programs run without this project: ``torch.export`` or ONNX, and a JSON file.

The file holds a guided denoiser: ``(x, t, labels) -> x0``, without ``labels`` if the model has no classes. The JSON
file holds what a sampler needs besides: the timesteps, and the amplitudes of signal and noise. One step of DDIM (Song
et al. 2021, eq. 12) from step i to i + 1 is

    x0 = model(x, timesteps[i], labels)
    x = alphas[i + 1] * x0 + sigmas[i + 1] * (x - alphas[i] * x0) / sigmas[i]

from ``x = start * noise``; after the last step, x is the image in [-1, 1]. The file takes timesteps as
``timestep_type``: float32 if any lies between two trained ones, else int64. A student of consistency tuning
(``sampler`` in the JSON file) is sampled with new noise: ``x = alphas[i + 1] * x0 + sigmas[i + 1] * noise``.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_core.config import CoreConfig
from diffusion_core.diffusion.denoiser import clipped
from diffusion_core.diffusion.sampling_steps import SamplingSteps
from diffusion_core.files import write_json
from diffusion_core.messages import UserError, one_line
from diffusion_core.model.unet import UNet
from diffusion_core.randomness import Purpose, generator
from diffusion_core.sampling.generation import Generator
from diffusion_core.sampling.guidance import between_levels, guided
from diffusion_core.sampling.samplers import start_scale, steps_of

DESCRIPTION = "model.json"
TOLERANCE = 1e-4
"""Largest difference of a clean image between the file and the network. Images have 255 levels, 0.008 apart."""

LARGEST_BATCH = 65_536
"""Largest batch of a file. The compilers want a bound."""


class PortableDenoiser(nn.Module):
    """A guided denoiser as one module, for any batch size.

    Args:
        network: the network, in evaluation mode, on the CPU.
        config: its configuration; ``sample.*`` decides about guidance, clipping and timesteps.

    Raises:
        UserError: if a file cannot hold the model.
    """

    def __init__(self, network: UNet, config: CoreConfig) -> None:
        super().__init__()
        if config.upsample.wanted:
            raise UserError(
                f"upsample.factor = {config.upsample.factor}: the network also takes a small image, for which a file "
                "has no input; export an ordinary model"
            )
        if config.model.self_conditioning:
            raise UserError(
                "model.self_conditioning = True: the network also takes its last estimate, which a file does not keep; "
                "export a model without it"
            )
        self.network = network
        self.sample = config.sample
        self.denoiser = Generator(network, config, "fp32").denoiser()
        self.steps: SamplingSteps = steps_of(config.sample, self.denoiser.schedule)
        self.start = start_scale(self.denoiser.schedule, self.steps)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """Return the expected clean images, ``(B, C, H, W)`` float32.

        Args:
            x_BCHW: noisy images, float32.
            t_B: their timesteps, of the type that :meth:`SamplingSteps.t` returns.
            labels_B: their classes, int64; -1 means no class.
        """
        interval = self.sample.guidance_interval
        applies = between_levels(self.denoiser.schedule, *interval) if interval else None
        wrapped = guided(self._clean, self.sample.guidance, applies=applies)
        return (clipped(wrapped) if self.sample.clip_x0 else wrapped)(x_BCHW, t_B, labels_B)

    def _clean(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None) -> Tensor:
        output, _ = self.denoiser.predict(x_BCHW, t_B, labels_B)
        return self.denoiser.clean(output, x_BCHW, t_B)

    def example(self, count: int) -> tuple[Tensor, ...]:
        """Return arguments of ``forward`` for some images: noise, timesteps from the steps in turn, and classes."""
        shape = (self.network.in_channels, self.network.image_size, self.network.image_size)
        noise_BCHW = torch.empty(count, *shape).normal_(generator=generator(0, Purpose.SAMPLE))
        t_B = self.steps.t_S[torch.arange(count) % len(self.steps)]
        if not self.network.num_classes:
            return noise_BCHW, t_B
        return noise_BCHW, t_B, torch.arange(count) % self.network.num_classes

    def description(self, class_names: Sequence[str]) -> dict[str, Any]:
        """Return what a sampler needs besides the file, as JSON. The last of the amplitudes are 1 and 0: no noise."""
        return {
            "image_shape": [self.network.in_channels, self.network.image_size, self.network.image_size],
            "class_names": list(class_names) if self.network.num_classes else [],
            "guidance": self.sample.guidance,
            "sampler": self.sample.sampler,
            "start": self.start,
            "timesteps": list(self.steps.timesteps),
            "timestep_type": str(self.steps.dtype).removeprefix("torch."),
            "alphas": self.steps.alphas.tolist(),
            "sigmas": self.steps.sigmas.tolist(),
        }


def write_program(model: PortableDenoiser, folder: Path) -> Path:
    """Write ``model.pt2``, which ``torch.export.load`` reads."""
    path = folder / "model.pt2"
    torch.export.save(_program(model), path)
    return path


def write_onnx(model: PortableDenoiser, folder: Path) -> Path:
    """Write ``model.onnx``, with inputs ``x``, ``t`` and ``labels`` and the output ``x0``.

    Raises:
        UserError: if a package is missing.
    """
    _need("onnx", "onnxscript", "onnxruntime")
    path = folder / "model.onnx"
    names = ["x", "t", "labels"][: len(model.example(1))]
    with redirect_stdout(StringIO()):  # It prints each of its stages.
        torch.onnx.export(
            _program(model), f=path, dynamo=True, input_names=names, output_names=["x0"], external_data=False
        )
    return path


def run_program(path: Path, arguments: Sequence[Tensor]) -> Tensor:
    """Return what a file of :func:`write_program` computes."""
    return torch.export.load(path).module()(*arguments)


def run_onnx(path: Path, arguments: Sequence[Tensor]) -> Tensor:
    """Return what a file of :func:`write_onnx` computes, by ONNX Runtime on the processor."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    named = zip((node.name for node in session.get_inputs()), arguments, strict=True)
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in named})[0])


Writer = Callable[[PortableDenoiser, Path], Path]
Runner = Callable[[Path, Sequence[Tensor]], Tensor]

FORMATS: Mapping[str, tuple[Writer, Runner]] = {"onnx": (write_onnx, run_onnx), "torch": (write_program, run_program)}
"""For each format, what writes a file, and what runs it."""


@torch.no_grad()
def write_model(network: UNet, config: CoreConfig, class_names: Sequence[str], folder: Path, kind: str) -> float:
    """Write a model and its description, and run it once for comparison.

    Args:
        network: the network, in evaluation mode, on the CPU.
        config: its configuration.
        class_names: names of its classes, by label.
        folder: an empty folder.
        kind: a key of :data:`FORMATS`.

    Returns:
        The largest difference between the clean images of the file and those of the network.

    Raises:
        UserError: if the file cannot hold the model, a package is missing, or the two differ.
    """
    write, run = FORMATS[kind]
    model = PortableDenoiser(network, config).eval()
    with warnings.catch_warnings(action="ignore"):  # The exporters warn about their own insides.
        path = write(model, folder)
    write_json(folder / DESCRIPTION, model.description(class_names))
    arguments = model.example(5)  # Not the number of images with which it was traced.
    found, expected = run(path, arguments), model(*arguments)
    difference = float((found - expected).abs().max())
    tolerance = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= tolerance:
        raise UserError(
            f"--format = {kind!r}: the file's clean images differ from the network's by up to {difference:.2g}, more "
            f"than the tolerance of {tolerance:.2g}; {_remedy(kind, config.sample.guidance)}"
        )
    return difference


def _remedy(kind: str, guidance: float) -> str:
    """Return what to do if a file of a format is not as exact as it has to be."""
    lower = f"lower --guidance = {guidance:g}, which multiplies rounding errors" if guidance > 1.0 else ""
    other = "take --format torch" if kind != "torch" else "sample with scripts/sample_images.py"
    return f"{lower}, or {other}" if lower else other


def _program(model: PortableDenoiser) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    arguments = model.example(3)
    names = ["x_BCHW", "t_B", "labels_B"][: len(arguments)]
    try:
        return torch.export.export(model, arguments, dynamic_shapes={name: {0: batch} for name in names})
    except torch._dynamo.exc.UserError as error:
        raise UserError(f"torch.export cannot trace the model: {one_line(error)}") from None


def _need(*packages: str) -> None:
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(f"--format = 'onnx': needs {', '.join(missing)}: pip install \"diffusion-sweeps[onnx]\"")
