"""The judge: from what was seen outside to what went wrong. Pure; asks nobody.

The invariant, named **G** in docs/reliability.md: every accepted task has exactly one
result; at most one start was made for a (task, attempt); nothing is left waiting, leased,
open or lying about. Besides: a result says what the task's program did, and nothing was
started after the attempt that the result tells of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from tests.chaos.truth import Launch, Result

#: Whether containers or process directories that stay behind break the invariant.
STRICT_LEFTOVERS = True


@dataclass(frozen=True)
class Account:
    """All that was seen from outside of one world, after its end."""

    #: Ids of tasks that somebody was told are accepted.
    accepted: AbstractSet[str]
    #: Ids of submissions whose reply was lost: they may have a result and need none.
    maybe: AbstractSet[str] = frozenset()
    #: How many submissions of no id of their own had their reply lost.
    anonymous: int = 0
    #: The ways in which a task may end, by id; see ``Result.ending``. Any, for who is not named.
    endings: Mapping[str, AbstractSet[str]] = field(default_factory=dict)
    #: Ids that somebody asked to cancel.
    cancelled: AbstractSet[str] = frozenset()
    #: Every entry of the results stream.
    results: Sequence[Result] = ()
    #: How often each (task, attempt) was started.
    starts: Mapping[Launch, int] = field(default_factory=dict)
    #: What is waiting, pending, leased or open in Redis, by key.
    waiting: Mapping[str, int] = field(default_factory=dict)
    #: Containers or process directories that are still there.
    left: Sequence[str] = ()
    #: What a producer was told wrongly, such as two ids for one idempotency key.
    lies: Sequence[str] = ()


@dataclass(frozen=True)
class Findings:
    """What is wrong; empty throughout if all is well."""

    #: Accepted, or started, and no result.
    lost: tuple[str, ...] = ()
    #: Started more than once.
    duplicated: tuple[Launch, ...] = ()
    #: More than one result.
    doubled: tuple[str, ...] = ()
    #: A result or a start of a task that nobody handed in.
    unknown: tuple[str, ...] = ()
    #: Started with a higher attempt than the one the result tells of.
    outlived: tuple[Launch, ...] = ()
    #: Ended in a way in which it can't have ended: ``<id>: <ending>``.
    wrong: tuple[str, ...] = ()
    #: ``<key>: <count>`` of what is waiting, pending, leased or open.
    waiting: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    lies: tuple[str, ...] = ()

    @property
    def task_ids(self) -> Counter[str]:
        """The tasks that something is wrong with, for telling which fault had hit them."""
        ids = [*self.lost, *self.doubled, *self.unknown, *(w.partition(":")[0] for w in self.wrong)]
        return Counter([*ids, *(task_id for task_id, _ in (*self.duplicated, *self.outlived))])

    def broken(self, *, strict_leftovers: bool = STRICT_LEFTOVERS) -> dict[str, tuple[object, ...]]:
        """What breaks the invariant, by name; empty if it holds."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if not strict_leftovers:
            del found["left"]
        return {name: what for name, what in found.items() if what}


def check(account: Account) -> Findings:
    """Compare what was promised with what was seen."""
    results = Counter(result.task_id for result in account.results)
    known = account.accepted | account.maybe
    started = {task_id for task_id, _ in account.starts}
    foreign = sorted((results.keys() | started) - known)
    # Of a reply that was lost with the only word of the id, the result is all there can be.
    unknown = foreign if len(foreign) > account.anonymous else []
    last = {result.task_id: result.attempt for result in account.results}
    return Findings(
        # What was started had been accepted, whatever its producer was told.
        lost=tuple(sorted((account.accepted | started) - results.keys())),
        duplicated=tuple(sorted(launch for launch, times in account.starts.items() if times > 1)),
        doubled=tuple(sorted(task_id for task_id, times in results.items() if times > 1)),
        unknown=tuple(unknown),
        outlived=tuple(sorted(s for s in account.starts if s[1] > last.get(s[0], s[1]))),
        wrong=tuple(sorted(f"{r.task_id}: {r.ending}" for r in account.results if not _fits(r, account))),
        waiting=tuple(f"{key}: {count}" for key, count in sorted(account.waiting.items())),
        left=tuple(sorted(account.left)),
        lies=tuple(account.lies),
    )


def _fits(result: Result, account: Account) -> bool:
    if result.state == "cancelled":
        return result.task_id in account.cancelled
    allowed = account.endings.get(result.task_id)
    return allowed is None or result.ending in allowed
