"""Check the settings of a sweep file, and the form of its parameters."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from typing import Any

from diffusion_core.config.metrics import COSTS, goal_of, goals
from diffusion_core.messages import shortened
from diffusion_core.registries import SEARCHES
from diffusion_core.search import engine
from diffusion_core.search.method import SearchMethod
from diffusion_core.search.objectives import objective_goal
from diffusion_core.search.space import trials_of

EXPONENTS = ("log_uniform", "inv_log_uniform", "q_log_uniform")
"""Distributions whose ends are exponents of e. W&B advises against them, and accepts them."""
EXPECTED = {"early_terminate": "type: hyperband, with min_iter: alone, or with max_iter: > eta and a whole number s:"}
"""What a setting may be, if W&B's schema does not say it in words."""


def setting_problems(config: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with everything but the parameters."""
    problems: list[str] = []
    method = method_of(config.get("method"))
    if method is None:
        problems.append(f"method = {config.get('method')!r}: expected one of {', '.join(SEARCHES)}")
    elif method.package is not None and importlib.util.find_spec(method.package) is None:
        needed = f'needs {method.package}: pip install "diffusion-sweeps[{method.package}]"'
        problems.append(f"method = {config['method']!r}: {needed}")
    problems += _metric_problems(config) if config.get("metrics") is None else _objective_problems(config, method)
    run_cap = config.get("run_cap")
    if run_cap is not None and (not isinstance(run_cap, int) or isinstance(run_cap, bool) or run_cap < 1):
        problems.append(f"run_cap = {run_cap!r}: expected an integer >= 1")
    checked = {"method", "metric", "metrics", "run_cap", "command", "parameters", "early_terminate"}
    for key, value in config.items():
        if key not in checked:
            problems += violations(key, value, {key: value})
    return problems + _early_problems(config.get("early_terminate"))


def _early_problems(early: Any) -> list[str]:
    if early is None:
        return []
    if isinstance(early, Mapping) and isinstance(early.get("strict"), bool):  # Newer than the engine's schema.
        early = {key: value for key, value in early.items() if key != "strict"}
    problems = violations("early_terminate", early, {"early_terminate": early})
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
        method = method_of(config.get("method"))
        needed_by = [f"method={config.get('method')}"] if method is not None and method.learns else []
        needed_by += ["early_terminate"] if "early_terminate" in config else []
        return [f"metric = None: {example}; {' and '.join(needed_by)} cannot do without"] if needed_by else []
    if not isinstance(metric, Mapping):
        return [f"metric = {metric!r}: {example}"]
    name, goal = metric.get("name"), metric.get("goal", "minimize")
    if not isinstance(name, str) or goal_of(name) is None:
        return [f"metric.name = {name!r}: expected one of {', '.join(goals())}"]
    if goal != goal_of(name):
        return [f"metric.goal = {goal!r}: expected {goal_of(name)}, which is the better way for {name}"]
    return violations("metric", metric, {"metric": metric})


def _objective_problems(config: Mapping[str, Any], method: SearchMethod | None) -> list[str]:
    """Return what is wrong with ``metrics:``, the objectives of a sweep."""
    given = config["metrics"]
    if config.get("metric") is not None:
        return ["metric, metrics: expected one of them; metrics: lists several objectives"]
    example = "[{name: eval/class_agreement, goal: maximize}, {name: sample/macs, goal: minimize}]"
    if not isinstance(given, list) or len(given) < 2 or not all(isinstance(each, Mapping) for each in given):
        return [f"metrics = {shortened(given)}: expected a list of two or more, such as {example}; one is a metric:"]
    problems = [problem for place, each in enumerate(given) for problem in _one_objective(f"metrics[{place}]", each)]
    names = [each.get("name") for each in given]
    problems += [f"metrics = {name!r}: is there twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if method is not None and method.learns and not method.several:
        able = ", ".join(name for name, other in SEARCHES.items() if other.several or not other.learns)
        problems.append(f"method = {config['method']!r}: learns from one metric; with metrics: expected one of {able}")
    if "early_terminate" in config and not problems and all(name in COSTS for name in names):
        problems.append("early_terminate: no objective is known while a trial runs; drop it")
    return problems


def _one_objective(key: str, given: Mapping[str, Any]) -> list[str]:
    name, goal, limit = given.get("name"), given.get("goal"), given.get("limit")
    better = objective_goal(name) if isinstance(name, str) else None
    if better is None:
        return [f"{key}.name = {name!r}: expected one of {', '.join([*goals(), *COSTS])}"]
    if goal != better:
        return [f"{key}.goal = {goal!r}: expected {better}, which is the better way for {name}"]
    numbers = isinstance(limit, int | float) and not isinstance(limit, bool)
    if limit is not None and not (numbers and math.isfinite(limit)):
        return [f"{key}.limit = {limit!r}: expected a number, the worst {name} that is of use"]
    unknown = [word for word in given if word not in ("name", "goal", "limit")]
    return [f"{key}.{unknown[0]} = {shortened(given[unknown[0]])}: expected name:, goal: or limit:"] if unknown else []


def method_of(name: Any) -> SearchMethod | None:
    """Return the search method of a name, or None if there is none."""
    return SEARCHES[name] if isinstance(name, str) and name in SEARCHES else None


def form_problems(key: str, spec: Any, method: Any) -> list[str]:
    """Return what is wrong with the form of one parameter."""
    wrong = violations(key, spec, {"parameters": {key: spec}})
    if wrong:
        return wrong
    record = method_of(method)
    if record is not None and record.learns and "probabilities" in spec:
        return [f"{key} = {shortened(spec)}: expected values: without probabilities:, which method={method} cannot use"]
    if method == "grid" and trials_of(spec) is None:
        return [f"{key} = {shortened(spec)}: expected value: or values:, which method=grid needs"]
    return []


def violations(key: str, value: Any, content: Mapping[str, Any]) -> list[str]:
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
