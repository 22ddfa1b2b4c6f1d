"""Every knob of pruning (``prune.*``), and which method listens to which."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Annotated, Literal

from pydantic import Field

from diffusion_core.config import Section


class PruneConfig(Section):
    method: Literal["none", "magnitude", "structured"] = "none"
    """none; magnitude: mask the smallest weights; structured: remove the weakest channels, which leaves a smaller
    network."""
    keep: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Share that stays: of the weights (magnitude), or of the channels of each layer (structured)."""
    scope: Literal["global", "layer"] = "global"
    """What magnitude ranks: the weights of the whole network together, or those of each layer by themselves."""
    step: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps before pruning; training goes on afterwards. None: half of train.steps. Layers that start at zero
    need some steps to grow, or magnitude takes them whole. Figures before it are logged as dense/val/loss and so on."""


LISTENS_TO: dict[str, frozenset[str]] = {
    "none": frozenset({"method"}),
    "magnitude": frozenset({"method", "keep", "scope", "step"}),
    "structured": frozenset({"method", "keep", "step"}),
}
"""The knobs that each method listens to."""


def unheard(prune: PruneConfig, methods: Collection[str] | None = None) -> Iterator[str]:
    """The knobs that are set although no method listens to them, each as one line for the user.

    A knob at its default counts as not set. A sweep over several methods sets the knobs of all of them in every trial:
    it is asked about all its methods at once, and its trials are not asked.

    Args:
        prune: the knobs.
        methods: None: the one that is set.
    """
    methods = [prune.method] if methods is None else list(dict.fromkeys(methods))
    heard = frozenset[str]().union(*(LISTENS_TO[method] for method in methods))
    for name, field in PruneConfig.model_fields.items():
        value = getattr(prune, name)
        if name not in heard and value != field.default:
            listeners = " or ".join(method for method, knobs in LISTENS_TO.items() if name in knobs)
            yield (
                f"prune.{name} = {value!r}: says nothing to prune.method={' or '.join(methods)}; leave it out, or use "
                f"{listeners}"
            )
