"""Measurements and their targets, as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HEADER = ("subject", "what", "ours", "peer", "measured", "target", "holds")


@dataclass(frozen=True)
class Row:
    """A measurement.

    Attributes:
        subject: name of the benchmark.
        what: the work, and the peer that it is compared with.
        value: the measured figure: a ratio (how many times better than the peer) or another figure; None if it could
            not be measured here.
        unit: unit of ``value``; ``times`` for a ratio.
        target: the bound that the value should meet, or None.
        at_least: the target is a lower bound; else an upper bound.
        ours: our figure, with its unit.
        peer: the peer's figure, with its unit.
        note: an explanation, such as why there is no value.
        details: all single figures, for JSON.
    """

    subject: str
    what: str
    value: float | None
    unit: str = "times"
    target: float | None = None
    at_least: bool = True
    ours: str = ""
    peer: str = ""
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool | None:
        """Whether the value meets the target; None without a target or a value."""
        if self.value is None or self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target

    def cells(self) -> tuple[str, ...]:
        """Return the row's cells, in the order of ``HEADER``."""
        value = "not measured" if self.value is None else f"{self.value:.3g} {self.unit}".strip()
        bound = "at least" if self.at_least else "at most"
        target = "-" if self.target is None else f"{bound} {self.target:g} {self.unit}".strip()
        holds = {True: "yes", False: "no", None: "-"}[self.holds]
        what = f"{self.what} ({self.note})" if self.note else self.what
        return self.subject, what, self.ours or "-", self.peer or "-", value, target, holds


def against_diffusers(
    subject: str, times: Mapping[str, float], precision: str, work: str, default_target: float, equal_target: float
) -> list[Row]:
    """Return rows with the speed relative to Diffusers in float32, by default and at equal precision.

    Args:
        subject: name of the benchmark.
        times: seconds of ``ours``, ``ours, fp32`` and ``diffusers, fp32``.
        precision: of ``ours``.
        work: what was done.
        default_target: how many times faster by default.
        equal_target: how many times at equal precision.
    """
    peer = times["diffusers, fp32"]
    return [
        Row(
            subject,
            f"{what}, {work}",
            peer / times[name],
            target=target,
            ours=seconds(times[name]),
            peer=seconds(peer),
            details=dict(times),
        )
        for what, name, target in (
            (f"by default ({precision})", "ours", default_target),
            ("in fp32", "ours, fp32", equal_target),
        )
    ]


def seconds(value: float) -> str:
    """Return a time as text: ``1.93 s``, ``8.4 ms``."""
    return f"{value:.3g} s" if value >= 1.0 else f"{1000.0 * value:.3g} ms"
