"""Knobs of pruning (``prune.*``), and the knobs that each method uses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from diffusion_core.config import Section, StepsConfig
from diffusion_core.registry import Choice
from pruning.registries import IMPORTANCES, MASK_STRATEGIES

OTHER_METHODS = {
    "none": "no pruning",
    "structured": "remove the least important channels, whole blocks, or both, which makes the network smaller",
    "lottery": "rounds of training, magnitude pruning and rewinding (Frankle & Carbin 2019)",
}
"""Values of ``prune.method`` that are not mask strategies."""


COUNTED_TARGETS = ("channels", "params", "macs")
"""Values of ``prune.target`` that follow from the widths; the others are measured."""


class PruneConfig(Section):
    """Knobs of ``prune.*``: what to prune, when, with which method, and how much to keep."""

    method: Annotated[str, Choice(MASK_STRATEGIES, OTHER_METHODS)] = "none"
    """Pruning method: masks over weights, or removal of whole channels."""
    keep: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Share to keep: of the weights (masks), or of prune.target (structured)."""
    target: Literal["channels", "params", "macs", "latency"] = "macs"
    """Cost that prune.keep refers to: channels, parameters, multiply-accumulates, or the measured time of a forward
    pass of 16 images. It is met within 2% if the widths allow it."""
    importance: Annotated[str, Choice(IMPORTANCES)] = "l2"
    """Score that ranks channels."""
    scope: Literal["auto", "global", "layer"] = "auto"
    """Rank the whole network together, or each layer separately. auto: global for masks, layer for structured, as in
    the original papers. With global magnitude, layers that start at zero are removed completely if they had few steps
    to grow, and at 95% sparsity small networks lose whole layers. Ranking by layer avoids this."""
    profile: Literal["uniform", "erk", "blocks"] = "uniform"
    """With masks and prune.scope=layer, the share of its weights that each layer keeps: the same (uniform), more in
    small layers (erk: Erdos-Renyi-kernel, Evci et al. 2020), or that of its block in prune.block_keep (blocks)."""
    depth: Annotated[float, Field(ge=0.0, le=1.0)] | Literal["auto"] = 0.0
    """Whole residual and attention blocks to remove before channels, those first whose absence changes the output least
    (LAPTOP-Diff, Zhang et al. 2024): until prune.keep ** depth of prune.target is left. 0: none. 1: blocks alone, so
    that the target is met only as closely as blocks allow. In between, more blocks go if the narrowest widths miss the
    target otherwise. auto: as few as let channels reach the target with half of their widths."""
    blocks: list[Annotated[str, Field(pattern=r"^[a-z0-9_.]+$")]] = Field(default=[])
    """Blocks to remove first, whatever they contribute: down.0.blocks.1, middle.1, up.0.attentions.0, ..."""
    iterations: Annotated[int, Field(ge=1, le=100)] = 1
    """Rounds of structured removal. Each round ranks the channels again."""
    round_to: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Make widths multiples of this. None: of model.norm_groups, so that group norms keep all their groups, or of its
    largest divisor that meets prune.target within 2%. On an H100, convolutions whose widths are no
    multiples of 64 save multiply-accumulates but hardly any time in training."""
    widths: Literal["free", "diffusers"] = "free"
    """Widths that remain: each group of channels its own (free), or those of a UNet2DModel (diffusers), so that
    scripts/convert_diffusers.py exports the pruned model as a plain pipeline: one width for each resolution, for the
    embedding and for attention heads, and one number of groups for all norms. diffusers also removes features of the
    timestep, and comes less close to prune.target."""
    block_keep: list[Annotated[float, Field(gt=0.0, le=1.0)]] = Field(default=[])
    """Share to keep of each block: the resolutions on the way down, the middle, the resolutions on the way up; 1 spares
    a block. structured: the removed shares of channels are scaled together until prune.target is met (scripts/prune.py
    --sensitivity proposes shares). Masks with
    prune.profile=blocks: shares of weights are exact, and weights outside of these blocks keep prune.keep."""
    calibration_batches: Annotated[int, Field(ge=1, le=100_000)] = 100
    """Batches of training images for gradients, inputs of layers (wanda), or the output without a block (prune.depth).
    Timesteps are drawn as in training; for diff_pruning, evenly spaced."""
    threshold: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Diff-Pruning stops at the first timestep at which the squared error of the predicted noise is below this share of
    the largest (Fang et al. 2023), whatever the network predicts and however its loss is weighted."""
    step: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps before pruning, or before its start (gradual). Training continues afterwards. 0: at once, for a
    run with init.*. None: half of train.steps; gradual: a quarter; snip, synflow: 0. Layers that start at zero need
    some steps to grow, or magnitude removes them completely. Figures before pruning are logged as dense/val/loss and so
    on."""
    until: Annotated[int, Field(ge=1)] | None = None
    """Step at which gradual pruning reaches prune.keep, or from which the masks of rigl stay. None: three quarters of
    train.steps."""
    interval: Annotated[int, Field(ge=1)] = 100
    """Optimizer steps between two prunings with gradual, or between two updates with rigl. Sparsity of gradual follows
    a cubic: fast at first, then more slowly."""
    regrow: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    """Share of its weights that each layer drops and grows elsewhere at the first updates of rigl (alpha of Evci et al.
    2020). It falls to 0 along a cosine up to prune.until."""
    pattern: Literal["1:2", "2:4", "4:8"] = "2:4"
    """For n_of_m: how many weights to keep of how many neighbouring inputs. Layers with an indivisible number of inputs
    stay dense. GPUs have instructions for 2:4; nothing here uses them, so speed does not change."""
    rounds: Annotated[int, Field(ge=1, le=1000)] = 35
    """Rounds of a lottery after the training of the dense network. Each is a whole training. 1 is one-shot pruning."""
    per_round: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Share of the remaining weights that each round of a lottery prunes."""
    rewind_step: Annotated[int, Field(ge=0)] = 0
    """Step that each round of a lottery rewinds to: weights, averages, optimizer, learning rate and order of the data.
    0 is initialisation."""
    control: Literal["none", "reinit", "random_mask"] = "none"
    """What the last round of a lottery trains instead of its ticket. reinit: new random weights with the ticket's mask,
    from step 0. random_mask: the rewound weights with a random mask that keeps as many weights in each layer."""

    @property
    def needs_images(self) -> bool:
        """Whether the method needs training images."""
        if self.method == "structured":
            return self.depth != 0.0 or bool(IMPORTANCES[self.importance].gradients)
        return self.method in MASK_STRATEGIES and bool(MASK_STRATEGIES[self.method].needs_images)

    @property
    def at_start(self) -> bool:
        """Whether the method prunes at initialisation unless ``prune.step`` is set."""
        return self.method in MASK_STRATEGIES and bool(MASK_STRATEGIES[self.method].at_start)

    @property
    def is_gradual(self) -> bool:
        """Whether the method prunes in many small steps."""
        return self.method in MASK_STRATEGIES and bool(MASK_STRATEGIES[self.method].gradual)

    @property
    def regrows(self) -> bool:
        """Whether masks change after pruning, up to ``prune.until``."""
        return self.method in MASK_STRATEGIES and bool(MASK_STRATEGIES[self.method].regrows)

    def start(self, train_steps: int) -> int:
        """Return the optimizer steps before pruning, or before its start (gradual), in ``train_steps`` steps."""
        if self.step is not None:
            return self.step
        if self.at_start:
            return 0
        return max(1, train_steps // (4 if self.is_gradual else 2))

    def end(self, train_steps: int) -> int:
        """Return the optimizer steps before pruning is complete. Only gradual pruning ends later than it starts."""
        return self.last_change(train_steps) if self.is_gradual else self.start(train_steps)

    def last_change(self, train_steps: int) -> int:
        """Return ``prune.until`` in ``train_steps`` steps: where gradual pruning ends, and updates of masks do."""
        return self.until if self.until is not None else max(1, 3 * train_steps // 4)

    def settled(self, train_steps: int) -> int:
        """Return the optimizer steps before the network is pruned and its masks stay."""
        return self.last_change(train_steps) if self.regrows else self.end(train_steps)


def steps_start(steps: StepsConfig, prune: PruneConfig, train_steps: int, *, from_parent: bool) -> int:
    """Return the optimizer steps before step distillation.

    Args:
        steps: the knobs of step distillation.
        prune: the knobs of pruning.
        train_steps: optimizer steps of the run.
        from_parent: whether the run starts from the weights of another one.
    """
    if steps.step is not None:
        return steps.step
    if prune.method == "none":
        return 0 if from_parent else train_steps // 2
    return (prune.settled(train_steps) + train_steps) // 2


_CHAIN = frozenset({"rounds", "per_round", "rewind_step", "control"})
_MASKS_ONLY = frozenset({"profile", "until", "interval", "pattern", "regrow"})


def methods() -> list[str]:
    """Return all values of ``prune.method``."""
    return [*OTHER_METHODS, *MASK_STRATEGIES]


def listens_to(method: str) -> frozenset[str]:
    """Return the knobs that a method uses."""
    if method == "none":
        return frozenset({"method"})
    if method == "lottery":
        return frozenset({"method", "scope", "profile"}) | _CHAIN
    if method == "structured":
        return frozenset(PruneConfig.model_fields) - _CHAIN - _MASKS_ONLY
    return frozenset({"method", "step"}) | MASK_STRATEGIES[method].knobs


@dataclass(frozen=True)
class Need:
    """A condition on another knob, without which a knob has no effect.

    Attributes:
        key: the other knob.
        met: whether a value of it meets the condition.
        values: the values that do, in words.
    """

    key: str
    met: Callable[[Any], bool]
    values: str


def _one_of(key: str, values: Collection[str]) -> Need:
    return Need(key, values.__contains__, ", ".join(sorted(values)))


_CHANNELS = Need("depth", lambda depth: depth != 1.0, "auto, or less than 1")
_BLOCKS = Need("depth", lambda depth: depth != 0.0, "auto, or more than 0")


def needs(method: str) -> dict[str, tuple[Need, ...]]:
    """Return the knobs of a method that have no effect unless one of some conditions on other knobs is met."""
    if method == "structured":
        with_gradients = [name for name, record in IMPORTANCES.items() if record.gradients]
        with_threshold = [name for name, record in IMPORTANCES.items() if record.threshold]
        return {
            "calibration_batches": (_one_of("importance", with_gradients), _BLOCKS),
            "threshold": (_one_of("importance", with_threshold),),
            "block_keep": (_one_of("scope", {"auto", "layer"}),),
            **dict.fromkeys(("importance", "scope", "iterations", "round_to", "widths"), (_CHANNELS,)),
        }
    if {"scope", "profile"} <= listens_to(method):
        return {"profile": (_one_of("scope", {"layer"}),), "block_keep": (_one_of("profile", {"blocks"}),)}
    return {}


def unheard(prune: PruneConfig, tried: Collection[str] | None = None) -> Iterator[str]:
    """Yield the knobs that are set although no method uses them, each as one line for the user.

    A knob at its default counts as not set. A sweep over several methods sets the knobs of all of them in every trial,
    so the sweep is checked for all its methods together, and its trials are not checked.

    Args:
        prune: the knobs.
        tried: the methods; None: ``prune.method`` only.
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
        elif name in needed and not any(need.met(getattr(prune, need.key)) for need in needed[name]):
            now = " and ".join(f"prune.{need.key}={getattr(prune, need.key)}" for need in needed[name])
            remedy = " or ".join(f"prune.{need.key}={need.values}" for need in needed[name])
            yield f"prune.{name} = {value!r}: has no effect with {now}; drop it or use {remedy}"
    if "block_keep" in needed and prune.depth == 1.0 and prune.block_keep and 1.0 not in prune.block_keep:
        yield (
            f"prune.block_keep = {prune.block_keep}: has no effect with prune.depth=1, but shares of 1, which spare "
            f"a block; drop it or use prune.depth=auto, or less than 1"
        )
