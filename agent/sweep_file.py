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
from diffusion_core.figure_names import GOALS, goal_of
from pruning.config import LISTENS_TO, PruneConfig, unheard

ARGS_MACRO = "${args}"
METHODS = ("grid", "random", "bayes")
EXPECTED = {"early_terminate": "type: hyperband, with min_iter:, or with max_iter: and s:"}
"""What a setting of a sweep may be, where W&B's schema does not say it in words."""

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
        return math.prod(trials_of(spec) or 1 for spec in self.parameters.values())

    def engine_config(self) -> dict[str, Any]:
        """What W&B's search engine takes: parameters flat, and nothing that is the server's business."""
        known = ("method", "metric", "early_terminate")
        return {key: self.config[key] for key in known if key in self.config} | {"parameters": self.parameters}


def load_sweep(path: Path) -> SweepFile:
    """Read and check a sweep file.

    Every value of every parameter, and of every distribution its ends and a value between, must make a configuration
    that works together with the first values of the other parameters.

    Raises:
        SweepError: with all problems found, one a line.
    """
    try:
        config = read_yaml(path)
    except ConfigError as error:
        raise SweepError(str(error).removeprefix("--config = ")) from None
    problems = _setting_problems(config) + _parameter_problems(config.get("parameters"), config.get("method"))
    if problems:
        raise SweepError("\n".join(f"{path}: {problem}" for problem in dict.fromkeys(problems)))
    return SweepFile(str(config.get("name", path.stem)), config, flat_parameters(config["parameters"]))


def flat_parameters(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, dict[str, Any]]:
    """Nested parameters (``train: {parameters: {lr: ...}}``) by dotted key."""
    flat: dict[str, dict[str, Any]] = {}
    for key, spec in parameters.items():
        if isinstance(spec, Mapping) and isinstance(spec.get("parameters"), Mapping):
            flat.update(flat_parameters(spec["parameters"], f"{prefix}{key}."))
        else:
            flat[prefix + str(key)] = spec
    return flat


