"""Convert noise schedules and sampling knobs to and from Diffusers' scheduler_config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from diffusion_core.config import ConfigError, CoreConfig, DiffusionConfig
from diffusion_core.diffusers_io.values import defaults, fixed_problems, is_count, is_list, is_number, problem
from diffusion_core.diffusion.schedule import MAX_BETA, NoiseSchedule, build_schedule, cosine_betas, zero_terminal_snr

EXTRA = "diffusers"
"""Key in the `extra` of a checkpoint: values of the source that have no knob and are exported again."""
SCHEDULER_ALLOWED: dict[str, tuple[Any, ...]] = {
    "thresholding": (False,),
    "rescale_betas_zero_snr": (False, True),
    "set_alpha_to_one": (True,),
    "predict_epsilon": (True,),  # Old name of prediction_type.
}
VARIANCES = {"fixed_small": "fixed_small", "fixed_small_log": "fixed_small", "fixed_large": "fixed_large"}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
SAMPLERS = {"DDPMScheduler": "ddpm", "DDIMScheduler": "ddim"}
DDIM_STEPS = 50
"""Default steps of Diffusers' DDIMPipeline; its DDPMPipeline uses all timesteps."""

SPACINGS = {"linspace": "uniform", "trailing": "trailing"}
"""Spacings of steps that both sides have, by their name in Diffusers."""

BETA_TOLERANCE = 1e-6


def scheduler_defaults() -> dict[str, Any]:
    """Return the arguments of `DDPMScheduler` and `DDIMScheduler` and their defaults."""
    from diffusers import DDIMScheduler, DDPMScheduler

    return defaults(DDPMScheduler, DDIMScheduler)


