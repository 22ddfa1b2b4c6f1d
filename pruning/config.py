"""Every knob of pruning (``prune.*``), and which method listens to which."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Annotated, Literal

from pydantic import Field

from diffusion_core.config import Section


class PruneConfig(Section):
    method: Literal["none", "magnitude", "random", "snip", "synflow", "gradual", "n_of_m", "lottery", "structured"] = (
        "none"
    )
    """none. Masks over weights: magnitude, the smallest go; random; snip (Lee et al. 2019) and synflow (Tanaka et al.
    2020), which rank at initialisation; gradual, magnitude in many small steps (Zhu & Gupta 2017); n_of_m, a pattern
    that GPUs multiply faster; lottery, rounds of training, magnitude and rewinding (Frankle & Carbin 2019). structured:
    remove the weakest channels, which leaves a smaller network."""
    keep: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Share that stays: of the weights (masks), or of the channels of each layer (structured)."""
    scope: Literal["global", "layer"] = "global"
    """What is ranked: the weights of the whole network together, or those of each layer by themselves. Ranked together,
    by magnitude, layers that start at zero go whole if they had few steps to grow, and at 95% small networks lose whole
    layers; by layer they do not."""
    profile: Literal["uniform", "erk", "blocks"] = "uniform"
    """With prune.scope=layer, what each layer keeps of its weights: the same share, more of small layers
    (Erdos-Renyi-kernel, Evci et al. 2020), or what prune.block_keep says."""
    block_keep: list[str] = Field(default=[])
    """Shares that stay by block, for prune.profile=blocks: down.0:0.5,middle:0.1. Blocks are time_mlp, conv_in,
    down.0 (full resolution), down.1, ..., middle, up.0 (lowest resolution), ..., conv_out; others keep prune.keep."""
    step: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps before pruning, or its start (gradual); training goes on afterwards. None: half of train.steps;
    gradual: a quarter; snip, synflow: 0, at initialisation. Figures before it are logged as dense/val/loss etc."""
    until: Annotated[int, Field(ge=1)] | None = None
    """Step at which gradual pruning reaches prune.keep. None: three quarters of train.steps."""
    interval: Annotated[int, Field(ge=1)] = 100
    """Optimizer steps between two prunings of gradual; more go at first, fewer at last (a cubic)."""
    pattern: Literal["1:2", "2:4", "4:8"] = "2:4"
    """n_of_m: how many stay of how many neighbouring inputs. Layers with an odd number of inputs stay dense."""
    calibration_batches: Annotated[int, Field(ge=1)] = 8
    """Batches of training images on which gradients are measured (snip)."""
    rounds: Annotated[int, Field(ge=1, le=1000)] = 35
    """Rounds of a lottery, each a whole training, after the dense one; 1 is pruning in one shot."""
    per_round: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Share of what is left that goes in each round of a lottery."""
    rewind_step: Annotated[int, Field(ge=0)] = 0
    """Step that each round of a lottery goes back to, with weights, averages, optimizer, learning rate and order of
    the data as they were; 0 is initialisation."""
    control: Literal["none", "reinit", "random_mask"] = "none"
    """What the last round of a lottery trains in place of its ticket: its mask over weights drawn anew (from step 0),
    or over the rewound weights a random mask with as many weights in each layer."""


_RANKED = frozenset({"method", "keep", "scope", "profile", "block_keep", "step"})
LISTENS_TO: dict[str, frozenset[str]] = {
    "none": frozenset({"method"}),
    "magnitude": _RANKED,
    "random": _RANKED,
    "snip": frozenset({"method", "keep", "step", "calibration_batches"}),
    "synflow": frozenset({"method", "keep", "step"}),
    "gradual": _RANKED | {"until", "interval"},
    "n_of_m": frozenset({"method", "pattern", "step"}),
    "lottery": frozenset({"method", "scope", "profile", "rounds", "per_round", "rewind_step", "control"}),
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
    alone = methods is None
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
    if alone:
        if prune.scope == "global" and prune.profile != "uniform" and "profile" in heard:
            yield f"prune.profile = {prune.profile!r}: says nothing to prune.scope=global; use prune.scope=layer"
        if prune.profile != "blocks" and prune.block_keep and "block_keep" in heard:
            yield (
                f"prune.block_keep = {prune.block_keep}: says nothing to prune.profile={prune.profile}; use "
                f"prune.profile=blocks"
            )
