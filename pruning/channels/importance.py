"""Importance of channels: a score for every channel of every group, from weights and gradients.

Each importance is a saliency of single weights, summed over all weights that are removed with a channel: the rows of
the layers that output it, the columns of the layers that take it, and the gains of the norms in between. Magnitudes
ignore biases and norms, because gains near one do not distinguish channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion_core.model.unet import UNet
from diffusion_core.randomness import Purpose, generator
from pruning.calibration import Calibration
from pruning.channels.groups import ChannelGroup, Member
from pruning.config import PruneConfig
from pruning.registries import IMPORTANCES

Saliency = dict[str, Tensor]
"""Maps names of parameters to the saliencies of their entries, in the parameter's shape."""

HESSIAN_MEMORY = 3
"""How much more memory the second derivatives of an image take than a training step."""


@dataclass(frozen=True)
class ImportanceRecord:
    """An importance that a user can select.

    Attributes:
        saliency: returns the saliency of every weight; None: scores are random.
        help: what it is, and its source.
        signed: whether saliencies of a channel are summed within a layer before the absolute value is taken.
        magnitudes: whether only weights of convolutions and linear layers count.
        gradients: whether it needs ``prune.calibration_batches`` batches of training images.
        threshold: whether it uses ``prune.threshold``.
        redraws: whether the remaining weights are drawn anew.
    """

    saliency: Callable[[UNet, PruneConfig, Calibration], Saliency] | None
    help: str
    signed: bool = False
    magnitudes: bool = False
    gradients: bool = False
    threshold: bool = False
    redraws: bool = False


def channel_scores(
    network: UNet, groups: list[ChannelGroup], prune: PruneConfig, seed: int, calibration: Calibration | None
) -> dict[str, Tensor]:
    """Return the score of every channel, ``(width,)`` float64 per group. The lowest are removed first.

    Args:
        network: the network, in evaluation mode.
        groups: its groups of channels.
        prune: selects the importance.
        seed: seed of random scores.
        calibration: training images for gradients; may be None if the importance needs none.

    Raises:
        ValueError: if the importance needs images and there are none.
    """
    record: ImportanceRecord = IMPORTANCES[prune.importance]
    if record.saliency is None:
        source = generator(seed, Purpose.PRUNE)
        return {group.name: torch.rand(group.width, generator=source, dtype=torch.float64) for group in groups}
    if calibration is None and record.gradients:
        raise ValueError(f"prune.importance = {prune.importance!r}: needs images to measure gradients on")
    with torch.enable_grad():
        saliency = record.saliency(network, prune, calibration)  # type: ignore[arg-type]
    modules = dict(network.named_modules())
    scores = {}
    for group in groups:
        total = torch.zeros(group.width, dtype=torch.float64)
        for member in group.members:
            if record.magnitudes and not isinstance(modules[member.layer], nn.Conv2d | nn.Linear):
                continue
            for part in _slices(saliency, member, biases=not record.magnitudes):
                total += part.sum(dim=1).abs() if record.signed else part.abs().sum(dim=1)
        scores[group.name] = total
    return scores


def _slices(saliency: Saliency, member: Member, biases: bool) -> Iterator[Tensor]:
    """Yield the entries of a layer's parameters that belong to each channel, ``(width, entries)``, per parameter."""
    places = torch.tensor(member.places)
    weight = saliency[f"{member.layer}.weight"].double().cpu()
    # Output channels are columns in embeddings, and rows in all other layers.
    axis = 1 if member.side == "in" or f"{member.layer}.bias" not in saliency else 0
    yield weight.movedim(axis, 0)[places].flatten(1) if weight.ndim > 1 else weight[places][:, None]
    if biases and member.side == "out" and f"{member.layer}.bias" in saliency:
        yield saliency[f"{member.layer}.bias"].double().cpu()[places][:, None]


# Saliencies of single weights.


def _weights(network: UNet) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def absolute(network: UNet, _prune: PruneConfig, _calibration: Calibration) -> Saliency:
    """Return ``|w|``: the L1 norm (Li et al. 2017)."""
    return {name: weight.abs() for name, weight in _weights(network).items()}


def squared(network: UNet, _prune: PruneConfig, _calibration: Calibration) -> Saliency:
    """Return ``w^2``, which ranks as the L2 norm does."""
    return {name: weight.square() for name, weight in _weights(network).items()}


def first_order(network: UNet, prune: PruneConfig, calibration: Calibration) -> Saliency:
    """Return ``w * g`` with the gradient g of the training loss (Molchanov et al. 2019).

    To first order, this is the change of the loss when w is removed.
    """
    total = {name: torch.zeros_like(weight) for name, weight in _weights(network).items()}
    for gradients in calibration.gradients(network, prune.calibration_batches):
        for name, gradient in gradients.items():
            total[name] += gradient / prune.calibration_batches
    return {name: weight * total[name] for name, weight in _weights(network).items()}


