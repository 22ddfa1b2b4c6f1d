"""The query language of the public API: Mongo-like filters and order keys, and the flat names that they use."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": lambda a, b: a == b,
    "$ne": lambda a, b: a != b,
    "$gt": lambda a, b: a is not None and a > b,
    "$gte": lambda a, b: a is not None and a >= b,
    "$lt": lambda a, b: a is not None and a < b,
    "$lte": lambda a, b: a is not None and a <= b,
    "$in": lambda a, b: any(x in b for x in a) if isinstance(a, list) else a in b,
    "$nin": lambda a, b: not any(x in b for x in a) if isinstance(a, list) else a not in b,
    "$exists": lambda a, b: (a is not None) == b,
    "$regex": lambda a, b: a is not None and re.search(b, str(a)) is not None,
}


def matches(item: _T, get: Callable[[_T, str], Any], query: dict[str, Any]) -> bool:
    """Whether `item`, read through `get(item, key)`, satisfies a filter."""
    for key, condition in query.items():
        if key == "$and":
            holds = all(matches(item, get, part) for part in condition)
        elif key == "$or":
            holds = any(matches(item, get, part) for part in condition)
        elif key == "$nor":
            holds = not any(matches(item, get, part) for part in condition)
        elif key == "$not":
            holds = not matches(item, get, condition)
        else:
            holds = _holds(get(item, key), condition)
        if not holds:
            return False
    return True


def _holds(value: Any, condition: Any) -> bool:
    if not isinstance(condition, dict) or not any(key.startswith("$") for key in condition):
        return condition in value if isinstance(value, list) and not isinstance(condition, list) else value == condition
    for operator, operand in condition.items():
        if operator == "$not":
            if _holds(value, operand):
                return False
            continue
        try:
            if not _COMPARE[operator](value, operand):
                return False
        except TypeError:  # an order between different types: nothing is found
            return False
    return True


def order_by(items: list[_T], get: Callable[[_T, str], Any], order: str | None) -> list[_T]:
    """`items` by an order key such as `-summary_metrics.loss`; those without a comparable value come last."""
    if not order:
        return list(items)
    key = order.lstrip("+-")
    comparable = [item for item in items if isinstance(get(item, key), (int, float, str))]
    rest = [item for item in items if not isinstance(get(item, key), (int, float, str))]
    numbers_first = sorted(
        comparable,
        key=lambda item: (isinstance(get(item, key), str), get(item, key)),
        reverse=order.startswith("-"),
    )
    return numbers_first + rest


def flatten(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted keys; media objects (with a `_type`) stay whole."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict) and "_type" not in value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def flatten_summary(summary: dict[str, Any], goal: str = "minimize") -> dict[str, Any]:
    """A summary with one value a metric: `define_metric(summary="min")` nests it as `{"loss": {"min": 1}}`."""
    preferred = ["min", "max"] if goal == "minimize" else ["max", "min"]
    flat: dict[str, Any] = {}
    for key, value in summary.items():
        if isinstance(value, dict) and value and set(value) <= {"min", "max", "mean", "last", "best"}:
            flat[key] = next(value[name] for name in [*preferred, "best", "mean", "last"] if name in value)
        elif isinstance(value, dict) and "_type" not in value:
            flat.update({f"{key}.{name}": inner for name, inner in flatten_summary(value, goal).items()})
        else:
            flat[key] = value
    return flat
