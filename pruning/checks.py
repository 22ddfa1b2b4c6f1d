"""Combinations of pruning knobs with others that cannot work, each as one line for the user."""

from __future__ import annotations

from collections.abc import Iterator

from diffusion_core.config import (
    ConfigError,
    CoreConfig,
    DiffusionConfig,
    DistillConfig,
    EmaConfig,
    InitConfig,
    ModelConfig,
    SampleConfig,
    StepsConfig,
    TrainConfig,
)
from diffusion_core.registries import STEP_METHODS
from pruning.config import PruneConfig, steps_start

PARENTS = ("init.", "distill.")
"""Knobs that name the models that a trial starts or learns from."""


def combination_problems(
    prune: PruneConfig, init: InitConfig, distill: DistillConfig, model: ModelConfig, train: TrainConfig, ema: EmaConfig
) -> Iterator[str]:
    """Yield what is wrong with the sections of a configuration taken together."""
    yield from _step_problems(prune, train, ema)
    yield from _block_problems(prune, model)
    if prune.method == "lottery":
        yield from _lottery_problems(prune, init, distill, train)
    yield from _source_problems(init, distill)
    yield from _teacher_problems(prune, init, distill, train)


def _step_problems(prune: PruneConfig, train: TrainConfig, ema: EmaConfig) -> Iterator[str]:
    start, end = prune.start(train.steps), prune.settled(train.steps)
    if prune.step is not None and prune.step >= train.steps:
        yield f"prune.step = {prune.step}: expected less than train.steps = {train.steps}"
    left = train.steps - start
    if prune.method == "structured" and (ema.average_from or 0) >= left > 0:
        yield (
            f"ema.average_from = {ema.average_from}: pruning restarts the averages {left} steps before the end; "
            f"expected less than {left}"
        )
    if prune.is_gradual or prune.regrows:
        if not start < end < train.steps:
            yield (
                f"prune.until = {end}: expected more than prune.step = {start} and less than train.steps = "
                f"{train.steps}"
            )
        elif start + prune.interval >= end:
            yield (
                f"prune.interval = {prune.interval}: masks would not change between prune.step = {start} and "
                f"prune.until = {end}; expected less than {end - start}"
            )
    if prune.method != "none" and prune.step is None and train.steps < 2:
        yield (
            f"train.steps = {train.steps}: prune.method={prune.method} needs steps before and after pruning; "
            f"expected at least 2"
        )


def _block_problems(prune: PruneConfig, model: ModelConfig) -> Iterator[str]:
    if prune.profile == "blocks" and not prune.block_keep:
        yield "prune.profile = 'blocks': needs prune.block_keep, such as 0.5,0.5,0.2,0.5,0.5 for two resolutions"
    if prune.profile == "blocks" and prune.method == "lottery":
        yield "prune.profile = 'blocks': not for prune.method=lottery, whose rounds decide how much stays; use erk"
    levels = len(model.channel_multipliers)
    if prune.block_keep and len(prune.block_keep) != 2 * levels + 1:
        yield (
            f"prune.block_keep = {prune.block_keep}: expected {2 * levels + 1} shares: {levels} resolutions on the way "
            f"down, the middle, and {levels} on the way up"
        )
    if prune.block_keep and min(prune.block_keep) == 1.0:
        yield f"prune.block_keep = {prune.block_keep}: keeps all blocks; expected at least one share below 1"


def costly_problems(
    config: CoreConfig, steps: StepsConfig, prune: PruneConfig, init: InitConfig, distill: DistillConfig
) -> Iterator[str]:
    """Yield what is wrong with combinations whose checks import PyTorch, where knobs ask for them."""
    if prune.widths == "diffusers" and prune.method == "structured":
        yield from diffusers_problems(config, prune)
    if config.sample.start_level is not None:
        yield from start_level_problems(config.sample, config.diffusion)
    if steps.wanted:
        yield from steps_problems(config, steps, prune, init, distill)


def diffusers_problems(config: CoreConfig, prune: PruneConfig) -> Iterator[str]:
    """Yield why the model of a trial with ``prune.widths=diffusers`` could not become a pipeline of Diffusers."""
    from diffusion_core.diffusers_io import knob_problems, scheduler_config

    levels, shares = len(config.model.channel_multipliers), prune.block_keep
    down, middle, up = shares[:levels], shares[levels : levels + 1], shares[levels + 1 :]
    if len(shares) == 2 * levels + 1 and (down != up[::-1] or middle != down[-1:]):
        yield (
            f"prune.block_keep = {shares}: prune.widths=diffusers needs the shares of the way down on the way up too, "
            f"and the last of them for the middle"
        )
    for name, value, default in (("depth", prune.depth, 0.0), ("blocks", prune.blocks, [])):
        if value != default:
            yield f"prune.{name} = {value!r}: not with prune.widths=diffusers, which has all blocks; drop one of them"
    channels, size, _ = config.data.image_shape
    problems = list(knob_problems(config.model, size, config.upsample.channels(channels)))
    try:
        scheduler_config(config)
    except ConfigError as error:
        problems += error.problems
    for line in problems:
        yield f"prune.widths = 'diffusers': {line}"


def _lottery_problems(
    prune: PruneConfig, init: InitConfig, distill: DistillConfig, train: TrainConfig
) -> Iterator[str]:
    for key, source in (("init.checkpoint", init.checkpoint), ("init.artifact", init.artifact)):
        if source is not None:
            yield f"{key} = {source!r}: not for prune.method=lottery, which trains from new weights; leave it out"
    if distill.wanted:
        yield (
            f"distill.output = {distill.output}: not for prune.method=lottery, whose tickets train as the dense "
            f"network did; leave it out"
        )
    if prune.rewind_step >= train.steps:
        yield f"prune.rewind_step = {prune.rewind_step}: expected less than train.steps = {train.steps}"


