"""Feature networks that the user gives, as TorchScript or as a classifier of this project.

TorchScript is a program: one from a stranger is run by TorchScript's interpreter, which knows tensors alone, and not by
Python. It may still compute for ever, or fill the memory. A safetensors file holds numbers and runs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffusion_core.evaluation.classifier import read_classifier
from diffusion_core.evaluation.classifier_network import Judged
from diffusion_core.evaluation.features import HASH_DIGITS, Extractor, ExtractorError, file_hash
from diffusion_core.figure_names import space_name

TORCHSCRIPT_SUFFIXES = (".pt", ".pth", ".ts", ".torchscript")


@dataclass(frozen=True)
class ScriptedExtractor:
    """A TorchScript network ``(B, C, H, W) uint8 -> (B, D) float``, or to anything that flattens to it."""

    network: torch.jit.ScriptModule
    name: str
    weights: str
    device: torch.device

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor) -> Judged:
        try:
            output = self.network(images_BCHW.to(self.device))
        except Exception as error:  # Whatever a stranger's network raises.
            reason = " ".join(str(error).split())[-200:]
            raise ExtractorError(f"{self.name}: cannot take images of {tuple(images_BCHW.shape)} ({reason})") from None
        if not isinstance(output, Tensor) or output.ndim < 2 or len(output) != len(images_BCHW):
            raise ExtractorError(f"{self.name}: expected features of shape (images, features), a tensor")
        return Judged(output.flatten(1).float(), None)


def read_extractor(path: Path, device: torch.device) -> Extractor:
    """The feature network in a file: TorchScript (``.pt``), or a classifier (``.safetensors``).

    Raises:
        ExtractorError: if there is none.
    """
    digest = file_hash(path)[:HASH_DIGITS]
    if path.suffix == ".safetensors":
        return read_classifier(path, device)
    if path.suffix not in TORCHSCRIPT_SUFFIXES:
        scripts = ", ".join(TORCHSCRIPT_SUFFIXES)
        raise ExtractorError(f"{str(path)!r}: expected .safetensors, or TorchScript as {scripts}")
    try:
        network = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ExtractorError(f"{str(path)!r}: no TorchScript ({reason})") from None
    return ScriptedExtractor(network, space_name(path.stem), digest, device)
