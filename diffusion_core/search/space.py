"""The parameters of a W&B sweep: flatten them, count the trials of a grid, and list values of knobs to check."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic.fields import FieldInfo

from diffusion_core.config.parsing import as_number
from diffusion_core.messages import shortened

LARGEST_EXPONENT = 700.0
"""A distribution over exponents of e reaches no further: a float would overflow."""

SPREAD = 3.0
"""Standard deviations from its mean at which a normal distribution is checked."""


def flat_parameters(parameters: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return nested parameters (``train: {parameters: {lr: ...}}``) by dotted key."""
    return dict(_flat(parameters))


def _flat(parameters: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, spec in parameters.items():
        if isinstance(spec, Mapping) and isinstance(spec.get("parameters"), Mapping):
            yield from _flat(spec["parameters"], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", spec


def given_twice(parameters: Mapping[str, Any]) -> list[str]:
    """Return one line for each parameter that is there by its dotted key and in its section, where only one counts.

    The section is a group (``train: {parameters: {lr: ...}}``) or has mappings as values (``train: {value: {lr: 1}}``).
    """
    found: dict[str, list[Any]] = {}
    for key, spec in _flat(parameters):
        values = [spec.get("value"), *_listed(spec.get("values"))] if isinstance(spec, Mapping) else []
        inside = {str(name) for value in values if isinstance(value, Mapping) for name in value}
        for full in (key, *sorted(f"{key}.{name}" for name in inside)):
            found.setdefault(full, []).append(spec)
    return [
        f"{key} = {' and '.join(map(shortened, specs))}: given twice, by its dotted key and in its section; remove one"
        for key, specs in found.items()
        if len(specs) > 1
    ]


def _listed(values: Any) -> list[Any]:
    return values if isinstance(values, list) else []


def with_numbers(spec: Any, field: FieldInfo | None) -> Any:
    """Return a parameter with numbers in place of text such as 1e-5, which YAML takes for text, if the knob is one."""
    if field is None or not isinstance(spec, Mapping):
        return spec

    def number(value: Any) -> Any:
        return [as_number(entry, field) for entry in value] if isinstance(value, list) else as_number(value, field)

    return {word: value if word == "distribution" else number(value) for word, value in spec.items()}


def grid_size(parameters: Mapping[str, Mapping[str, Any]]) -> int:
    """Return the number of combinations of a grid's parameters."""
    return math.prod(trials_of(spec) or 1 for spec in parameters.values())


def trials_of(spec: Mapping[str, Any]) -> int | None:
    """Return the number of values that a grid tries of a parameter; None if a grid cannot use it."""
    if "value" in spec:
        return 1
    if "values" in spec:
        return None if "probabilities" in spec else len({repr(value) for value in spec["values"]})
    if is_whole(spec):
        return spec["max"] - spec["min"] + 1
    return (
        math.ceil((spec["max"] - spec["min"]) / spec.get("q", 1.0)) if spec.get("distribution") == "q_uniform" else None
    )


def choices(spec: Mapping[str, Any]) -> float:
    """Return the number of values that a random search can draw of a parameter."""
    if "values" in spec:
        return len({repr(value) for value in spec["values"]})
    if "min" in spec and spec.get("distribution", "").startswith("q_"):
        low, *_, high = values_to_try(spec)
        return 1 + round((high - low) / spec.get("q", 1.0))
    return float(trials_of(spec) or math.inf)


def is_whole(spec: Mapping[str, Any]) -> bool:
    """Return whether a distribution draws integers: ``int_uniform``, the default for integer ends."""
    ends = spec.get("min"), spec.get("max")
    return spec.get("distribution", "int_uniform") == "int_uniform" and all(isinstance(end, int) for end in ends)


def values_to_try(spec: Mapping[str, Any]) -> list[Any]:
    """Return the values of a parameter; of a distribution, its ends and one between them."""
    if "value" in spec:
        return [spec["value"]]
    if "values" in spec:
        return list(spec["values"])
    kind = spec.get("distribution", "uniform")
    if "normal" in kind:
        mu, spread = spec.get("mu", 0.0), SPREAD * spec.get("sigma", 1.0)
        ends = [mu - spread, mu, mu + spread]
        ends = [_exp(end) for end in ends] if "log" in kind else ends
    elif "beta" in kind:
        ends = [0.0, 0.5, 1.0]
    else:
        low, high = spec["min"], spec["max"]
        if kind in ("log_uniform", "q_log_uniform"):
            low, high = _exp(low), _exp(high)
        elif kind == "inv_log_uniform":
            low, high = _exp(-high), _exp(-low)
        ends = [low, (low + high) // 2 if is_whole(spec) else 0.382 * low + 0.618 * high, high]
    if kind.startswith("q_"):
        quantum = spec.get("q", 1.0)
        ends = [round(end / quantum) * quantum for end in ends]
    return ends


def _exp(exponent: float) -> float:
    return math.exp(min(exponent, LARGEST_EXPONENT))
