"""Reading a sweep file: W&B's own YAML, checked whole against the schema before anything starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import engine
from agent.config import TrialConfig, build_config
from diffusion_core.config_io import ConfigError, knobs, read_yaml, unknown_key
from diffusion_core.evaluation import GOALS

ARGS_MACRO = "${args}"
SPREAD = 3.0
"""A normal distribution is tried at its mean and this many deviations to both sides of it."""


class SweepError(ConfigError):
    """A sweep file that cannot be run; the message has one line per problem."""


@dataclass(frozen=True)
class SweepFile:
    """A sweep that has been checked.

    Attributes:
        name: the sweep's own name, or the file's.
        config: the file's content, as W&B takes it.
        parameters: the parameters, flat, by dotted key.
    """

    name: str
    config: dict[str, Any]
    parameters: dict[str, dict[str, Any]]

    @property
    def metric(self) -> str | None:
        return self.config.get("metric", {}).get("name")

    @property
    def maximize(self) -> bool:
        return self.config.get("metric", {}).get("goal") == "maximize"

    @property
    def varied(self) -> list[str]:
        """The parameters that differ between trials."""
        return [
            key for key, spec in self.parameters.items() if len(spec.get("values", (0, 1))) > 1 and "value" not in spec
        ]

    @property
    def run_cap(self) -> int | None:
        return self.config.get("run_cap")

    def grid_size(self) -> int | None:
        """Number of trials of a grid; None for other methods."""
        if self.config["method"] != "grid":
            return None
        return math.prod(len(spec.get("values", (0,))) for spec in self.parameters.values())

    def engine_config(self) -> dict[str, Any]:
        """What W&B's search engine takes: parameters flat, and nothing that is the server's business."""
        known = ("method", "metric", "early_terminate")
        return {key: self.config[key] for key in known if key in self.config} | {"parameters": self.parameters}


def load_sweep(path: Path) -> SweepFile:
    """Read and check a sweep file.

    Every value of every parameter, and the ends of every distribution, must make a configuration that works together
    with the first values of the other parameters.

    Raises:
        SweepError: with all problems found, one a line.
    """
    try:
        config = read_yaml(path)
    except ConfigError as error:
        raise SweepError(str(error).removeprefix("--config = ")) from None
    problems = _structure_problems(config)
    if problems:
        raise SweepError("\n".join(f"{path}: {problem}" for problem in problems))
    sweep = SweepFile(str(config.get("name", path.stem)), config, flat_parameters(config["parameters"]))
    problems = [*_parameter_problems(sweep), *_metric_problems(sweep)]
    if problems:
        raise SweepError("\n".join(f"{path}: {problem}" for problem in dict.fromkeys(problems)))
    return sweep


def flat_parameters(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, dict[str, Any]]:
    """Nested parameters (``train: {parameters: {lr: ...}}``) by dotted key."""
    flat: dict[str, dict[str, Any]] = {}
    for key, spec in parameters.items():
        if isinstance(spec, Mapping) and "parameters" in spec:
            flat.update(flat_parameters(spec["parameters"], f"{prefix}{key}."))
        else:
            flat[prefix + str(key)] = spec
    return flat


def _structure_problems(config: Mapping[str, Any]) -> list[str]:
    run_cap = config.get("run_cap")
    if run_cap is not None and (not isinstance(run_cap, int) or isinstance(run_cap, bool) or run_cap < 1):
        return [f"run_cap = {run_cap!r}: expected an integer >= 1"]
    if not isinstance(config.get("parameters"), Mapping) or not config["parameters"]:
        return ["parameters: missing; expected a mapping from knobs such as train.lr to their values"]
    flat = flat_parameters(config["parameters"])
    for key, spec in flat.items():
        if not isinstance(spec, Mapping):
            return [f"{key} = {spec!r}: expected value: or values: or a distribution"]
    content = {key: value for key, value in config.items() if key != "run_cap"}  # Newer than the engine's schema.
    problems = engine.violations(content | {"parameters": flat})
    command = config.get("command", [])
    if ARGS_MACRO not in command:
        problems.append(f"command = {command!r}: expected a list that ends in {ARGS_MACRO}, such as "
                        "[${env}, ${interpreter}, -m, agent, ${args}]")  # fmt: skip
    return [" ".join(problem.split()) for problem in problems]


def _parameter_problems(sweep: SweepFile) -> list[str]:
    fields = dict(knobs(TrialConfig))
    problems = [unknown_key(key, spec, fields) for key, spec in sweep.parameters.items() if key not in fields]
    if problems:
        return problems
    tried = {key: values_to_try(spec) for key, spec in sweep.parameters.items()}
    first = {key: values[0] for key, values in tried.items()}
    for key, values in tried.items():
        for value in values:
            try:
                build_config(first | {key: value})
            except ConfigError as error:
                problems.append(str(error))
    return problems


def values_to_try(spec: Mapping[str, Any]) -> list[Any]:
    """The values of a parameter: all of them, or of a distribution its ends and one between."""
    if "value" in spec:
        return [spec["value"]]
    if "values" in spec:
        return list(spec["values"])
    kind = spec.get("distribution", "uniform")
    if "mu" in spec:
        ends = [spec["mu"] - SPREAD * spec["sigma"], spec["mu"], spec["mu"] + SPREAD * spec["sigma"]]
        ends = [math.exp(end) for end in ends] if "log" in kind else ends
    elif "a" in spec:
        ends = [0.0, 0.5, 1.0]
    else:
        low, high = spec["min"], spec["max"]
        if kind in ("log_uniform", "q_log_uniform"):
            low, high = math.exp(low), math.exp(high)
        elif kind == "inv_log_uniform":
            low, high = math.exp(-high), math.exp(-low)
        whole = kind == "int_uniform" or ("distribution" not in spec and isinstance(low, int) and isinstance(high, int))
        ends = [low, (low + high) // 2 if whole else 0.382 * low + 0.618 * high, high]
    if kind.startswith("q_"):
        quantum = spec.get("q", 1.0)
        ends = [round(end / quantum) * quantum for end in ends]
    return ends


def _metric_problems(sweep: SweepFile) -> list[str]:
    if sweep.metric is None:
        return ["metric: missing; without it no trial is the best"] if "metric" in sweep.config else []
    if sweep.metric not in GOALS:
        return [f"metric.name = {sweep.metric!r}: expected one of {', '.join(GOALS)}"]
    goal = sweep.config["metric"].get("goal", "minimize")
    if goal != GOALS[sweep.metric]:
        return [f"metric.goal = {goal!r}: {sweep.metric} is better the other way; expected {GOALS[sweep.metric]}"]
    return []
