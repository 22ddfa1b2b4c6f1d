"""Reading a sweep file: W&B's own YAML, checked whole against the schema before anything starts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import Any

from agent.config import TrialConfig, build_config
from agent.sweep import engine
from agent.sweep.process import ARGS_MACRO, ENVIRONMENT_MACRO, MACROS
from diffusion_core.config import ConfigError, list_knobs, read_yaml, unknown_key
from diffusion_core.config.metrics import GOALS, goal_of
from pruning.config import PruneConfig, methods, unheard

METHODS = ("grid", "random", "bayes")
EXPECTED = {"early_terminate": "type: hyperband, with min_iter:, or with max_iter: and s:"}
"""What a setting of a sweep may be, where W&B's schema does not say it in words."""

MAX_NAME_BYTES = 200
"""Length of a sweep's name; a folder's may have 255 bytes."""

MAX_SHOWN = 300
"""Characters of a value in a message."""
DECIDE_FIGURES = ("eval.", "data.", "model.class_conditional", "preset")
"""Knobs that decide which figures a trial logs."""

MOST_COMBINATIONS = 1000
"""Combinations of them that are tried."""

SPREAD = 3.0
"""A normal distribution is tried at its mean and this many deviations to both sides of it."""

MAX_GRID = 100_000
"""Combinations of a grid. The engine lists them all for every suggestion."""


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
        """Name of the figure that the sweep optimises, or None."""
        return self.config.get("metric", {}).get("name")

    @property
    def maximize(self) -> bool:
        """Whether a larger value of the metric is better."""
        return self.config.get("metric", {}).get("goal") == "maximize"

    @property
    def varied(self) -> list[str]:
        """The parameters that differ between trials."""
        return [
            key for key, spec in self.parameters.items() if len(spec.get("values", (0, 1))) > 1 and "value" not in spec
        ]

    @property
    def run_cap(self) -> int | None:
        """Largest number of trials, or None for no limit."""
        return self.config.get("run_cap")

    def grid_size(self) -> int | None:
        """Number of trials of a grid; None for other methods."""
        if self.config["method"] != "grid":
            return None
        return grid_size(self.parameters)

    def renamed(self, name: str) -> SweepFile:
        """The same sweep under another name.

        Raises:
            SweepError: if no folder can have that name.
        """
        problems = _name_problems(name)
        if problems:
            raise SweepError(*problems)
        return replace(self, name=name, config=self.config | {"name": name})

    @property
    def total(self) -> int | None:
        """How many trials there will be; None if the search goes on until it is stopped."""
        caps = [cap for cap in (self.run_cap, self.grid_size()) if cap is not None]
        return min(caps) if caps else None

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
    return check_sweep(config, str(path), path.stem)


def check_sweep(config: dict[str, Any], source: str, name: str) -> SweepFile:
    """Check the content of a sweep as :func:`load_sweep` does.

    Args:
        source: where it is from, for messages.
        name: what it is called if it does not say.

    Raises:
        SweepError: with all problems found, one a line.
    """
    config = {key: value for key, value in config.items() if value is not None}  # `metric:` with nothing after it.
    name = config.get("name", name)
    problems = _setting_problems(config) + _parameter_problems(config.get("parameters"), config.get("method"))
    problems += _name_problems(name) if isinstance(name, str) else []
    if not problems:
        problems += _unlogged_metric(config)
    if problems:
        raise SweepError("\n".join(f"{source}: {problem}" for problem in dict.fromkeys(problems)))
    return SweepFile(name, config, flat_parameters(config["parameters"]))


