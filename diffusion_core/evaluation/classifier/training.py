"""Train a classifier with a recipe, whose seed determines initial weights, order of the images and augmentation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_core.data.datasets import Images, to_unit
from diffusion_core.evaluation.classifier.network import ClassifierNetwork
from diffusion_core.hardware import Precision, autocast, has_bf16
from diffusion_core.model.optimizers import SGD
from diffusion_core.randomness import Purpose, generator, stream_seed
from diffusion_core.terminal.progress import Shown

WARM_UP_SHARE = 0.2
"""Share of the steps over which the learning rate rises."""

BF16_FROM_WIDTH = 16
"""Smallest width that trains in bf16. Narrower networks gain nothing from it."""

JUDGED_AT_ONCE = 512

TINY_BELOW = 16


def train_classifier(
    images: Images,
    num_classes: int,
    recipe: Recipe,
    *,
    mirrored: bool,
    device: torch.device,
    progress: bool = False,
) -> ClassifierNetwork:
    """Train a classifier on images. Return it in evaluation mode, on ``device``.

    Args:
        images: training images, uint8.
        num_classes: number of classes; labels are 0..num_classes-1.
        recipe: settings of the training.
        mirrored: mirror each image with probability 1/2.
        device: where to compute.
        progress: show a progress bar on stderr.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(recipe.seed, Purpose.CLASSIFIER, 0))
        network = ClassifierNetwork(images.images_NCHW.shape[1], num_classes, recipe.width)
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.train()
    images = images.to(device)
    batch_size = min(recipe.batch_size, len(images))
    per_epoch = len(images) // batch_size
    total = per_epoch * recipe.epochs
    optimizer = SGD(network.parameters(), lr=recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)
    precision: Precision = "bf16" if recipe.width >= BF16_FROM_WIDTH and has_bf16(device) else "fp32"
    for step in Shown(range(total), "classifier", total, "step", shown=progress):
        if step % per_epoch == 0:
            order = torch.randperm(len(images), generator=generator(recipe.seed, Purpose.CLASSIFIER, 1, step))
        chosen = order[step % per_epoch * batch_size :][:batch_size]
        batch = images.select(chosen.to(device))
        x_BCHW = augment(to_unit(batch.images_NCHW), recipe, mirrored, step).contiguous(
            memory_format=torch.channels_last
        )
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * _slope(step / total)
        with autocast(device, precision):
            logits_BK = network(x_BCHW).logits_BK
        loss = F.cross_entropy(logits_BK.float(), batch.labels_N, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return network.to(memory_format=torch.contiguous_format).eval()


def _slope(done: float) -> float:
    """Return the learning rate relative to its peak: linear warm-up, then linear decay to zero."""
    return min(done / WARM_UP_SHARE, (1.0 - done) / (1.0 - WARM_UP_SHARE)) if done else 0.1 * WARM_UP_SHARE


def augment(x_BCHW: Tensor, recipe: Recipe, mirrored: bool, step: int) -> Tensor:
    """Mirror images at random, shift them (borders are reflected), and grey out a square of each."""
    batch, _, height, width = x_BCHW.shape
    device = x_BCHW.device
    source = generator(recipe.seed, Purpose.CLASSIFIER, 2, step)
    if mirrored:
        mirror_B = (torch.rand(batch, generator=source) < 0.5).to(device)
        x_BCHW = torch.where(mirror_B[:, None, None, None], x_BCHW.flip(3), x_BCHW)
    if recipe.shift:
        padded = F.pad(x_BCHW, [recipe.shift] * 4, mode="reflect")
        offset_2B = torch.randint(2 * recipe.shift + 1, (2, batch), generator=source).to(device)
        rows_BH = offset_2B[0, :, None] + torch.arange(height, device=device)
        columns_BW = offset_2B[1, :, None] + torch.arange(width, device=device)
        index_B = torch.arange(batch, device=device)[:, None, None]
        x_BCHW = padded.permute(0, 2, 3, 1)[index_B, rows_BH[:, :, None], columns_BW[:, None, :]].permute(0, 3, 1, 2)
    if recipe.cutout:
        corner_2B = torch.stack(
            [torch.randint(1 - recipe.cutout, side, (batch,), generator=source) for side in (height, width)]
        ).to(device)
        distance_BH = torch.arange(height, device=device) - corner_2B[0, :, None]
        distance_BW = torch.arange(width, device=device) - corner_2B[1, :, None]
        inside_BH, inside_BW = (
            (distance_BH >= 0) & (distance_BH < recipe.cutout),
            (distance_BW >= 0) & (distance_BW < recipe.cutout),
        )
        x_BCHW = x_BCHW.masked_fill((inside_BH[:, :, None] & inside_BW[:, None, :])[:, None], 0.0)
    return x_BCHW


@torch.no_grad()
def accuracy(network: ClassifierNetwork, images: Images) -> float:
    """Return the share of images, in [0, 1], that a classifier classifies correctly; NaN without images."""
    if not len(images):
        return math.nan
    device = next(network.parameters()).device
    right = 0
    for start in range(0, len(images), JUDGED_AT_ONCE):
        batch = images.select(torch.arange(start, min(start + JUDGED_AT_ONCE, len(images)))).to(device)
        logits_BK = network(to_unit(batch.images_NCHW)).logits_BK
        right += int((logits_BK.argmax(1) == batch.labels_N).sum())
    return right / len(images)


@dataclass(frozen=True)
class Recipe:
    """Settings of a classifier's training. Together with the images, they determine its weights.

    Attributes:
        width: channels of the first layer.
        epochs: passes over the training images.
        batch_size: images per step.
        lr: peak learning rate of SGD with Nesterov momentum. It rises linearly, then falls linearly to zero.
        weight_decay: weight decay of SGD.
        shift: largest shift of an image in each direction, in pixels.
        cutout: side of the square that is greyed out in each image, in pixels (DeVries & Taylor 2017); 0: none.
        label_smoothing: probability that is spread over all classes.
        seed: seed of initial weights, order of the images and augmentation.
    """

    width: int
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float = 5e-4
    shift: int = 0
    cutout: int = 0
    label_smoothing: float = 0.0
    seed: int = 0


RECIPES = {
    "tiny": Recipe(width=8, epochs=12, batch_size=64, lr=0.1, label_smoothing=0.1),
    "grey": Recipe(width=16, epochs=8, batch_size=128, lr=0.2, shift=2, label_smoothing=0.1),
    "cpu": Recipe(width=16, epochs=8, batch_size=256, lr=0.3, shift=3),
    "colour": Recipe(width=64, epochs=30, batch_size=512, lr=0.4, shift=4, cutout=8, label_smoothing=0.1),
}
"""tiny: images below 16 pixels, takes seconds on a CPU. grey: images with one channel, takes a minute on a CPU.
colour: colour images on a data-centre GPU. cpu: colour images without a GPU, less accurate than colour."""


def recipe_for(shape_CHW: tuple[int, int, int], has_gpu: bool) -> str:
    """Return the name of the recipe for images of a shape, on a machine with or without a GPU."""
    channels, height, _ = shape_CHW
    if height < TINY_BELOW:
        return "tiny"
    if channels == 1:
        return "grey"
    return "colour" if has_gpu else "cpu"