def unnamed_parents(init: InitConfig, distill: DistillConfig) -> Iterator[str]:
    """Yield the artifacts in whose names no run's id has been put, each as one line for the user."""
    for key, name in (("init.artifact", init.artifact), ("distill.artifact", distill.artifact)):
        if name is not None and "RUN_ID" in name:
            yield f"{key} = {name!r}: put the id of a run there, in place of RUN_ID"


def _source_problems(init: InitConfig, distill: DistillConfig) -> Iterator[str]:
    for section, source in (("init", init), ("distill", distill)):
        if source.checkpoint is not None and source.artifact is not None:
            yield (
                f"{section}.artifact = {source.artifact!r}: {section}.checkpoint is set as well; expected one of them"
            )
    if init.artifact is not None and init.weights != "ema":
        yield f"init.weights = {init.weights!r}: artifacts hold the averaged weights only; expected ema"
    if init.checkpoint is None and init.artifact is None and init.weights != "ema":
        yield f"init.weights = {init.weights!r}: has no effect without init.checkpoint; set that or leave it out"


def _teacher_problems(
    prune: PruneConfig, init: InitConfig, distill: DistillConfig, train: TrainConfig
) -> Iterator[str]:
    teacher = distill.checkpoint or distill.artifact
    pruned_at_once = prune.method not in ("none", "lottery") and prune.start(train.steps) == 0
    if distill.wanted and teacher is None and pruned_at_once and init.checkpoint is None and init.artifact is None:
        yield (
            "prune.step = 0: the teacher would be the untrained network; set prune.step above 0, init.checkpoint or "
            "distill.checkpoint"
        )
    if distill.wanted and teacher is None and prune.method == "none":
        yield (
            "distill.checkpoint = None: there is no teacher; set it or distill.artifact, or set prune.method, which "
            "makes the dense network the teacher"
        )
    if teacher is not None and not distill.wanted:
        yield (
            f"distill.output = {distill.output}: the teacher {teacher!r} has no effect while distill.output and "
            "distill.features are 0; set one of them"
        )


def steps_problems(
    config: CoreConfig, steps: StepsConfig, prune: PruneConfig, init: InitConfig, distill: DistillConfig
) -> Iterator[str]:
    """Yield what is wrong with step distillation, given all other sections."""
    from diffusion_core.diffusion.schedule import build_schedule
    from diffusion_core.step_distillation.phase import stages, start_level

    train = config.train
    from_parent = init.checkpoint is not None or init.artifact is not None
    if prune.method == "lottery":
        yield f"steps.method = {steps.method!r}: not for prune.method=lottery; start a run from its ticket (init.*)"
        return
    first = steps_start(steps, prune, train.steps, from_parent=from_parent)
    if first >= train.steps:
        yield f"steps.step = {first}: expected less than train.steps = {train.steps}"
        return
    if first == 0 and not from_parent:
        yield "steps.step = 0: there is no teacher yet; set init.checkpoint or init.artifact, or a later step"
    pruned = prune.settled(train.steps)
    if prune.method != "none" and pruned > first:
        yield f"steps.step = {first}: expected at least {pruned}, where the network is pruned"
    if distill.wanted and first == 0:
        yield f"distill.output = {distill.output}: has no effect with steps.step=0; leave it out"
    guidance = config.sample.guidance if steps.guidance is None else steps.guidance
    if guidance != 1.0 and not (config.model.class_conditional and train.label_dropout):
        yield (
            f"steps.guidance = {guidance}: guidance other than 1 needs model.class_conditional=true and "
            f"train.label_dropout above 0"
        )
    try:
        planned = stages(steps, first, train.steps)
    except ValueError as error:
        yield str(error)
        return
    if any(stage.start == stage.end for stage in planned):
        yield f"train.steps = {train.steps}: {len(planned)} stages in {train.steps - first} steps; expected more steps"
    known = build_schedule(config.diffusion).timesteps_to(start_level(config, steps))
    progressive = "start" in STEP_METHODS[steps.method].knobs
    key, most = ("steps.start", steps.start) if progressive else ("steps.target", steps.target)
    if most > known:
        yield f"{key} = {most}: expected at most {known}, the timesteps up to the student's first noise level"
    if steps.weighting == "difference" and progressive:
        yield "steps.weighting = 'difference': not for steps.method=progressive; expected uniform or truncated_snr"
    left = train.steps - planned[-1].start
    if (config.ema.average_from or 0) >= left:
        yield (
            f"ema.average_from = {config.ema.average_from}: the last stage restarts the averages {left} steps before "
            f"the end; expected less than {left}"
        )


def start_level_problems(sample: SampleConfig, diffusion: DiffusionConfig) -> Iterator[str]:
    """Yield one line if there are more sampling steps than timesteps up to ``sample.start_level``."""
    from diffusion_core.diffusion.schedule import build_schedule

    try:
        build_schedule(diffusion).steps(sample.steps, sample.spacing, sample.start_level)
    except ConfigError as error:
        yield str(error)


def check_processes(prune: PruneConfig, count: int) -> None:
    """Check that a trial's processes would all prune the same network.

    Raises:
        ConfigError: if they would not.
    """
    if prune.method == "structured" and prune.target == "latency" and count > 1:
        raise ConfigError(
            "prune.target = 'latency': each process would measure another latency; expected channels, params or macs, "
            "or use scripts/prune.py on one device"
        )
