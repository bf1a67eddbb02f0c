"""What an instance's entry in ``instances`` tells of the pulls that its tasks wait for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class PullStatus:
    """Where the pull is that a task waits for, as its instance told it about a second ago.

    Of bytes and layers any number may be unknown (0).
    """

    registry: str
    #: Whether it is under way.
    active: bool
    #: Pulls that go before it; 0 if it is under way, or comes next.
    position: int
    bytes_done: int = 0
    bytes_total: int = 0
    layers_done: int = 0
    layers_total: int = 0
    #: Seconds until its registry is asked again, if that is left alone for now.
    cooling_seconds: float | None = None


def pulls_of(info: Mapping[str, Any]) -> dict[str, PullStatus]:
    """The pulls of one instance's entry, by image. An older instance may tell less of them.

    A pull whose registry is left alone goes before those of the same registry only.
    """
    cooling = info.get("cooling", {})
    found: dict[str, PullStatus] = {}
    before: list[str] = []
    for pull in info.get("pulls", []):
        registry, active = pull.get("registry", ""), bool(pull.get("active", True))
        position = sum(1 for other in before if other == registry or other not in cooling)
        found[pull["image"]] = PullStatus(
            registry=registry,
            active=active,
            position=0 if active else position,
            **{name: pull.get(name, 0) for name in _NUMBERS},
            cooling_seconds=None if active else cooling.get(registry),
        )
        before.append(registry)
    return found


_NUMBERS = ("bytes_done", "bytes_total", "layers_done", "layers_total")
