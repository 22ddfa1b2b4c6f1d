"""Every knob of pruning (``prune.*``), and which method listens to which."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Annotated, Literal

from pydantic import Field

from diffusion_core.config import Section


class PruneConfig(Section):
    """Knobs of ``prune.*``: what is pruned, when, by which method, and how much stays."""

    method: Literal["none", "magnitude", "random", "snip", "synflow", "gradual", "n_of_m", "lottery", "structured"] = (
        "none"
    )
    """none. Masks over weights: magnitude, the smallest go; random; snip (Lee et al. 2019) and synflow (Tanaka et al.
    2020), which rank at initialisation; gradual, magnitude in many small steps (Zhu & Gupta 2017); n_of_m, a pattern
    that GPUs multiply faster; lottery, rounds of training, magnitude and rewinding (Frankle & Carbin 2019). structured:
    remove the weakest channels, which leaves a smaller network."""
    keep: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Share that stays: of the weights (masks), or of prune.target (structured)."""
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
    """Whether the whole network is ranked together, or each layer by itself. auto: global for masks, layer for
    structured, as their authors do. Ranked together by magnitude, layers that start at zero go whole if they had few
    steps to grow, and at 95% small networks lose whole layers; by layer they do not."""
    profile: Literal["uniform", "erk", "blocks"] = "uniform"
    """With masks and prune.scope=layer, what each layer keeps of its weights: the same share, more of small layers
    (Erdos-Renyi-kernel, Evci et al. 2020), or what prune.block_keep says."""
    iterations: Annotated[int, Field(ge=1, le=100)] = 1
    """Rounds of structured removal; channels are judged anew in each."""
    round_to: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Widths become multiples of it. None: as coarse as the target allows, so that group norms keep many groups."""
    block_keep: list[Annotated[float, Field(gt=0.0, le=1.0)]] = Field(default=[])
    """Share to keep of each block: the resolutions on the way down, the middle, the resolutions on the way up; 1 spares
    a block. structured: of the channels, in relation to the others, and what goes is scaled until prune.target is hit.
    Masks with prune.profile=blocks: of the weights, exactly, and prune.keep of what is in no block."""
    calibration_batches: Annotated[int, Field(ge=1, le=100_000)] = 100
    """Batches of training images for gradients: at timesteps as in training, or for diff_pruning spread over them."""
    threshold: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Diff-Pruning stops at the timestep whose loss is below this share of the largest loss (Fang et al. 2023)."""
    step: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps before pruning, or its start (gradual); training goes on afterwards. 0: at once, for a run with
    init.*; None: half of train.steps; gradual: a quarter; snip, synflow: 0. Layers that start at zero need some steps
    to grow, or magnitude takes them whole. Figures before it are logged as dense/val/loss and so on."""
    until: Annotated[int, Field(ge=1)] | None = None
    """Step at which gradual pruning reaches prune.keep. None: three quarters of train.steps."""
    interval: Annotated[int, Field(ge=1)] = 100
    """Optimizer steps between two prunings of gradual; more go at first, fewer at last (a cubic)."""
    pattern: Literal["1:2", "2:4", "4:8"] = "2:4"
    """n_of_m: how many stay of how many neighbouring inputs. Layers whose inputs do not divide so stay dense."""
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

    @property
    def needs_images(self) -> bool:
        """Whether training images decide what goes."""
        return self.method == "snip" or (self.method == "structured" and self.importance in GRADIENTS)


_CHAIN = frozenset({"rounds", "per_round", "rewind_step", "control"})
_RANKED = frozenset({"method", "keep", "scope", "profile", "block_keep", "step"})
LISTENS_TO: dict[str, frozenset[str]] = {
    "none": frozenset({"method"}),
    "magnitude": _RANKED,
    "random": _RANKED,
    "snip": frozenset({"method", "keep", "step", "calibration_batches"}),
    "synflow": frozenset({"method", "keep", "step"}),
    "gradual": _RANKED | {"until", "interval"},
    "n_of_m": frozenset({"method", "pattern", "step"}),
    "lottery": frozenset({"method", "scope", "profile"}) | _CHAIN,
    "structured": frozenset(PruneConfig.model_fields) - _CHAIN - {"profile", "until", "interval", "pattern"},
}
"""The knobs that each method listens to."""

GRADIENTS = frozenset({"taylor", "taylor_multivariable", "diff_pruning", "fisher", "hessian"})
"""The importances that need training images."""

_BY_LAYER = {"profile": ("scope", frozenset({"layer"})), "block_keep": ("profile", frozenset({"blocks"}))}
NEEDS: dict[str, dict[str, tuple[str, frozenset[str]]]] = {
    **dict.fromkeys(("magnitude", "random", "gradual", "lottery"), _BY_LAYER),
    "structured": {
        "calibration_batches": ("importance", GRADIENTS),
        "threshold": ("importance", frozenset({"diff_pruning"})),
        "block_keep": ("scope", frozenset({"auto", "layer"})),
    },
}
"""Of each method the knobs that listen to another one: its name, and the values with which they are heard."""


def unheard(prune: PruneConfig, methods: Collection[str] | None = None) -> Iterator[str]:
    """The knobs that are set although no method listens to them, each as one line for the user.

    A knob at its default counts as not set. A sweep over several methods sets the knobs of all of them in every trial:
    it is asked about all its methods at once, and its trials are not asked.

    Args:
        prune: the knobs.
        methods: None: the one that is set.
    """
    needs = NEEDS.get(prune.method, {}) if methods is None else {}  # A sweep may vary what a knob needs.
    methods = [prune.method] if methods is None else list(dict.fromkeys(methods))
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
        elif name in needs:
            key, values = needs[name]
            now = getattr(prune, key)
            if now not in values:
                yield (
                    f"prune.{name} = {value!r}: says nothing to prune.{key}={now}; leave it out, or use "
                    f"prune.{key}={', '.join(sorted(values))}"
                )
