"""Read a sweep file, which is W&B's own YAML, and check all of it before anything starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import Any

from agent.config import TrialConfig, build_config
from agent.sweep import engine
from agent.sweep.macros import command_problems, shortened
from agent.sweep.parameters import flat_parameters, grid_size, trials_of, values_to_try
from diffusion_core.config import ConfigError, list_knobs, read_yaml, unknown_key
from diffusion_core.config.metrics import goal_of, goals
from diffusion_core.config.plugins import KEY, plugin_problems
from pruning.config import PruneConfig, methods, unheard

METHODS = ("grid", "random", "bayes")
EXPECTED = {"early_terminate": "type: hyperband, with min_iter:, or with max_iter: and s:"}
"""What a setting may be, if W&B's schema does not say it in words."""

MAX_NAME_BYTES = 200
"""Length of a sweep's name. A folder's name may have 255 bytes."""

DECIDE_FIGURES = ("eval.", "data.", "model.class_conditional", "preset")
"""Knobs that decide which figures a trial logs."""

MOST_COMBINATIONS = 1000
"""Number of combinations of these knobs to check."""

MAX_GRID = 100_000
"""Combinations of a grid. The engine lists all of them for every suggestion."""


class SweepError(ConfigError):
    """A sweep that cannot be run. The message has one line per problem."""


@dataclass(frozen=True)
class SweepFile:
    """A checked sweep.

    Attributes:
        name: the sweep's name, or the file's.
        config: the file's content, in W&B's format.
        parameters: the parameters, flat, by dotted key.
    """

    name: str
    config: dict[str, Any]
    parameters: dict[str, dict[str, Any]]

    @property
    def metric(self) -> str | None:
        """Name of the metric, or None."""
        return self.config.get("metric", {}).get("name")

    @property
    def maximize(self) -> bool:
        """Whether larger values of the metric are better."""
        return self.config.get("metric", {}).get("goal") == "maximize"

    @property
    def varied(self) -> list[str]:
        """The parameters that differ between trials."""
        return [
            key for key, spec in self.parameters.items() if len(spec.get("values", (0, 1))) > 1 and "value" not in spec
        ]

    @property
    def run_cap(self) -> int | None:
        """Largest number of trials, or None."""
        return self.config.get("run_cap")

    def grid_size(self) -> int | None:
        """Return the number of trials of a grid; None for other methods."""
        return grid_size(self.parameters) if self.config["method"] == "grid" else None

    @property
    def total(self) -> int | None:
        """Number of trials; None if the search has no end."""
        return min((cap for cap in (self.run_cap, self.grid_size()) if cap is not None), default=None)

    def renamed(self, name: str) -> SweepFile:
        """Return the same sweep with another name.

        Raises:
            SweepError: if a folder cannot have that name.
        """
        if problems := _name_problems(name):
            raise SweepError(*problems)
        return replace(self, name=name, config=self.config | {"name": name})

    def engine_config(self) -> dict[str, Any]:
        """Return the configuration for W&B's search engine: parameters flat, and no settings of the server."""
        known = ("method", "metric", "early_terminate")
        return {key: self.config[key] for key in known if key in self.config} | {"parameters": self.parameters}


def load_sweep(path: Path) -> SweepFile:
    """Read and check a sweep file.

    Every value of every parameter must make a valid configuration together with the first values of the other
    parameters. Of a distribution, its ends and a value between them are checked.

    Raises:
        SweepError: with all problems, one per line.
    """
    try:
        config = read_yaml(path)
    except ConfigError as error:
        raise SweepError(str(error).removeprefix("--config = ")) from None
    return check_sweep(config, str(path), path.stem)


def check_sweep(config: dict[str, Any], source: str, name: str) -> SweepFile:
    """Check the content of a sweep as :func:`load_sweep` does.

    Args:
        config: the content.
        source: where it comes from, for messages.
        name: the sweep's name if the content has none.

    Raises:
        SweepError: with all problems, one per line.
    """
    config = {key: value for key, value in config.items() if value is not None}  # An empty `metric:` is None.
    name = config.get("name", name)
    problems = _plugin_problems(config.get("parameters"))
    if not problems:  # Without a plugin, all that it adds is unknown.
        problems += _setting_problems(config) + _parameter_problems(config.get("parameters"), config.get("method"))
        problems += _name_problems(name) if isinstance(name, str) else []
    if not problems:
        problems += _unlogged_metric(config)
    if problems:
        raise SweepError("\n".join(f"{source}: {problem}" for problem in dict.fromkeys(problems)))
    return SweepFile(name, config, flat_parameters(config["parameters"]))


def _plugin_problems(parameters: Any) -> list[str]:
    """Import the plugins of all trials. Return what is wrong with the first one that cannot be imported."""
    spec = flat_parameters(parameters).get(KEY) if isinstance(parameters, Mapping) else None
    if spec is None or _form_problems(KEY, spec, None):  # Reported with the other parameters.
        return []
    return plugin_problems(values_to_try(spec))


def _name_problems(name: str) -> list[str]:
    if name and Path(name).name == name and name.isprintable() and len(name.encode()) <= MAX_NAME_BYTES:
        return []
    return [f"name = {shortened(name)}: expected a name that a folder can have"]


