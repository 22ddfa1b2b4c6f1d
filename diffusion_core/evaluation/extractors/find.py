"""Find a feature network by its name, or read the one in a file of the user."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname

import torch
from accelerate import PartialState
from torch import Tensor

from diffusion_core.config import ConfigError, EvalConfig
from diffusion_core.config.metrics import EFFICIENTNET, EXTRACTORS, INCEPTION, TORCHSCRIPT_SUFFIXES, space_name
from diffusion_core.distributed import first_process_first, gather_objects
from diffusion_core.evaluation.classifier.classifier import read_classifier
from diffusion_core.evaluation.extractors.efficientnet import read_efficientnet, weights_path
from diffusion_core.evaluation.extractors.inception import download_inception, read_inception
from diffusion_core.evaluation.features import (
    HASH_DIGITS,
    Extractor,
    ExtractorError,
    Judged,
    check_weights,
    weights_file_hash,
)
from diffusion_core.messages import one_line
from diffusion_core.redact import redact


@dataclass(frozen=True)
class ScriptedExtractor:
    """A TorchScript network ``(B, C, H, W) uint8 -> (B, D) float``. Outputs with more axes are flattened."""

    network: torch.jit.ScriptModule
    name: str
    weights: str
    device: torch.device

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor) -> Judged:
        """Map uint8 images, ``(B, C, H, W)``, to features, ``(B, D)`` float32.

        Raises:
            ExtractorError: if the network fails on these images or returns no features.
        """
        try:
            output = self.network(images_BCHW.to(self.device))
        except Exception as error:  # A network of the user may raise any error.
            reason = one_line(str(error)[-200:])  # TorchScript puts the cause last.
            raise ExtractorError(f"{self.name}: cannot take images of {tuple(images_BCHW.shape)} ({reason})") from None
        if not isinstance(output, Tensor) or output.ndim < 2 or len(output) != len(images_BCHW):
            raise ExtractorError(f"{self.name}: expected features of shape (images, features), a tensor")
        return Judged(output.flatten(1).float(), None)


def check_extractors(config: EvalConfig) -> None:
    """Check that the files of the feature networks that figures need are on this machine.

    Raises:
        ConfigError: with all that are not.
    """
    if problems := list(missing_extractors(config)):
        raise ConfigError(*problems)


def missing_extractors(config: EvalConfig) -> Iterator[str]:
    """Yield the feature networks that figures need and that are not on this machine, each as one line for the user.

    Inception's published weights are downloaded when they are needed.
    """
    for wanted in config.extractors if config.in_features else ():
        if wanted == EFFICIENTNET:
            try:
                weights_path()
            except ExtractorError as error:
                yield str(error)
        elif wanted == INCEPTION:
            weights = config.inception_weights
            if weights is not None and not Path(weights).is_file():
                yield f"eval.inception_weights = {weights!r}: no such file"
        elif wanted not in EXTRACTORS and not Path(wanted).is_file():
            yield f"eval.extractors = {wanted!r}: no such file"


def find_extractor(wanted: str, inception_weights: str | None, device: torch.device) -> Extractor:
    """Return a feature network that needs no data set, by its name or file.

    Args:
        wanted: ``inception``, ``efficientnet-lite0``, or a file (:func:`read_extractor`).
        inception_weights: file of Inception's weights; None: the published ones.
        device: device of the network.

    Raises:
        ExtractorError: if it cannot be had.
    """
    if wanted == INCEPTION:
        return read_inception(Path(inception_weights) if inception_weights else download_inception(), device)
    if wanted == EFFICIENTNET:
        return read_efficientnet(device)
    if not Path(wanted).suffix:
        raise ExtractorError(f"{wanted!r}: expected {INCEPTION}, classifier, {EFFICIENTNET} or a file")
    return read_extractor(Path(wanted), device)


def agreed_extractor(wanted: str, inception_weights: str | None, device: torch.device) -> Extractor:
    """Return a feature network (:func:`find_extractor`) that all processes have, which call this together.

    The first process downloads, the others read its file.

    Raises:
        ExtractorError: in all processes, if one of them cannot have it, or has other weights than the first one.
    """
    state = PartialState()
    found: Extractor | None = None
    problem = ""
    with first_process_first(state):
        try:
            found = find_extractor(wanted, inception_weights, device)
        except ExtractorError as error:
            problem = str(error)
    answers = gather_objects((f"process {state.process_index} on {gethostname()}", problem, found and found.weights))
    for number, (where, problem, weights) in enumerate(answers):
        if problem:
            raise ExtractorError(f"{where}: {problem}" if number else problem)
        if weights != answers[0][2]:
            raise ExtractorError(
                f"{where} has other weights ({weights}) than {answers[0][0]} ({answers[0][2]}); copy the file"
            )
    assert found is not None
    return found


def read_extractor(path: Path, device: torch.device) -> Extractor:
    """Return the feature network in a file: TorchScript (``.pt``), or a classifier (``.safetensors``).

    Raises:
        ExtractorError: if the file is missing, damaged or of another format, or a weight is not finite.
    """
    digest = weights_file_hash(path)[:HASH_DIGITS]
    if path.suffix == ".safetensors":
        return read_classifier(path, device)
    if path.suffix not in TORCHSCRIPT_SUFFIXES:
        scripts = ", ".join(TORCHSCRIPT_SUFFIXES)
        raise ExtractorError(f"{str(path)!r}: expected .safetensors, or TorchScript as {scripts}")
    try:
        network = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        reason = one_line(error)
        raise ExtractorError(f"{str(path)!r}: not TorchScript ({reason})") from None
    check_weights(network.state_dict(), path)
    return ScriptedExtractor(network, space_name(redact(path.stem)), digest, device)
