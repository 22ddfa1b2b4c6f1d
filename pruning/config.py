"""Every knob of pruning (``prune.*``), and which method listens to which."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Annotated, Literal

from pydantic import Field

from diffusion_core.config import Section
from diffusion_core.registry import Choice
from pruning.registries import IMPORTANCES, MASK_STRATEGIES

OTHER_METHODS = {
    "none": "nothing is pruned",
    "structured": "remove the weakest channels, which leaves a smaller network",
    "lottery": "rounds of training, magnitude and rewinding (Frankle & Carbin 2019)",
}
"""The values of ``prune.method`` that are no strategy for masks."""


class PruneConfig(Section):
    """Knobs of ``prune.*``: what is pruned, when, by which method, and how much stays."""

    method: Annotated[str, Choice(MASK_STRATEGIES, OTHER_METHODS)] = "none"
    """What is pruned, and how it is chosen: masks over weights, or whole channels."""
    keep: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Share that stays: of the weights (masks), or of prune.target (structured)."""
    target: Literal["channels", "params", "macs", "latency"] = "macs"
    """What prune.keep is a share of: channels, parameters, multiply-accumulates, or the measured time of a forward pass
    of 16 images. Hit within 2% where the widths allow."""
    importance: Annotated[str, Choice(IMPORTANCES)] = "l2"
    """What says which channels are weak."""
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
        if self.method == "structured":
            return bool(IMPORTANCES[self.importance].gradients)
        return self.method in MASK_STRATEGIES and bool(MASK_STRATEGIES[self.method].needs_images)

    @property
    def at_start(self) -> bool:
        """Whether the method prunes at initialisation unless it is told another step."""
        return self.method in MASK_STRATEGIES and bool(MASK_STRATEGIES[self.method].at_start)

    @property
    def is_gradual(self) -> bool:
        """Whether the method prunes in many small steps."""
        return self.method in MASK_STRATEGIES and bool(MASK_STRATEGIES[self.method].gradual)

    def start(self, train_steps: int) -> int:
        """Return the optimizer steps before pruning, or before its start (gradual), in ``train_steps`` steps."""
        if self.step is not None:
            return self.step
        if self.at_start:
            return 0
        return max(1, train_steps // (4 if self.is_gradual else 2))

    def end(self, train_steps: int) -> int:
        """Return the optimizer steps before pruning is complete. Only gradual pruning ends later than it starts."""
        if not self.is_gradual:
            return self.start(train_steps)
        return self.until if self.until is not None else max(1, 3 * train_steps // 4)


_CHAIN = frozenset({"rounds", "per_round", "rewind_step", "control"})
_MASKS_ONLY = frozenset({"profile", "until", "interval", "pattern"})


def methods() -> list[str]:
    """All values of ``prune.method``."""
    return [*OTHER_METHODS, *MASK_STRATEGIES]


def listens_to(method: str) -> frozenset[str]:
    """The knobs that a method listens to."""
    if method == "none":
        return frozenset({"method"})
    if method == "lottery":
        return frozenset({"method", "scope", "profile"}) | _CHAIN
    if method == "structured":
        return frozenset(PruneConfig.model_fields) - _CHAIN - _MASKS_ONLY
    return frozenset({"method", "step"}) | MASK_STRATEGIES[method].knobs


def needs(method: str) -> dict[str, tuple[str, frozenset[str]]]:
    """Of a method the knobs that listen to another one: its name, and the values with which they are heard."""
    if method == "structured":
        with_gradients = frozenset(name for name, record in IMPORTANCES.items() if record.gradients)
        with_threshold = frozenset(name for name, record in IMPORTANCES.items() if record.threshold)
        return {
            "calibration_batches": ("importance", with_gradients),
            "threshold": ("importance", with_threshold),
            "block_keep": ("scope", frozenset({"auto", "layer"})),
        }
    if {"scope", "profile"} <= listens_to(method):
        return {"profile": ("scope", frozenset({"layer"})), "block_keep": ("profile", frozenset({"blocks"}))}
    return {}


def unheard(prune: PruneConfig, tried: Collection[str] | None = None) -> Iterator[str]:
    """The knobs that are set although no method listens to them, each as one line for the user.

    A knob at its default counts as not set. A sweep over several methods sets the knobs of all of them in every trial:
    it is asked about all its methods at once, and its trials are not asked.

    Args:
        prune: the knobs.
        tried: the methods; None: the one that is set.
    """
    needed = needs(prune.method) if tried is None else {}  # A sweep may vary what a knob needs.
    tried = [prune.method] if tried is None else list(dict.fromkeys(tried))
    heard = frozenset[str]().union(*(listens_to(method) for method in tried))
    for name, field in PruneConfig.model_fields.items():
        value = getattr(prune, name)
        if value == field.default:
            continue
        if name not in heard:
            listeners = " or ".join(method for method in methods() if name in listens_to(method))
            yield (
                f"prune.{name} = {value!r}: has no effect with prune.method={' or '.join(tried)}; drop it or use "
                f"{listeners}"
            )
        elif name in needed:
            key, values = needed[name]
            now = getattr(prune, key)
            if now not in values:
                yield (
                    f"prune.{name} = {value!r}: has no effect with prune.{key}={now}; drop it or use "
                    f"prune.{key}={', '.join(sorted(values))}"
                )
