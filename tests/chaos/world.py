"""A small world to break: a real Redis, real dispatcher processes, producers, and the truth.

    with World(tmp_path, ProcessGround(tmp_path)) as world:      # or DockerGround(engine)
        a, b = world.member("a"), world.member("b")              # running `dispatcher serve`
        x = world.member("x", failpoint="after_create:kill")     # dies at its first creation
        task_id = world.submit("sleep 3; exit 3", endings={"failed:exit:3"})  # Python client
        world.xadd("exit 0", id="mine")                          # a plain XADD
        x.ended(); a.kill(); a.start(); b.stop(); b.resume(); b.terminate(); b.ended()
        world.server.kill(); world.server.start(); world.server.stop(); world.server.resume()
        world.server.command("SCRIPT", "FLUSH")
        world.client.status(task_id); world.client.cancel(task_id)   # say world.cancel(id) instead
        findings = world.judged()          # heals, waits for all results, drains, checks
    assert not findings.broken()

Everything a member is told is in ``environment`` or the keyword arguments of ``member``
(``LEASE_SECONDS="4"``). ``world.truth()`` is the account so far, for a look in the middle:
``.starts``, ``.results``, ``.waiting``, ``.left``. A task that was not handed in through the
world is unknown to it, and a finding; one cancelled behind its back as well.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import redis

from dispatcher.client import Client, DispatcherError, State, TaskStatus
from tests.chaos import checker, truth
from tests.chaos.book import Book, Desk, Order
from tests.chaos.checker import Account, Findings, check
from tests.chaos.ground import Ground
from tests.chaos.member import Member
from tests.chaos.server import Server
from tests.cli.program import Program

#: Seconds of a lease: short, so that a fault that outlasts it is short as well.
LEASE = 2.0
#: Seconds until stale leftovers of ended tasks are cleared away (RECONCILE_GRACE).
GRACE = 5
#: Seconds for every accepted task to end once all is well again.
SETTLE_TIMEOUT = 120.0
#: Seconds between looks while waiting for that.
LOOK = 0.1
#: What an instance of any world is told. Chaos kills innocents: no budget may end a task for that.
ENVIRONMENT = {
    "LEASE_SECONDS": f"{LEASE:g}",
    "NUM_CONSUMERS": "8",
    "DRAIN_TIMEOUT": "3",
    "MAX_DELIVERIES": "10000",
    "INFRA_MAX_ATTEMPTS": "10000",
    "RECONCILE_GRACE": str(GRACE),
    "RESULTS_MAX_LENGTH": "10000000",
}
#: States in which somebody has a task, or has just had it.
_HELD = (State.RUNNING, State.STARTING, State.PULLING, State.QUEUED)


class World(contextlib.ExitStack):
    """Redis, dispatchers, producers and the truth; ends all of it with its context."""

    def __init__(self, home: Path, ground: Ground, **environment: str) -> None:
        super().__init__()
        self.home = home
        try:
            self.ground = self.enter_context(ground)
            self.server = self.enter_context(Server(home))
            self.client = self.enter_context(Client(self.server.url))
        except BaseException:
            self.close()
            raise
        self.environment = {**ENVIRONMENT, **ground.environment(), **environment}
        self.program = Program(self.server.url, home)
        self.members: dict[str, Member] = {}
        self.book = Book()
        self.desk = Desk(self.book, self.client, self.server.client)

    # --- dispatchers --------------------------------------------------------------------

    def member(self, name: str, *, failpoint: str = "", wait: bool = True, **environment: str) -> Member:
        """A dispatcher of this name, running."""
        if name not in self.members:
            self.members[name] = Member(name, self.program, self.environment)
            self.callback(self.members[name].close)
        self.members[name].start(failpoint=failpoint, wait=wait, **environment)
        return self.members[name]

    def dismiss(self, member: Member) -> None:
        """End it for good: it is not begun again when the world is healed."""
        member.close()
        del self.members[member.name]

    def owners(self) -> set[str]:
        """The instance ids that can take care of a task now."""
        return {member.instance for member in list(self.members.values()) if member.owns}

    def deaths(self) -> list[str]:
        """The members that have ended and should not have."""
        return [m.instance for m in list(self.members.values()) if not m.alive and not m.expendable]

    # --- tasks --------------------------------------------------------------------------

    def order(self, script: str, *, endings: Iterable[str] = ("succeeded",), **fields: Any) -> Order:
        """A task that runs a shell script, with the ways in which it may end."""
        return Order(self.ground.task(script, **fields), frozenset(endings))

    def submit(self, script: str, *, endings: Iterable[str] = ("succeeded",), **fields: Any) -> str:
        """Hand a task in by the Python client; the id."""
        return self.desk.submit(self.order(script, endings=endings, **fields))

    def xadd(self, script: str, *, endings: Iterable[str] = ("succeeded",), **fields: Any) -> str:
        """Hand a task in by a plain XADD; the id."""
        return self.desk.xadd(self.order(script, endings=endings, **fields))

    def cancel(self, task_id: str) -> TaskStatus:
        """Ask for its end; from then on it may be cancelled. Raises DispatcherError."""
        self.book.cancel(task_id)
        return self.client.cancel(task_id)

    def held(self, instance: str) -> dict[str, TaskStatus]:
        """The open tasks that this life of a member has, by the public client. Raises DispatcherError."""
        return {
            status.id: status
            for state in _HELD
            for status in self.client.tasks(state=state, limit=1_000)
            if status.instance == instance
        }

    # --- the end ------------------------------------------------------------------------

    def heal(self) -> None:
        """Let Redis answer and every member that is there go on; one that ended begins again."""
        self.server.heal()
        for member in self.members.values():
            if member.alive:
                member.resume()
            else:
                member.start(wait=False)
        for member in self.members.values():
            member.wait_started()

    def settled(self, timeout: float = SETTLE_TIMEOUT) -> set[str]:
        """Wait until every accepted task has a result and none is open; those that are still missing."""
        deadline = time.monotonic() + timeout
        with self.server.client() as client:
            stream = truth.ResultStream(client)
            while True:
                self.book.saw_end([result.task_id for result in stream.news()])
                missing = {*self.book.open(), *truth.open_ids(client)}
                if not missing or time.monotonic() > deadline:
                    return missing
                time.sleep(LOOK)

    def cleared(self, timeout: float = 6.0 * GRACE) -> list[str]:
        """Wait until nothing is left behind; what still is."""
        deadline = time.monotonic() + timeout
        with self.server.client() as client:
            namespace = truth.namespace_of(client)
        while (left := self.ground.left(namespace)) and time.monotonic() < deadline:
            time.sleep(LOOK)
        return left

    def drain(self) -> None:
        """End every dispatcher as an operator does; one that does not exit with 0 is a lie."""
        running = [member for member in self.members.values() if member.alive]
        for member in running:
            member.terminate()
        for member in running:
            try:
                code = member.ended()
            except subprocess.TimeoutExpired:
                self.book.lies.append(f"{member.instance} does not end after SIGTERM")
                continue
            if code != 0:
                self.book.lies.append(f"{member.instance} exited with {code} after SIGTERM")

    def truth(self) -> Account:
        """All that is to be seen from outside now. Raises redis.RedisError if Redis is away."""
        book = self.book
        with self.server.client() as client:
            namespace = truth.namespace_of(client)
            return Account(
                accepted=frozenset(book.accepted),
                maybe=frozenset(book.maybe),
                anonymous=book.anonymous,
                endings=dict(book.endings),
                cancelled=frozenset(book.cancelled),
                results=truth.ResultStream(client).news(),
                starts=self.ground.starts(namespace),
                waiting=truth.waiting(client),
                left=self.ground.left(namespace),
                lies=tuple(book.lies),
            )

    def judged(self, timeout: float = SETTLE_TIMEOUT) -> Findings:
        """Mend everything, let every task end, drain, and compare what was promised with what was seen."""
        self.book.lies += [f"{instance} ended unasked" for instance in self.deaths()]
        self.heal()
        self.settled(timeout)
        if checker.STRICT_LEFTOVERS:
            self.cleared()
        self.drain()
        return check(self.truth())


#: What a command to a world may raise while Redis is away.
AWAY = (DispatcherError, redis.RedisError, OSError)
