"""Figures that say how good a model is. Each is named for what it measures, and none is called FID that is not.

From images to figures: ``folders`` and ``sampling`` hand out uint8 images; ``inception``, ``given`` and ``classifier``
turn them into features; ``measure`` takes one pass over them; ``frechet``, ``kernel``, ``scores`` and ``manifold``
compare features to those of a ``reference``; ``suite`` is all of it, as a configuration asks for it.
"""

from diffusion_core.evaluation.frechet import frechet_distance
from diffusion_core.evaluation.validation import validation_loss

__all__ = ["frechet_distance", "validation_loss"]