def scheduler_knobs(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return our knobs of the noise schedule and of sampling for a scheduler_config.json.

    Raises:
        ConfigError: with all values that we cannot represent.
    """
    given = scheduler_defaults() | dict(config)
    if problems := list(_scheduler_problems(given)):
        raise ConfigError(*problems)
    timesteps = given["num_train_timesteps"] if given["trained_betas"] is None else len(given["trained_betas"])
    sampler = SAMPLERS[given["_class_name"]]
    knobs = {
        **_schedule_knobs(given, timesteps),
        "diffusion.timesteps": timesteps,
        "diffusion.zero_terminal_snr": given["rescale_betas_zero_snr"],
        "diffusion.prediction": PREDICTIONS[given["prediction_type"]],
        "sample.sampler": sampler,
        "sample.steps": timesteps if sampler == "ddpm" else min(DDIM_STEPS, timesteps),
        "sample.spacing": SPACINGS.get(str(given["timestep_spacing"]), "uniform"),
        "sample.clip_x0": given["clip_sample"],
    }
    if sampler == "ddpm":
        knobs["sample.variance"] = VARIANCES[given["variance_type"]]
    return knobs


def _scheduler_problems(given: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each value that we cannot represent."""
    choices: list[tuple[str, Sequence[str]]] = [("_class_name", list(SAMPLERS)), ("prediction_type", list(PREDICTIONS))]
    if given.get("_class_name") != "DDIMScheduler":
        choices.append(("variance_type", list(VARIANCES)))
    if given["trained_betas"] is None:
        choices.append(("beta_schedule", ["linear", "squaredcos_cap_v2"]))
    for key, names in choices:
        if given.get(key) not in names:
            yield problem(given, key, f"one of {', '.join(names)}")
    yield from fixed_problems(given, SCHEDULER_ALLOWED)
    if not is_count(given["num_train_timesteps"]) or given["num_train_timesteps"] < 2:
        yield problem(given, "num_train_timesteps", "an integer >= 2")
    if given["trained_betas"] is None:
        if given["beta_schedule"] == "linear":
            for key in ("beta_start", "beta_end"):
                if not (is_number(given[key]) and 0 < given[key] <= MAX_BETA):
                    yield problem(given, key, f"a number > 0 and <= {MAX_BETA}")
    elif not (is_list(given["trained_betas"]) and all(map(is_number, given["trained_betas"]))):
        yield "trained_betas: expected a list of numbers"
    elif len(given["trained_betas"]) < 2 or not _named_schedule(given["trained_betas"]):
        shown = ", ".join(map(str, given["trained_betas"][:3]))
        yield f"trained_betas = [{shown}, ..]: expected those of a linear or cosine schedule"
    if given["clip_sample"] not in (True, False):
        yield problem(given, "clip_sample", "true or false")
    if given["clip_sample"] and given["clip_sample_range"] != 1:
        yield problem(given, "clip_sample_range", "1.0")


def _named_schedule(betas: Sequence[float]) -> str | None:
    """Return the name of our schedule that has these variances, if any."""
    theirs = torch.tensor(betas, dtype=torch.float64)
    straight = torch.linspace(betas[0], betas[-1], len(betas), dtype=torch.float64)
    if betas[0] > 0 and max(betas) <= MAX_BETA and torch.allclose(theirs, straight, rtol=0, atol=BETA_TOLERANCE):
        return "linear"
    return "cosine" if torch.allclose(theirs, cosine_betas(len(betas)), rtol=0, atol=BETA_TOLERANCE) else None


def _schedule_knobs(given: Mapping[str, Any], timesteps: int) -> dict[str, Any]:
    """Return our knobs of the schedule; its two ends are defined for 1,000 timesteps."""
    betas = given["trained_betas"]
    if given["beta_schedule"] == "squaredcos_cap_v2" if betas is None else _named_schedule(betas) == "cosine":
        return {"diffusion.schedule": "cosine"}
    start, end = (given["beta_start"], given["beta_end"]) if betas is None else (betas[0], betas[-1])
    scale = timesteps / 1000
    if scale * end >= 1:
        key = "beta_end" if betas is None else "trained_betas"
        raise ConfigError(f"{key} = {end!r} at last: expected less than {1 / scale:g} for {timesteps} timesteps")
    return {
        "diffusion.schedule": "linear",
        "diffusion.beta_start": scale * start,
        "diffusion.beta_end": scale * end,
    }


def fewer_steps(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values without a knob that decide which timesteps a shorter sampling visits."""
    kept = {"timestep_spacing": "leading"} if scheduler.get("timestep_spacing") == "leading" else {}
    offset = scheduler.get("steps_offset")
    return kept | ({"steps_offset": offset} if is_count(offset) else {})


def scheduler_config(config: CoreConfig) -> dict[str, Any]:
    """Return the configuration of `DDPMScheduler`; a schedule without a name in Diffusers is listed in full.

    Uses the schedule and the prediction of ``config``, and the variance, the spacing of steps and the clipping of its
    sampling.

    Raises:
        ConfigError: if Diffusers has no such prediction.
    """
    diffusion, sample = config.diffusion, config.sample
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if diffusion.prediction not in predictions:
        raise ConfigError(
            f"diffusion.prediction = {diffusion.prediction!r}: DDPMScheduler does not know it; expected one of "
            f"{', '.join(predictions)}"
        )
    spacings = {ours: theirs for theirs, ours in SPACINGS.items()}
    return {
        **_betas(diffusion),
        "num_train_timesteps": diffusion.timesteps,
        "variance_type": sample.variance,
        "clip_sample": sample.clip_x0,
        "clip_sample_range": 1.0,
        "prediction_type": predictions[diffusion.prediction],
        "timestep_spacing": spacings.get(sample.spacing, "linspace"),
    }


def _betas(diffusion: DiffusionConfig) -> dict[str, Any]:
    """Return the schedule by its name in Diffusers, or else its variances."""
    signal = build_schedule(diffusion).alphas.square()
    scale = 1000.0 / diffusion.timesteps
    start, end = scale * diffusion.beta_start, scale * diffusion.beta_end
    named = {
        "linear": torch.linspace(start, end, diffusion.timesteps, dtype=torch.float64),
        "squaredcos_cap_v2": cosine_betas(diffusion.timesteps),
    }
    for name, betas in named.items():
        if end > MAX_BETA and name == "linear":
            continue
        schedule = NoiseSchedule.from_betas(betas)
        for rescaled in (False, True):
            found = zero_terminal_snr(schedule) if rescaled else schedule
            if torch.allclose(found.alphas.square(), signal, rtol=1e-9, atol=0):
                ends = {"beta_start": start, "beta_end": end} if name == "linear" else {}
                return {"beta_schedule": name, **ends, "rescale_betas_zero_snr": rescaled}
    return {"trained_betas": (1.0 - signal / torch.cat([signal.new_ones(1), signal[:-1]])).tolist()}