def over_timesteps(network: UNet, prune: PruneConfig, calibration: Calibration) -> Saliency:
    """Return ``w * sum_t g_t`` over the important timesteps (Diff-Pruning, Fang et al. 2023, algorithm 1).

    ``prune.calibration_batches`` evenly spaced timesteps are visited in the order of increasing noise, each with its
    own batch of images and noise, until the error of the predicted noise falls below ``prune.threshold`` times the
    largest one so far. The gradients are those of the training loss. Both published programs, ``ddpm_prune.py`` and
    ``ddpm_exp/prune.py``, use one batch of images and noise for all timesteps instead. The former also adds the
    gradient at the timestep that falls below the threshold, which the paper, the latter and this function leave out.
    """
    weights = _weights(network)
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for _, gradients in timestep_gradients(network, prune, calibration):
        for name, gradient in gradients.items():
            total[name] += gradient
    return {name: weight * total[name] for name, weight in weights.items()}


def timestep_gradients(
    network: UNet, prune: PruneConfig, calibration: Calibration
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield the timesteps that Diff-Pruning visits, with the gradient of the training loss at each.

    They end where the error of the noise, relative to the largest so far, is below ``prune.threshold``. The paper
    states this for networks that predict the noise, with the loss of Ho et al. 2020. So the rule does not depend on
    what the network predicts, nor on how its loss is weighted.
    """
    count = min(prune.calibration_batches, calibration.config.diffusion.timesteps)
    largest = 0.0
    for index in calibration.indices(count):
        t = index * calibration.config.diffusion.timesteps // count
        drawn = calibration.draws(index, network, t)
        error = float(calibration.noise_error(network, drawn).mean())
        largest = max(largest, error)
        if error < prune.threshold * largest:
            return
        yield t, calibration.gradient_of(network, drawn)


def fisher(network: UNet, prune: PruneConfig, calibration: Calibration) -> Saliency:
    """Return ``w^2 * E[g^2]`` over single images, with the Fisher information's diagonal in place of the Hessian's."""
    parameters = dict(network.named_parameters())
    total = {name: torch.zeros_like(weight) for name, weight in parameters.items()}
    images = 0
    for index in calibration.indices(prune.calibration_batches):
        for drawn in calibration.draws(index, network).chunks(calibration.batches.batch_size):
            loss = calibration.loss(network, drawn).mean()
            for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                total[name] += gradient.square()
            images += 1
    return {name: weight.square() * total[name] / images for name, weight in _weights(network).items()}


def hessian(network: UNet, prune: PruneConfig, calibration: Calibration) -> Saliency:
    """Return ``w^2 h / 2`` with the Hessian's diagonal h (Optimal Brain Damage, LeCun et al. 1989).

    Hutchinson's estimate of the diagonal is ``h = E[z * Hz]``, with one vector z of random signs per batch.
    """
    parameters = dict(network.named_parameters())
    total = {name: torch.zeros_like(weight) for name, weight in parameters.items()}
    for index in calibration.indices(prune.calibration_batches):
        source = generator(calibration.config.seed, Purpose.PRUNE, index)
        signs = [torch.randint(2, p.shape, generator=source).to(p) * 2.0 - 1.0 for p in parameters.values()]
        parts = calibration.parts(calibration.draws(index, network), HESSIAN_MEMORY)
        for part in parts:
            with sdpa_kernel(SDPBackend.MATH):  # The other backends have no second derivative.
                loss = calibration.loss(network, part).mean() / len(parts)
                gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
                products = torch.autograd.grad(gradients, list(parameters.values()), signs, materialize_grads=True)
            for name, sign, product in zip(parameters, signs, products, strict=True):
                total[name] += sign * product / prune.calibration_batches
    return {name: weight.square() * total[name] / 2.0 for name, weight in _weights(network).items()}


IMPORTANCES["random"] = ImportanceRecord(None, "random scores, a control")
IMPORTANCES["l1"] = ImportanceRecord(absolute, "the L1 norm of the weights (Li et al. 2017)", magnitudes=True)
IMPORTANCES["l2"] = ImportanceRecord(squared, "the L2 norm of the weights", magnitudes=True)
IMPORTANCES["taylor"] = ImportanceRecord(
    first_order, "first-order change of the loss, weight by weight (Molchanov et al. 2019)", gradients=True
)
IMPORTANCES["taylor_multivariable"] = ImportanceRecord(
    first_order, "like taylor, but summed with signs within a layer", signed=True, gradients=True
)
IMPORTANCES["diff_pruning"] = ImportanceRecord(
    over_timesteps, "like taylor, over the important timesteps (Fang et al. 2023)", gradients=True, threshold=True
)
IMPORTANCES["fisher"] = ImportanceRecord(
    fisher, "second-order change of the loss, by the Fisher information", gradients=True
)
IMPORTANCES["hessian"] = ImportanceRecord(
    hessian,
    "second-order change of the loss, by the Hessian's diagonal (LeCun et al. 1989)",
    signed=True,
    gradients=True,
)
IMPORTANCES["reinit"] = ImportanceRecord(
    squared, "like l2, with the remaining weights drawn anew, a control", magnitudes=True, redraws=True
)
