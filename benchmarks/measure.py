"""What a measure is, and what it finds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, TypeVar

from benchmarks.ground import Ground


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the table."""

    #: What was measured.
    what: str
    #: How much of it: batch sizes, orders, rates.
    batch: str
    #: A figure of each round.
    ours_rounds: Sequence[float]
    #: What it is compared with, in the same unit, and that in words.
    floor_rounds: Sequence[float] = ()
    against: str = ""
    unit: str = "s"
    goal: float
    #: Whether the goal is about the ratio of the two, or about our own figure.
    judged: Literal["ratio", "ours"] = "ratio"
    #: Whether the goal is the most or the least that is meant to be seen.
    bound: Literal["most", "least"] = "most"

    @property
    def ours(self) -> float:
        """The median of the rounds."""
        return median(self.ours_rounds)

    @property
    def floor(self) -> float | None:
        """The median of its rounds, if there is one."""
        return median(self.floor_rounds) if self.floor_rounds else None

    @property
    def ratio(self) -> float | None:
        """Ours as a multiple of the floor: the median of the rounds, whose halves are of one moment."""
        pairs = zip(self.ours_rounds, self.floor_rounds, strict=True) if self.floor_rounds else ()
        ratios = [ours / floor for ours, floor in pairs]
        return median(ratios) if ratios else None

    @property
    def met(self) -> bool:
        """Whether the goal was reached."""
        value = self.ours if self.judged == "ours" else self.ratio
        if value is None:
            return False
        return value <= self.goal if self.bound == "most" else value >= self.goal


M = TypeVar("M", bound=Callable[..., Iterator[Finding]])
#: By name, in the order they are run.
MEASURES: dict[str, Callable[[Ground], Iterator[Finding]]] = {}


def measure(function: M) -> M:
    """Let ``python -m benchmarks`` run it, under its name. It is given the ground it works on."""
    MEASURES[function.__name__] = function
    return function


def percentile(values: Sequence[float], part: float) -> float:
    """The least of ``values`` that ``part`` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]
