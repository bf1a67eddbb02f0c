"""What one fault has to do with, and what every kind of fault answers."""

from __future__ import annotations

import random
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from dispatcher.client import TaskStatus
from tests.chaos.member import Member
from tests.chaos.producer import Mix
from tests.chaos.world import LEASE, World

#: A stop that outlasts a lease, in leases: at least and at most.
BEYOND = (1.3, 2.0)


class NotInflicted(Exception):
    """The fault did not come about, and does not count."""


@dataclass
class Scene:
    """What one fault has to do with: the world, its own dice, and what it has hit so far."""

    world: World
    rng: random.Random
    mix: Mix
    #: The dispatcher it may hit, where it hits one.
    member: Member | None = None
    moment: float = 0.0
    mend_at: float = 0.0
    victim: str = ""
    #: What has not recovered yet, as it was when the fault came.
    held: dict[str, TaskStatus] = field(default_factory=dict)
    #: Every task that it hit.
    touched: set[str] = field(default_factory=set)
    adopted: int = 0
    probe: str = ""
    mended: threading.Event = field(default_factory=threading.Event)

    @property
    def hit(self) -> Member:
        """The dispatcher it hits."""
        assert self.member is not None
        return self.member

    def strikes(self, *, mend_after: float = 0.0, held: dict[str, TaskStatus] | None = None) -> None:
        """Now it happens."""
        self.moment = time.monotonic()
        self.mend_at = self.moment + mend_after
        self.held = held or {}
        self.touched |= set(self.held) or set(self.world.book.open())

    def beyond_the_lease(self) -> float:
        """Seconds longer than a lease."""
        return LEASE * self.rng.uniform(*BEYOND)


class Fault(ABC):
    """One kind of fault. ``inflict`` calls ``scene.strikes`` in the moment it happens."""

    #: What it needs for itself: ``member`` (one of the dispatchers), ``extra`` (a further one
    #: that is made to fail), ``redis`` or ``tasks``.
    needs: str
    name: str

    @abstractmethod
    def inflict(self, scene: Scene) -> None:
        """Do it. Raises NotInflicted."""

    def may_mend(self, scene: Scene) -> bool:
        """Whether it has lasted long enough."""
        return time.monotonic() >= scene.mend_at

    def mend(self, scene: Scene) -> None:  # noqa: B027 - some mend themselves
        """Take it back, as far as somebody would: restart, continue."""

    @abstractmethod
    def recovered(self, scene: Scene) -> bool:
        """Whether nothing of what it hit is without care. Raises what ``AWAY`` names."""

    def clear(self, scene: Scene) -> None:  # noqa: B027 - most need nothing
        """After the recovery: what the fault alone had needed."""
