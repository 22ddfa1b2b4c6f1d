"""Build both networks with the same weights, and compare their outputs and noise schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_core.config import ConfigError, CoreConfig
from diffusion_core.diffusers_io.names import from_diffusers
from diffusion_core.diffusers_io.values import defaults
from diffusion_core.diffusion.schedule import build_schedule
from diffusion_core.model.unet import UNet

TOLERANCE = 1e-4
"""Largest difference of outputs, relative to max(1, largest output): rounding gives 1e-6, another network 1e-1."""
SCHEDULE_TOLERANCE = 1e-5


def diffusers_network(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[nn.Module, list[str]]:
    """Return Diffusers' network with these weights, and the names of the weights that it does not have.

    Raises:
        ConfigError: if weights are missing or have other shapes.
    """
    from diffusers import UNet2DModel

    known = defaults(UNet2DModel)
    with torch.device("meta"):  # Allocates no memory before the shapes are checked.
        network: Any = UNet2DModel(**{key: value for key, value in config.items() if key in known})
    expected = network.state_dict()
    missing = sorted(set(expected) - set(tensors))
    if missing:
        raise ConfigError(f"{missing[0]!r}: this weight of the UNet2DModel is missing ({len(missing)} are)")
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            raise ConfigError(
                f"{name!r}: has the shape {list(tensors[name].shape)}; expected {list(tensor.shape)} by config.json"
            )
    network.load_state_dict({name: tensors[name] for name in expected}, assign=True)
    return network.eval(), sorted(set(tensors) - set(expected))


def our_network(
    config: CoreConfig, num_classes: int, their_tensors: Mapping[str, Tensor], *, has_null_class: bool
) -> UNet:
    """Return our network with Diffusers' weights; a missing embedding of "no class" becomes zero."""
    channels, size, _ = config.data.image_shape
    with torch.device("meta"):
        network = UNet(config.model, size, channels, num_classes)
    tensors = from_diffusers(network.state_dict().keys(), their_tensors)
    if num_classes and not has_null_class:
        known_CE = tensors["label_embedding.weight"]
        tensors["label_embedding.weight"] = torch.cat([known_CE, known_CE.new_zeros(1, known_CE.shape[1])])
    network.load_state_dict(tensors, assign=True)
    return network.eval()


def describe(network: UNet) -> str:
    """Return the size of a network, its classes and its images in one line."""
    weights = sum(parameter.numel() for parameter in network.parameters())
    classes = f"{network.num_classes} classes" if network.num_classes else "no classes"
    return f"{weights:,} weights, {classes}, images of {network.in_channels} x {network.image_size}^2"


@torch.no_grad()
def compare(ours: UNet, theirs: Any, labels: Sequence[int]) -> float:
    """Return the largest difference of the outputs of two networks for fixed noise and timesteps.

    Args:
        ours: our network.
        theirs: Diffusers' network; its class embeddings, if any, are ours in the same order, "no class" last.
        labels: the labels in use; the first and the last are compared.

    Raises:
        ConfigError: if the difference is larger than rounding.
    """
    source = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(2, ours.in_channels, ours.image_size, ours.image_size, generator=source)
    t_B = torch.tensor([0, 987])
    labels_B = torch.tensor([labels[0], labels[-1]]) if labels else None
    given = {}
    if theirs.class_embedding is not None and labels_B is not None:
        given["class_labels"] = torch.where(labels_B < 0, ours.num_classes, labels_B)
    expected, found = theirs(x_BCHW, t_B, **given).sample, ours(x_BCHW, t_B, labels_B)
    difference = (expected - found).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
        raise ConfigError(
            f"the two networks disagree by {difference:.1e} on the same noise: Diffusers computes something else with "
            "this configuration, or the weights are not finite"
        )
    return difference


def compare_schedules(config: CoreConfig, scheduler: Mapping[str, Any]) -> None:
    """Raise ConfigError if Diffusers' noise schedule differs from ours."""
    from diffusers import DDPMScheduler

    theirs: Any = DDPMScheduler(**{key: scheduler[key] for key in scheduler if key in defaults(DDPMScheduler)})
    ours = build_schedule(config.diffusion).alphas.square()
    difference = (theirs.alphas_cumprod.double() - ours).abs().max().item()
    if not difference <= SCHEDULE_TOLERANCE:
        raise ConfigError(f"the two noise schedules disagree by {difference:.1e} in alpha squared")