def _name_problems(name: str) -> list[str]:
    if name and Path(name).name == name and name.isprintable() and len(name.encode()) <= MAX_NAME_BYTES:
        return []
    return [f"name = {_shown(name)}: expected a name that a folder can have"]


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
        problems.append(f"command = {_shown(command)}: expected a list that ends in {ARGS_MACRO}, such as "
                        "[${env}, ${interpreter}, -m, agent, ${args}]")  # fmt: skip
    else:
        for word in command:
            if "${" in ENVIRONMENT_MACRO.sub("", str(word)) and word not in MACROS:
                problems.append(f"command = {word!r}: expected one of {', '.join(MACROS)}, ${{envvar:NAME}}")
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


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _unlogged_metric(config: Mapping[str, Any]) -> Iterator[str]:
    """The metric must be a figure that every trial logs, whatever the sweep chooses for it."""
    metric = (config.get("metric") or {}).get("name")
    if metric is None:
        return
    values = {key: values_to_try(spec) for key, spec in flat_parameters(config["parameters"]).items()}
    deciding = [key for key, tried in values.items() if len(tried) > 1 and key.startswith(DECIDE_FIGURES)]
    first = {key: tried[0] for key, tried in values.items()}
    for chosen in islice(product(*(values[key] for key in deciding)), MOST_COMBINATIONS):
        choice = dict(zip(deciding, chosen, strict=True))
        try:
            trial = build_config(first | choice)
        except ConfigError:  # Such a trial is refused before it starts.
            continue
        if not trial.logs(metric):
            where = " with " + ", ".join(f"{key}={value}" for key, value in choice.items()) if choice else ""
            yield (
                f"metric.name = {metric!r}: a trial{where} does not log it; expected one of "
                f"{', '.join(trial.logged_figures())}"
            )
            return


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
    return [f"{key} = {_shown(value)}: {'; '.join(dict.fromkeys(reasons)) or f'expected {expected}'}"]


def _parameter_problems(parameters: Any, method: Any) -> list[str]:
    if not isinstance(parameters, Mapping) or not parameters:
        return [f"parameters = {_shown(parameters)}: expected a mapping from knobs such as train.lr to their values"]
    fields = dict(list_knobs(TrialConfig))
    tried: dict[str, list[Any]] = {}
    problems: list[str] = []
    for key, spec in flat_parameters(parameters).items():
        wrong = _violations(key, spec, {"parameters": {key: spec}})
        ends = [type(spec[end]) for end in ("min", "max")] if not wrong and {"min", "max"} <= spec.keys() else []
        if len(set(ends)) > 1 and "distribution" not in spec:
            wrong = [f"{key} = {_shown(spec)}: expected two integers or two numbers with a point, or a distribution:"]
        if not wrong and method == "bayes" and "probabilities" in spec:
            wrong = [f"{key} = {_shown(spec)}: expected values: without probabilities:, which method=bayes cannot use"]
        if not wrong and method == "grid" and trials_of(spec) is None:
            wrong = [f"{key} = {_shown(spec)}: expected value: or values:, which method=grid needs"]
        known = key.partition(".")[0] in TrialConfig.model_fields
        if not known or ("." in key and key not in fields):
            wrong = [unknown_key(key, spec, fields)]
        problems += wrong
        if not wrong:
            tried[key] = values_to_try(spec)
    flat = {key: spec for key, spec in flat_parameters(parameters).items() if key in tried}
    if method == "grid" and grid_size(flat) > MAX_GRID:
        problems.append(f"parameters: {grid_size(flat):,} combinations; expected at most {MAX_GRID:,} for method=grid")
    if method == "bayes" and not problems and all("value" in spec for spec in flat.values()):
        problems.append("parameters: expected one that varies, for method=bayes to search")
    first = {key: values[0] for key, values in tried.items()}
    named = map(str, tried.get("prune.method", [PruneConfig().method]))
    wanted = [name for name in named if name in methods()]
    for key, values in tried.items():
        for value in values:
            try:
                config = build_config(first | {key: value})
            except ConfigError as error:
                problems += error.problems
            else:
                problems += unheard(config.prune, wanted)
    return problems


def grid_size(parameters: Mapping[str, Mapping[str, Any]]) -> int:
    """Number of combinations of a grid's parameters."""
    return math.prod(trials_of(spec) or 1 for spec in parameters.values())


def trials_of(spec: Mapping[str, Any]) -> int | None:
    """How many values a grid tries of a parameter; None if it is no parameter for a grid."""
    if "value" in spec:
        return 1
    if "values" in spec:
        return None if "probabilities" in spec else len({repr(value) for value in spec["values"]})
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