def _setting_problems(config: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with everything but the parameters."""
    problems: list[str] = []
    if config.get("method") not in METHODS:
        problems.append(f"method = {config.get('method')!r}: expected one of {', '.join(METHODS)}")
    problems += _metric_problems(config)
    run_cap = config.get("run_cap")
    if run_cap is not None and (not isinstance(run_cap, int) or isinstance(run_cap, bool) or run_cap < 1):
        problems.append(f"run_cap = {run_cap!r}: expected an integer >= 1")
    problems += command_problems(config.get("command"))
    checked = {"method", "metric", "run_cap", "command", "parameters"}
    for key, value in config.items():
        if key not in checked:
            problems += _violations(key, value, {key: value})
    return problems


def _metric_problems(config: Mapping[str, Any]) -> list[str]:
    metric = config.get("metric")
    example = "expected name: and goal:, such as {name: val/loss, goal: minimize}"
    if metric is None:
        needed_by = [f"method={config.get('method')}"] if config.get("method") == "bayes" else []
        needed_by += ["early_terminate"] if "early_terminate" in config else []
        return [f"metric = None: {example}; {' and '.join(needed_by)} cannot do without"] if needed_by else []
    if not isinstance(metric, Mapping):
        return [f"metric = {metric!r}: {example}"]
    name, goal = metric.get("name"), metric.get("goal", "minimize")
    if not isinstance(name, str) or goal_of(name) is None:
        return [f"metric.name = {name!r}: expected one of {', '.join(goals())}"]
    if goal != goal_of(name):
        return [f"metric.goal = {goal!r}: expected {goal_of(name)}, which is the better way for {name}"]
    return _violations("metric", metric, {"metric": metric})


def _unlogged_metric(config: Mapping[str, Any]) -> Iterator[str]:
    """Check that every trial logs the metric, whatever the sweep chooses for it."""
    metric = (config.get("metric") or {}).get("name")
    if metric is None:
        return
    values = {key: values_to_try(spec) for key, spec in flat_parameters(config["parameters"]).items()}
    deciding = [key for key, tried in values.items() if len(tried) > 1 and key.startswith(DECIDE_FIGURES)]
    first = {key: tried[0] for key, tried in values.items()}
    for combination in islice(product(*(values[key] for key in deciding)), MOST_COMBINATIONS):
        chosen = dict(zip(deciding, combination, strict=True))
        try:
            trial = build_config(first | chosen)
        except ConfigError:  # Such a trial fails before it starts.
            continue
        if not trial.logs(metric):
            where = " with " + ", ".join(f"{key}={value}" for key, value in chosen.items()) if chosen else ""
            yield (
                f"metric.name = {metric!r}: a trial{where} does not log it; expected one of "
                f"{', '.join(trial.logged_figures())}"
            )
            return


def _violations(key: str, value: Any, content: Mapping[str, Any]) -> list[str]:
    """Return what W&B's schema finds wrong in one setting or parameter, in one line."""
    found = engine.violations({"method": "random", "parameters": {"seed": {"value": 0}}} | dict(content))
    if not found:
        return []
    # Drop lines without information, such as "not valid under any of the given schemas".
    reasons = [" ".join(reason.removeprefix(f"{key}: ").split()) for reason in found]
    reasons = [
        reason for reason in reasons if not reason.endswith("schemas") and not reason.lower().startswith("invalid ")
    ]
    expected = EXPECTED.get(key, "value:, values:, or min: and max:, with a distribution: that W&B knows")
    return [f"{key} = {shortened(value)}: {'; '.join(dict.fromkeys(reasons)) or f'expected {expected}'}"]


def _parameter_problems(parameters: Any, method: Any) -> list[str]:
    """Return what is wrong with the parameters: their form, and the configurations that they make."""
    if not isinstance(parameters, Mapping) or not parameters:
        return [f"parameters = {shortened(parameters)}: expected a mapping from knobs such as train.lr to their values"]
    fields = dict(list_knobs(TrialConfig))
    tried: dict[str, list[Any]] = {}
    problems: list[str] = []
    for key, spec in flat_parameters(parameters).items():
        wrong = _form_problems(key, spec, method)
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
    return problems + _value_problems(tried)


def _form_problems(key: str, spec: Any, method: Any) -> list[str]:
    """Return what is wrong with the form of one parameter."""
    wrong = _violations(key, spec, {"parameters": {key: spec}})
    if wrong:
        return wrong
    ends = {type(spec[end]) for end in ("min", "max")} if {"min", "max"} <= spec.keys() else set()
    if len(ends) > 1 and "distribution" not in spec:
        wrong = [f"{key} = {shortened(spec)}: expected two integers or two numbers with a point, or a distribution:"]
    elif method == "bayes" and "probabilities" in spec:
        wrong = [f"{key} = {shortened(spec)}: expected values: without probabilities:, which method=bayes cannot use"]
    elif method == "grid" and trials_of(spec) is None:
        wrong = [f"{key} = {shortened(spec)}: expected value: or values:, which method=grid needs"]
    return wrong


def _value_problems(tried: Mapping[str, list[Any]]) -> list[str]:
    """Return what is wrong with the configurations that the values of the parameters make."""
    problems: list[str] = []
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
