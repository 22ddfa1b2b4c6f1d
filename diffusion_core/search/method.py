"""What a search method (``method:`` of a sweep file) is to the rest of the code: a record of ``SEARCHES``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from diffusion_core.search.objectives import Objective


@dataclass(frozen=True)
class SearchRequest:
    """What to search.

    Attributes:
        config: the sweep's configuration for W&B's engine: method, metric, parameters (flat).
        objectives: the figures to make better.
        folder: the sweep's folder, where a search may keep its state; None: it is only asked for a preview.
        total: number of trials; None: without end.
    """

    config: Mapping[str, Any]
    objectives: Sequence[Objective] = ()
    folder: Path | None = None
    total: int | None = None


class Search(Protocol):
    """Suggests one trial after another. The n-th suggestion depends only on the sweep and on the trials before it."""

    def suggest(self, past: Sequence[Mapping[str, Any]], runs: Callable[[], Sequence[Any]]) -> dict[str, Any] | None:
        """Return the parameters of the next trial, or None when the search is exhausted.

        Args:
            past: the parameters of all trials so far, in their order.
            runs: returns these trials as :func:`~diffusion_core.search.engine.past_run` does; called only if the search
                needs more of them.
        """


@dataclass(frozen=True)
class SearchMethod:
    """A value of ``method:``.

    Attributes:
        make: returns the search of a sweep.
        help: one line: how it chooses, and its source.
        learns: whether it learns from what trials measured, so that it needs objectives.
        several: whether it can learn from several objectives. A method that does not learn accepts any number.
        on_server: whether W&B's server has it.
        package: the optional package that it needs, which is also the name of the extra; None: none.
    """

    make: Callable[[SearchRequest], Search]
    help: str
    learns: bool = False
    several: bool = False
    on_server: bool = False
    package: str | None = None
