"""Deals faults to a world, several at a time, and writes down what became of each."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from tests.chaos.member import Member
from tests.chaos.producer import Mix
from tests.chaos.scene import Fault, NotInflicted, Scene
from tests.chaos.world import AWAY, World

#: Faults under way at once: more would leave no dispatcher to recover anything.
WIDTH = 4
#: Seconds between looks at one that is under way.
LOOK = 0.05
#: Seconds after which a fault counts as one that nothing recovered from.
RECOVERY_TIMEOUT = 90.0


@dataclass(frozen=True)
class Mark:
    """One fault that came about."""

    fault: str
    #: Seconds until it had recovered; None if it had not when patience was over.
    seconds: float | None
    #: Tasks it hit, how many of them were running and went on under another owner.
    touched: frozenset[str]
    adopted: int


@dataclass
class Storm:
    """Faults from a shuffled deck, each in a thread of its own while its resource is free.

    ``members`` are those that may be hit; the others only suffer what hits Redis.
    """

    world: World
    seed: str
    mix: Mix
    deck: Sequence[Fault]
    members: Sequence[Member]
    #: Seconds between the beginnings of two faults, on average.
    pace: float
    marks: list[Mark] = field(default_factory=list)
    #: Faults that did not come about, and why.
    missed: list[str] = field(default_factory=list)
    #: Mistakes of this suite's own, which make a slice worthless.
    broken: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._dealt = 0
        self._pile: list[Fault] = []
        self._free = [*self.members]
        self._redis_free = True
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._journal = self.world.home / "storm.log"

    def rage(self, *, seconds: float, most: int | None = None) -> None:
        """Deal faults for ``seconds``, or ``most`` of them; return when the last has recovered."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and (most is None or self._dealt < most) and not self.broken:
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            if len(self._threads) < WIDTH:
                self._deal()
            time.sleep(self.pace * self._rng.uniform(0.5, 1.5))
        for thread in self._threads:
            thread.join()

    def _deal(self) -> None:
        if not self._pile:
            self._pile = self._rng.sample(self.deck, len(self.deck))
        # The first for which there is something to hit; the others wait for their turn.
        for index, fault in enumerate(self._pile):
            scene = Scene(self.world, random.Random(f"{self.seed}/{self._dealt}"), self.mix)
            if self._claim(fault, scene):
                del self._pile[index]
                self._dealt += 1
                thread = threading.Thread(target=self._play, args=(fault, scene), name=fault.name)
                self._threads.append(thread)
                thread.start()
                return

    def _claim(self, fault: Fault, scene: Scene) -> bool:
        with self._lock:
            if fault.needs == "redis":
                free, self._redis_free = self._redis_free, False
                return free
            if fault.needs == "member":
                # One that is being restarted is no use to a fault yet.
                ready = [m for m in self._free if m.owns and "instance.started" in m.stderr]
                if not ready:
                    return False
                scene.member = self._rng.choice(ready)
                self._free.remove(scene.member)
            return True

    def _release(self, fault: Fault, scene: Scene) -> None:
        with self._lock:
            if fault.needs == "redis":
                self._redis_free = True
            elif fault.needs == "member" and scene.member is not None:
                self._free.append(scene.member)

    def _play(self, fault: Fault, scene: Scene) -> None:
        try:
            fault.inflict(scene)
            self._note(f"{fault.name}: {scene.victim} held {sorted(scene.held)}")
            seconds = self._watch(fault, scene)
            self._note(f"{fault.name}: {scene.victim} recovered in {seconds} s; probe {scene.probe}")
            self.marks.append(Mark(fault.name, seconds, frozenset(scene.touched), scene.adopted))
            fault.clear(scene)
        except (NotInflicted, *AWAY) as error:
            self.missed.append(f"{fault.name}: {error}")
            with contextlib.suppress(*AWAY, AssertionError):
                fault.clear(scene)
        except Exception as error:
            self.broken.append(f"{fault.name}: {error!r}")
        finally:
            self._release(fault, scene)

    def _note(self, what: str) -> None:
        """For whoever looks into a slice: when what was done, beside the dispatchers' own logs."""
        with self._lock, self._journal.open("a") as journal:
            journal.write(f"{datetime.now(UTC).isoformat(timespec='milliseconds')} {what}\n")

    def _watch(self, fault: Fault, scene: Scene) -> float | None:
        """Seconds until it has recovered. It is mended beside that, in its own time: a look at a
        Redis that does not answer takes long."""
        mender = threading.Thread(target=self._mend, args=(fault, scene), name=f"mend {fault.name}")
        mender.start()
        seconds: float | None = None
        while seconds is None and time.monotonic() - scene.moment < RECOVERY_TIMEOUT:
            with contextlib.suppress(*AWAY):
                if fault.recovered(scene):
                    seconds = time.monotonic() - scene.moment
            time.sleep(LOOK)
        mender.join()
        return seconds

    def _mend(self, fault: Fault, scene: Scene) -> None:
        while not fault.may_mend(scene) and time.monotonic() - scene.moment < RECOVERY_TIMEOUT:
            time.sleep(LOOK)
        try:
            fault.mend(scene)
        except Exception as error:
            self.broken.append(f"{fault.name}, mending: {error!r}")
        scene.mended.set()
        self._note(f"{fault.name}: {scene.victim} mended")
