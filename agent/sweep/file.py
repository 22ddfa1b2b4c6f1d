"""Read a sweep file, which is W&B's own YAML, and check all of it before anything starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import Any

from agent.config import TrialConfig, build_config
from agent.sweep import engine
from agent.sweep.macros import TrialCommand, read_command
from agent.sweep.parameters import flat_parameters, grid_size, trials_of, values_to_try, with_numbers
from diffusion_core.config import ConfigError, flatten, list_knobs, read_yaml, unknown_key
from diffusion_core.config.metrics import goal_of, goals
from diffusion_core.config.plugins import KEY, plugin_problems
from diffusion_core.config.steps import without_effect
from diffusion_core.messages import shortened
from pruning.config import methods, unheard

METHODS = ("grid", "random", "bayes")
EXPECTED = {"early_terminate": "type: hyperband, with min_iter: alone, or with max_iter: > eta and a whole number s:"}
"""What a setting may be, if W&B's schema does not say it in words."""

EXPONENTS = ("log_uniform", "inv_log_uniform", "q_log_uniform")
"""Distributions whose ends are exponents of e. W&B advises against them, and accepts them."""

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
        command: what a trial reads besides them.
    """

    name: str
    config: dict[str, Any]
    parameters: dict[str, dict[str, Any]]
    command: TrialCommand

    def trial(self, chosen: Mapping[str, Any]) -> TrialConfig:
        """Return the configuration of a trial for which the search chose these values.

        Raises:
            ConfigError: if they do not make one.
        """
        return build_config(*self.command.values(chosen))

    def trials(self, *varied: str) -> Iterator[tuple[dict[str, Any], TrialConfig]]:
        """Yield the values and the configurations of trials in which parameters that begin so have all their values.

        The others have their first. At most ``MOST_COMBINATIONS`` are tried. Those that are no configuration are left
        out: such a trial fails before it starts.
        """
        values = {key: values_to_try(spec) for key, spec in self.parameters.items()}
        first = {key: tried[0] for key, tried in values.items()}
        keys = [key for key, tried in values.items() if len(tried) > 1 and key.startswith(varied)]
        for combination in islice(product(*(values[key] for key in keys)), MOST_COMBINATIONS):
            chosen = dict(zip(keys, combination, strict=True))
            with suppress(ConfigError):
                yield chosen, self.trial(first | chosen)

    @property
    def metric(self) -> str | None:
        """Name of the metric, or None."""
        return self.config.get("metric", {}).get("name")

    @property
    def maximize(self) -> bool:
        """Whether larger values of the metric are better."""
        return self.config.get("metric", {}).get("goal") == "maximize"

    @property
    def target(self) -> float | None:
        """Value of the metric at which no further trials begin, or None."""
        return self.config.get("metric", {}).get("target")

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
    problems: list[str] = []
    command = TrialCommand()
    try:
        command = read_command(config.get("command"), config.get("program"))
    except ConfigError as error:
        problems += error.problems
    given = config.get("parameters")
    fields = dict(list_knobs(TrialConfig))
    flat = flat_parameters(given) if isinstance(given, Mapping) else {}
    sweep = SweepFile(name, config, {key: with_numbers(spec, fields.get(key)) for key, spec in flat.items()}, command)
    unloaded = _plugin_problems(sweep)
    problems += unloaded
    if not unloaded:  # Without a plugin, all that it adds is unknown.
        problems += [*_setting_problems(config), *_parameter_problems(sweep)]
        problems += _name_problems(name) if isinstance(name, str) else []
    if not problems:
        problems += _unlogged_metric(sweep)
    if problems:
        raise SweepError("\n".join(f"{source}: {problem}" for problem in dict.fromkeys(problems)))
    return sweep


def _plugin_problems(sweep: SweepFile) -> list[str]:
    """Import the plugins of all trials. Return what is wrong with the first one that cannot be imported."""
    named = [layer[KEY] for layer in sweep.command.layers if layer is not None and KEY in layer]
    spec = sweep.parameters.get(KEY)
    if spec is not None and not _form_problems(KEY, spec, None):  # Else reported with the other parameters.
        named += values_to_try(spec)
    return plugin_problems(named)


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
    checked = {"method", "metric", "run_cap", "command", "parameters", "early_terminate"}
    for key, value in config.items():
        if key not in checked:
            problems += _violations(key, value, {key: value})
    return problems + _early_problems(config.get("early_terminate"))


def _early_problems(early: Any) -> list[str]:
    if early is None:
        return []
    if isinstance(early, Mapping) and isinstance(early.get("strict"), bool):  # Newer than the engine's schema.
        early = {key: value for key, value in early.items() if key != "strict"}
    problems = _violations("early_terminate", early, {"early_terminate": early})
    if not problems:
        try:
            engine.bands(early)
        except ValueError:
            problems = [f"early_terminate = {shortened(early)}: expected {EXPECTED['early_terminate']}"]
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


def _unlogged_metric(sweep: SweepFile) -> Iterator[str]:
    """Check that every trial logs the metric, whatever the sweep chooses for it."""
    metric = sweep.metric
    for chosen, trial in sweep.trials(*DECIDE_FIGURES) if metric else ():
        if not trial.logs(str(metric)):
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


def _parameter_problems(sweep: SweepFile) -> list[str]:
    """Return what is wrong with the parameters: their form, and the configurations that they make."""
    given, method = sweep.config.get("parameters"), sweep.config.get("method")
    if not isinstance(given, Mapping) or not given:
        return [f"parameters = {shortened(given)}: expected a mapping from knobs such as train.lr to their values"]
    fields = dict(list_knobs(TrialConfig))
    right: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for key, spec in sweep.parameters.items():
        wrong = _form_problems(key, spec, method)
        known = key.partition(".")[0] in TrialConfig.model_fields
        if not known or ("." in key and key not in fields):
            wrong = [unknown_key(key, spec, fields)]
        problems += wrong
        if not wrong:
            right[key] = spec
    if method == "grid" and grid_size(right) > MAX_GRID:
        problems.append(f"parameters: {grid_size(right):,} combinations; expected at most {MAX_GRID:,} for method=grid")
    if method == "bayes" and not problems and all("value" in spec for spec in right.values()):
        problems.append("parameters: expected one that varies, for method=bayes to search")
    return problems + _value_problems(replace(sweep, parameters=right))


def _form_problems(key: str, spec: Any, method: Any) -> list[str]:
    """Return what is wrong with the form of one parameter."""
    wrong = _violations(key, spec, {"parameters": {key: spec}})
    if wrong:
        return wrong
    if method == "bayes" and "probabilities" in spec:
        return [f"{key} = {shortened(spec)}: expected values: without probabilities:, which method=bayes cannot use"]
    if method == "grid" and trials_of(spec) is None:
        return [f"{key} = {shortened(spec)}: expected value: or values:, which method=grid needs"]
    return []


def _value_problems(sweep: SweepFile) -> list[str]:
    """Return what is wrong with the configurations that the values of the parameters make."""
    problems: list[str] = []
    tried = {key: values_to_try(spec) for key, spec in sweep.parameters.items()}
    first = {key: values[0] for key, values in tried.items()}
    named = [name for name in map(str, tried.get("prune.method", [])) if name in methods()]
    for key, values in tried.items():
        for value in values:
            chosen = first | {key: value}
            try:
                config = sweep.trial(chosen)
                problems += _lost_values(sweep.command, chosen, config)
            except ConfigError as error:
                problems += [problem + _about_exponents(sweep, problem) for problem in error.problems]
            else:
                problems += unheard(config.prune, named or [config.prune.method])
                problems += without_effect(config.steps, [str(name) for name in tried.get("steps.method", [])])
    return problems


def _about_exponents(sweep: SweepFile, problem: str) -> str:
    exponents = sweep.parameters.get(problem.partition(" = ")[0], {}).get("distribution") in EXPONENTS
    return "; min and max are exponents of e: log_uniform_values takes the values" if exponents else ""


def _lost_values(command: TrialCommand, chosen: Mapping[str, Any], config: TrialConfig) -> Iterator[str]:
    """Yield one line if a value that the sweep chose for a trial is another one in the trial's configuration."""
    if command.passes_all:
        return
    wanted, got = flatten(build_config(*command.values(chosen), chosen)), flatten(config)
    for key, value in wanted.items():
        if value != got[key] and (key in chosen or key.partition(".")[0] in chosen):
            if value is False:
                yield f"{key} = False: the command leaves out false values, and {got[key]} is used; use ${{args}}"
            else:
                yield f"command = '{key}={got[key]}': overrides what the sweep chooses; put it before the parameters"
            return
