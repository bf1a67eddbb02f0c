"""One slice of the long form: a world, its producers and its storm, from the seed to the judgement."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.checker import Findings, check
from tests.chaos.faults import catalogue
from tests.chaos.ground import Ground
from tests.chaos.producer import Mix, Producer
from tests.chaos.scene import Fault
from tests.chaos.storm import Mark, Storm
from tests.chaos.vitals import Range, Vitals
from tests.chaos.world import World

#: The dispatchers of a slice. The first is never killed: its memory is measured.
NAMES = ("a", "b", "c")


@dataclass(frozen=True)
class Parameters:
    """What a slice is made of."""

    seed: int
    #: Seconds of faults; what comes before and after is not counted.
    seconds: float
    #: Tasks kept open, and seconds between two faults.
    backlog: int
    pace: float
    #: Faults at most.
    faults: int | None = None


@dataclass(frozen=True)
class Slice:
    """What came of it."""

    parameters: Parameters
    backend: str
    #: Seconds from the first task to the last result.
    seconds: float
    accepted: int
    maybe: int
    results: int
    cancelled: int
    starts: int
    marks: tuple[Mark, ...]
    missed: tuple[str, ...]
    #: Of the suite itself.
    broken: tuple[str, ...]
    findings: Findings
    #: Events that dispatchers logged as warning or worse, with how often.
    complaints: dict[str, int]
    rss_kb: Range | None
    descriptors: Range | None

    @property
    def unrecovered(self) -> list[str]:
        """Faults that nothing recovered from in time."""
        return [mark.fault for mark in self.marks if mark.seconds is None]

    @property
    def problems(self) -> dict[str, object]:
        """What makes this slice a failure, by name; empty if all is well."""
        found: dict[str, object] = {**self.findings.broken()}
        if self.unrecovered:
            found["unrecovered"] = self.unrecovered
        if self.broken:
            found["suite"] = self.broken
        return found


def play(ground: Ground, home: Path, parameters: Parameters, *, deck: list[Fault] | None = None) -> Slice:
    """Let a world live through a storm, and judge it."""
    rng = random.Random(f"tasks {parameters.seed}")
    with World(home, ground) as world:
        members = [world.member(name, wait=False) for name in NAMES]
        for member in members:
            member.wait_started()
        storm = Storm(
            world,
            f"faults {parameters.seed}",
            Mix(world, random.Random(f"probes {parameters.seed}")),
            deck if deck is not None else catalogue(ground.points),
            members[1:],
            parameters.pace,
        )
        began = time.monotonic()
        with ExitStack() as stack:
            vitals = stack.enter_context(Vitals(members[0]))
            stack.enter_context(Producer(world, rng, backlog=parameters.backlog))
            storm.rage(seconds=parameters.seconds, most=parameters.faults)
            deaths = world.deaths()
        findings = world.judged()
        account = world.truth()
        lasted = time.monotonic() - began
        return Slice(
            parameters=parameters,
            backend=ground.name,
            seconds=lasted,
            accepted=len(account.accepted),
            maybe=len(account.maybe) + account.anonymous,
            results=len(account.results),
            cancelled=sum(result.state == "cancelled" for result in account.results),
            starts=sum(account.starts.values()),
            marks=tuple(storm.marks),
            missed=tuple(storm.missed),
            broken=(
                *storm.broken,
                *(f"{name} ended unasked" for name in deaths if name not in str(findings)),
            ),
            findings=findings if findings.broken() else check(account),
            complaints=dict(_complaints(world)),
            rss_kb=vitals.rss_kb,
            descriptors=vitals.descriptors,
        )


def _complaints(world: World) -> Counter[str]:
    found: Counter[str] = Counter()
    for log in world.home.glob("stderr-*"):
        for line in log.read_text(errors="replace").splitlines():
            try:
                told = json.loads(line)
            except ValueError:
                found[f"not JSON: {line[:100]}"] += 1
                continue
            if told.get("level") in {"warning", "error", "critical"}:
                found[f"{told['level']} {told['event']}"] += 1
    return found
