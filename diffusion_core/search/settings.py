"""Check the settings of a sweep file, and the form of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusion_core.config.metrics import goal_of, goals
from diffusion_core.messages import shortened
from diffusion_core.search import engine
from diffusion_core.search.space import trials_of

METHODS = ("grid", "random", "bayes")
EXPONENTS = ("log_uniform", "inv_log_uniform", "q_log_uniform")
"""Distributions whose ends are exponents of e. W&B advises against them, and accepts them."""
EXPECTED = {"early_terminate": "type: hyperband, with min_iter: alone, or with max_iter: > eta and a whole number s:"}
"""What a setting may be, if W&B's schema does not say it in words."""


def setting_problems(config: Mapping[str, Any]) -> list[str]:
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
    return violations("metric", metric, {"metric": metric})


def form_problems(key: str, spec: Any, method: Any) -> list[str]:
    """Return what is wrong with the form of one parameter."""
    wrong = violations(key, spec, {"parameters": {key: spec}})
    if wrong:
        return wrong
    if method == "bayes" and "probabilities" in spec:
        return [f"{key} = {shortened(spec)}: expected values: without probabilities:, which method=bayes cannot use"]
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