def _setting_problems(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with everything but the parameters."""
    problems: list[str] = []
    judged = {"method", "metric", "run_cap", "command", "parameters"}  # run_cap is newer than the engine's schema.
    if config.get("method") not in METHODS:
        problems.append(f"method = {config.get('method')!r}: expected one of {', '.join(METHODS)}")
    problems += _metric_problems(config)
    run_cap = config.get("run_cap")
    if run_cap is not None and (not isinstance(run_cap, int) or isinstance(run_cap, bool) or run_cap < 1):
        problems.append(f"run_cap = {run_cap!r}: expected an integer >= 1")
    command = config.get("command")
    if not isinstance(command, list) or ARGS_MACRO not in command:
        problems.append(f"command = {command!r}: expected a list that ends in {ARGS_MACRO}, such as "
                        "[${env}, ${interpreter}, -m, agent, ${args}]")  # fmt: skip
    for key, value in config.items():
        if key not in judged:
            problems += _violations(key, value, {key: value})
    return problems


def _metric_problems(config: Mapping[str, Any]) -> list[str]:
    metric = config.get("metric")
    if metric is None:
        needed_by = [f"method={config.get('method')}"] if config.get("method") == "bayes" else []
        needed_by += ["early_terminate"] if "early_terminate" in config else []
        missing = "metric = None: expected name: and goal:, such as {name: val/loss, goal: minimize}"
        return [f"{missing}; {' and '.join(needed_by)} cannot do without"] if needed_by else []
    if not isinstance(metric, Mapping):
        return [f"metric = {metric!r}: expected name: and goal:, such as {{name: val/loss, goal: minimize}}"]
    name, goal = metric.get("name"), metric.get("goal", "minimize")
    if not isinstance(name, str) or goal_of(name) is None:
        return [f"metric.name = {name!r}: expected one of {', '.join(GOALS)}"]
    if goal != goal_of(name):
        return [f"metric.goal = {goal!r}: expected {goal_of(name)}, which is the better way for {name}"]
    return _violations("metric", metric, {"metric": metric})


def _violations(key: str, value: Any, content: Mapping[str, Any]) -> list[str]:
    """What W&B's schema has against one setting or parameter, in one line."""
    found = engine.violations({"method": "random", "parameters": {"seed": {"value": 0}}} | dict(content))
    if not found:
        return []
    # "not valid under any of the given schemas" helps nobody.
    reasons = [" ".join(reason.removeprefix(f"{key}: ").split()) for reason in found]
    reasons = [
        reason for reason in reasons if not reason.endswith("schemas") and not reason.lower().startswith("invalid ")
    ]
    expected = EXPECTED.get(key, "value:, values:, or min: and max:, with a distribution: that W&B knows")
    return [f"{key} = {value!r}: {'; '.join(dict.fromkeys(reasons)) or f'expected {expected}'}"]


def _parameter_problems(parameters: Any, method: Any) -> list[str]:
    if not isinstance(parameters, Mapping) or not parameters:
        return [f"parameters = {parameters!r}: expected a mapping from knobs such as train.lr to their values"]
    fields = dict(knobs(TrialConfig))
    tried: dict[str, list[Any]] = {}
    problems: list[str] = []
    for key, spec in flat_parameters(parameters).items():
        wrong = _violations(key, spec, {"parameters": {key: spec}})
        if not wrong and method == "grid" and trials_of(spec) is None:
            wrong = [f"{key} = {spec!r}: expected value: or values:, which method=grid needs"]
        known = key.partition(".")[0] in TrialConfig.model_fields
        if not known or ("." in key and key not in fields):
            wrong = [unknown_key(key, spec, fields)]
        problems += wrong
        if not wrong:
            tried[key] = values_to_try(spec)
    first = {key: values[0] for key, values in tried.items()}
    methods = [str(method) for method in tried.get("prune.method", [PruneConfig().method]) if method in LISTENS_TO]
    for key, values in tried.items():
        for value in values:
            try:
                config = build_config(first | {key: value})
            except ConfigError as error:
                problems += error.problems
            else:
                problems += unheard(config.prune, methods)
    return problems


def trials_of(spec: Mapping[str, Any]) -> int | None:
    """How many values a grid tries of a parameter; None if it is no parameter for a grid."""
    if "value" in spec:
        return 1
    if "values" in spec:
        return None if "probabilities" in spec else len(spec["values"])
    if is_whole(spec):
        return spec["max"] - spec["min"] + 1
    return (
        math.ceil((spec["max"] - spec["min"]) / spec.get("q", 1.0)) if spec.get("distribution") == "q_uniform" else None
    )


def is_whole(spec: Mapping[str, Any]) -> bool:
    """Whether a distribution draws integers only: ``int_uniform``, also by default, for integer ends."""
    ends = spec.get("min"), spec.get("max")
    return spec.get("distribution", "int_uniform") == "int_uniform" and all(isinstance(end, int) for end in ends)


def values_to_try(spec: Mapping[str, Any]) -> list[Any]:
    """The values of a parameter: all of them, or of a distribution its ends and one between."""
    if "value" in spec:
        return [spec["value"]]
    if "values" in spec:
        return list(spec["values"])
    kind = spec.get("distribution", "uniform")
    if "normal" in kind:
        mu, spread = spec.get("mu", 0.0), SPREAD * spec.get("sigma", 1.0)
        ends = [mu - spread, mu, mu + spread]
        ends = [math.exp(end) for end in ends] if "log" in kind else ends
    elif "beta" in kind:
        ends = [0.0, 0.5, 1.0]
    else:
        low, high = spec["min"], spec["max"]
        if kind in ("log_uniform", "q_log_uniform"):
            low, high = math.exp(low), math.exp(high)
        elif kind == "inv_log_uniform":
            low, high = math.exp(-high), math.exp(-low)
        ends = [low, (low + high) // 2 if is_whole(spec) else 0.382 * low + 0.618 * high, high]
    if kind.startswith("q_"):
        quantum = spec.get("q", 1.0)
        ends = [round(end / quantum) * quantum for end in ends]
    return ends
