"""Every knob of pruning (``prune.*``)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from diffusion_core.config import Section


class PruneConfig(Section):
    method: Literal["none", "magnitude", "structured-magnitude"] = "none"
    """none; magnitude: mask the smallest weights of the whole network; structured-magnitude: remove the channels of
    smallest L2 norm, which leaves a smaller network."""
    ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Share that goes: of the weights (magnitude) or of the channels of each layer (structured-magnitude; rounded to
    what the groups of the group norms allow). Unused by none."""
    step: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps before pruning; training goes on afterwards. None: half of train.steps. Layers that start at zero
    need some steps to grow, or magnitude takes them whole. Figures before it are logged as dense/val/loss and so on."""
