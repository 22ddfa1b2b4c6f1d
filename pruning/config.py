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
    """Share that stays: of the weights (magnitude), or of prune.target (structured)."""
    target: Literal["channels", "params", "macs", "latency"] = "macs"
    """What prune.keep is a share of: channels, parameters, multiply-accumulates, or the measured time of a forward pass
    of 16 images. Hit within 2% where the widths allow."""
    importance: Literal[
        "random", "l1", "l2", "taylor", "taylor_multivariable", "diff_pruning", "fisher", "hessian", "reinit"
    ] = "l2"
    """What says which channels are weak: nothing (random), the norm of their weights (l1, l2), how much the loss would
    change to first order weight by weight (taylor) or in sum (taylor_multivariable) or over the timesteps that matter
    (diff_pruning), to second order (fisher, hessian); reinit takes what l2 leaves and draws its weights anew."""
    scope: Literal["auto", "global", "layer"] = "auto"
    """Whether the whole network is ranked together, or each layer by itself, of which equal shares go. auto: global for
    magnitude, layer for structured, as their authors do."""
    iterations: Annotated[int, Field(ge=1, le=100)] = 1
    """Rounds of structured removal; channels are judged anew in each."""
    round_to: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Widths become multiples of it. None: as coarse as the target allows, so that group norms keep many groups."""
    block_keep: list[Annotated[float, Field(gt=0.0, le=1.0)]] = Field(default=[])
    """Share of the channels to keep in each block in relation to the others: the resolutions on the way down, the
    middle, the resolutions on the way up. What goes is scaled until prune.target is hit; 1 spares a block."""
    calibration_batches: Annotated[int, Field(ge=1, le=100_000)] = 100
    """Batches of training images for gradients: at timesteps as in training, or for diff_pruning spread over them."""
    threshold: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Diff-Pruning stops at the timestep whose loss is below this share of the largest loss (Fang et al. 2023)."""
    step: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps before pruning; training goes on afterwards. 0: at once, for a run with init.*; None: half of
    train.steps. Layers that start at zero need some steps to grow, or magnitude takes them whole. Figures before it are
    logged as dense/val/loss and so on."""

    @property
    def needs_images(self) -> bool:
        """Whether training images decide what goes."""
        return self.method == "structured" and self.importance in GRADIENTS


LISTENS_TO: dict[str, frozenset[str]] = {
    "none": frozenset({"method"}),
    "magnitude": frozenset({"method", "keep", "scope", "step"}),
    "structured": frozenset(PruneConfig.model_fields),
}
"""The knobs that each method listens to."""

GRADIENTS = frozenset({"taylor", "taylor_multivariable", "diff_pruning", "fisher", "hessian"})
"""The importances that need training images."""

NEEDS: dict[str, tuple[str, frozenset[str]]] = {
    "calibration_batches": ("importance", GRADIENTS),
    "threshold": ("importance", frozenset({"diff_pruning"})),
    "block_keep": ("scope", frozenset({"auto", "layer"})),
}
"""The knobs of structured pruning that listen to another one: its name, and the values with which they are heard."""


def unheard(prune: PruneConfig, methods: Collection[str] | None = None) -> Iterator[str]:
    """The knobs that are set although no method listens to them, each as one line for the user.

    A knob at its default counts as not set. A sweep over several methods sets the knobs of all of them in every trial:
    it is asked about all its methods at once, and its trials are not asked.

    Args:
        prune: the knobs.
        methods: None: the one that is set.
    """
    of_sweep = methods is not None
    methods = list(dict.fromkeys(methods)) if methods is not None else [prune.method]
    heard = frozenset[str]().union(*(LISTENS_TO[method] for method in methods))
    for name, field in PruneConfig.model_fields.items():
        value = getattr(prune, name)
        if value == field.default:
            continue
        if name not in heard:
            listeners = " or ".join(method for method, knobs in LISTENS_TO.items() if name in knobs)
            yield (
                f"prune.{name} = {value!r}: says nothing to prune.method={' or '.join(methods)}; leave it out, or use "
                f"{listeners}"
            )
        elif not of_sweep and name in NEEDS:
            key, values = NEEDS[name]
            now = getattr(prune, key)
            if now not in values:
                yield (
                    f"prune.{name} = {value!r}: says nothing to prune.{key}={now}; leave it out, or use "
                    f"prune.{key}={', '.join(sorted(values))}"
                )
