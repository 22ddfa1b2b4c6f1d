"""Figures that say how good a model is. Each is named for what it measures, and none is called FID that is not.

From images to figures: ``folders`` and ``generated`` hand out uint8 images; ``extractors`` and ``classifier`` turn them
into ``features``; ``measure`` takes one pass over them; ``distances`` compares features to those of a ``reference``;
``suite`` is all of it, as a configuration asks for it.
"""

from diffusion_core.evaluation.distances import frechet_distance
from diffusion_core.evaluation.validation import validation_loss

__all__ = ["frechet_distance", "validation_loss"]
