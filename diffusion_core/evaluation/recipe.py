"""How classifiers are trained: the settings, and those that suit a data set and a machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Settings of a classifier's training; with the images they decide every weight.

    Attributes:
        width: channels of the first layer.
        epochs: passes over the training images.
        batch_size: images a step.
        lr: highest learning rate of SGD with Nesterov's momentum; it rises linearly and falls linearly to zero.
        weight_decay: of SGD.
        shift: largest shift of an image to each side, in pixels.
        cutout: side of the square that is greyed out in each image (DeVries & Taylor 2017); 0: none.
        label_smoothing: probability that is spread over all classes.
        seed: of weights, order and augmentation.
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
"""tiny: images below 16 pixels, seconds on a processor. grey: one channel, a minute on a processor. colour: a
data-centre GPU. cpu: colour images where there is no GPU, at the price of some accuracy."""

TINY_BELOW = 16


def recipe_for(shape_CHW: tuple[int, int, int], has_gpu: bool) -> str:
    """The name of the recipe that suits images of a shape, on a machine with or without a GPU."""
    channels, height, _ = shape_CHW
    if height < TINY_BELOW:
        return "tiny"
    if channels == 1:
        return "grey"
    return "colour" if has_gpu else "cpu"
