"""A queue under test, and what must hold of its keys when a test is over."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal

import anyio
import pytest
from redis.crc import key_slot

from dispatcher.errors import QueueUnavailable
from dispatcher.model import Delivery, Outcome, Reason, State
from dispatcher.queue import source as source_module
from dispatcher.queue.exchange import Action, Budget, Limits, Settlement, SourceKind, Submission, Tick
from dispatcher.queue.source import Source
from dispatcher.queue.store import Store
from dispatcher.task import Task
from tests.support.redis_server import RedisUnderTest

STREAM = "dispatcher:tasks"
GROUP = "dispatchers"
WEIGHTS = {"high": 6, "default": 3, "low": 1}
LEASE = 30.0
LIMITS = Limits()
#: Seconds that no test lasts.
LONG = 600.0
SUCCESS = Outcome(State.SUCCEEDED, exit_code=0, started_at=1_700_000_000.25, finished_at=1_700_000_001.5)
FAILURE = Outcome(State.FAILED, Reason.EXIT, "exit code 3", 3, 1_700_000_000.0, 1_700_000_002.0)
POISONED = Outcome(State.FAILED, Reason.INVALID, "image: not a reference")


class QueueUnderTest:
    """The store, and a plain client beside it that looks at the keys and breaks them."""

    def __init__(self, server: RedisUnderTest, source: SourceKind = "redis-stream") -> None:
        self.server = server
        self.source: SourceKind = source
        #: Typed for every protocol and decoding at once, its own types would tell nothing.
        self.redis: Any = server.client()
        self.store = Store(server.url, STREAM)
        #: Set by a test that destroys tasks on purpose: then nothing is said of what is left.
        self.destroyed = False

    # --- keys ---------------------------------------------------------------------------

    def key(self, name: str) -> str:
        return f"{{{STREAM}}}:{name}"

    def stream(self, queue: str) -> str:
        return STREAM if queue == "default" else self.key(queue)

    def ask(self, *command: str | bytes | float) -> Any:
        return self.redis.execute_command(*command)

    def record(self, task_id: str) -> dict[str, str]:
        found = self.redis.hgetall(self.key(f"task:{task_id}"))
        return {name.decode(): value.decode("utf-8", "replace") for name, value in found.items()}

    def lifetime_ms(self, name: str) -> int:
        """Of a key of ours: -1 if it stays, -2 if there is none."""
        return int(self.ask("PTTL", self.key(name)))

    def entries(self, name: str) -> list[dict[str, bytes]]:
        """Fields of all entries of ``results`` or ``dead``."""
        found = self.redis.xrange(self.key(name))
        return [{name.decode(): value for name, value in fields.items()} for _, fields in found]

    def members(self, name: str) -> dict[str, float]:
        """Of a sorted set of ours, with scores."""
        found = self.redis.zrange(self.key(name), 0, -1, withscores=True)
        return {member.decode(): score for member, score in found}

    def due(self, queue: str = "*") -> dict[str, float]:
        """What is scheduled, in all queues or in one, with its times."""
        prefix = self.key("")
        keys = [key.decode().removeprefix(prefix) for key in self.redis.keys(self.key(f"index:due:{queue}"))]
        return {task_id: due for key in keys for task_id, due in self.members(key).items()}

    def length(self, queue: str = "default") -> int:
        return int(self.ask("XLEN" if self.source == "redis-stream" else "LLEN", self.stream(queue)))

    def calls(self, command: str) -> int:
        """How often the server was sent this."""
        found = self.redis.info("commandstats")
        return int(found.get(f"cmdstat_{command}", {"calls": 0})["calls"])

    def now_ms(self) -> int:
        seconds, micros = self.redis.time()
        return int(seconds) * 1000 + int(micros) // 1000

    # --- verbs --------------------------------------------------------------------------

    async def tick(
        self,
        instance: str = "a",
        *,
        incarnation: str = "1",
        info: Mapping[str, Any] | None = None,
        leave: bool = False,
        lease: float = LEASE,
        namespace: str = "0123456789abcdef",
        limits: Limits = LIMITS,
        source: SourceKind | None = None,
        daemon: str = "",
        queues: Iterable[str] = tuple(WEIGHTS),
    ) -> Tick:
        return await self.store.tick(
            instance=instance,
            incarnation=incarnation,
            info="" if leave else json.dumps(info or {"host": instance}),
            lease=lease,
            namespace=namespace,
            source=source or self.source,
            daemon=daemon,
            limits=limits,
            queues=queues,
        )

    async def submit(self, **fields: Any) -> str:
        return await self.store.enqueue(Submission.of(Task(**({"image": "busybox"} | fields))))

    def push(self, *documents: str | bytes, queue: str = "default", traceparent: str = "") -> None:
        """Hand tasks in as a program of any language does; a list carries no trace."""
        trace = ("traceparent", traceparent) if traceparent else ()
        with self.redis.pipeline(transaction=False) as pipe:
            for document in documents:
                if self.source == "redis-list":
                    pipe.lpush(self.stream(queue), document)
                else:
                    pipe.execute_command("XADD", self.stream(queue), "*", "task", document, *trace)
            pipe.execute()

    def xadd(self, fields: Mapping[Any, Any] | str, queue: str = "default", entry: str = "*") -> str:
        """Add a plain entry; returns the id its task will have."""
        fields = {"task": fields} if isinstance(fields, str) else fields
        made = self.redis.xadd(self.stream(queue), dict(fields), id=entry)
        return f"{queue}.{made.decode()}"

    async def take(
        self,
        n: int = 100,
        instance: str = "a",
        *,
        incarnation: str = "1",
        lease: float = LEASE,
        queues: Mapping[str, int] | None = None,
        daemon: str = "engine-1",
    ) -> list[Delivery]:
        return await self.store.take(
            n,
            instance=instance,
            incarnation=incarnation,
            lease=lease,
            queues=WEIGHTS if queues is None else queues,
            daemon=daemon,
        )

    async def take_one(self, instance: str = "a", **more: Any) -> Delivery:
        (delivery,) = await self.take(1, instance, **more)
        return delivery

    async def submit_in(self, phase: str, task_id: str) -> None:
        """A task that is waiting, held, scheduled, ready, in the inbox of engine-9, or ended."""
        await self.submit(id=task_id)
        if phase == "waiting":
            return
        held = await self.take_one()
        if phase == "inbox":
            await self.renew(held, state="running", daemon="engine-9")
        if phase == "ended":
            await self.finish(held)
        elif phase != "held":
            action: Action = "detach" if phase == "inbox" else "release"
            await self.finish(held, action, delay=60 if phase == "scheduled" else 0)

    async def renew(self, delivery: Delivery, **fields: str) -> str:
        return await self.store.renew(delivery.task_id, delivery.owner, LEASE, fields)

    async def finish(
        self,
        delivery: Delivery,
        action: Action = "final",
        outcome: Outcome = SUCCESS,
        *,
        delay: float = 0.0,
        budget: Budget = "none",
        prefer: str = "",
    ) -> Literal["ok", "lost"]:
        return await self.store.finish(
            Settlement(delivery.task_id, delivery.owner, action, outcome, delay, budget, prefer)
        )

    # --- time ---------------------------------------------------------------------------

    def lapse(self, *deliveries: Delivery, soon: bool = False) -> None:
        """The leases of these have run out, ``soon`` after they were taken or long after."""
        for delivery in deliveries:
            if self.ask("ZADD", self.key("index:leases"), "XX", "CH", 1, delivery.task_id) and not soon:
                self.ask("HSET", self.key(f"task:{delivery.task_id}"), "taken", -(10**12))

    def fall_due(self) -> None:
        """All that is scheduled is due now."""
        for key in self.redis.keys(self.key("index:due:*")):
            for task_id in self.redis.zrange(key, 0, -1):
                self.ask("ZADD", key, "XX", 1, task_id)

    def preferences_pass(self) -> None:
        """What was given back for a daemon is anybody's now."""
        for key in self.redis.keys(self.key("ready:*")):
            for task_id in self.members(key.decode().removeprefix(self.key(""))):
                self.ask("HDEL", self.key(f"task:{task_id}"), "prefers", "prefers_until")

    def forget_gaps(self) -> None:
        """No gap between ticks has been seen."""
        self.redis.hdel(self.key("meta:counters"), "last_tick", "calm_until")

    # --- what must hold at last -----------------------------------------------------------

    async def end_all(self) -> None:
        """Bring every task to its end, by the scripts alone."""
        self.ask("CONFIG", "SET", "maxmemory", "0")
        self.redis.delete(self.key("meta:paused"))
        for _ in range(100):
            self.forget_gaps()
            self.fall_due()
            self.preferences_pass()
            for task_id in self.members("index:leases"):
                self.ask("ZADD", self.key("index:leases"), "XX", 1, task_id)
            await self.tick("last")
            queues = dict.fromkeys([*(await self.store.queues()), "default"], 1)
            prefix = self.key("inbox:")
            inboxes = [key.decode().removeprefix(prefix) for key in self.redis.keys(f"{prefix}*")]
            taken = [
                d
                for daemon in [*inboxes, ""]
                for d in await self.take(1000, "last", queues=queues, daemon=daemon)
            ]
            for delivery in taken:
                assert await self.finish(delivery) == "ok"
            if not taken and not self.members("index:leases") and not self.due():
                return
        raise AssertionError("tasks do not come to an end")

    def check_slots(self) -> None:
        """All keys can be used by one script in a cluster."""
        elsewhere = [key for key in self.redis.keys("*") if key_slot(key) != key_slot(STREAM.encode())]
        assert not elsewhere

    def check_keys(self) -> None:
        """Every task has its one end, and nothing is left that nobody will take away."""
        self.check_slots()
        left: list[str] = []
        for raw in self.redis.keys("*"):
            name = raw.decode().removeprefix(f"{{{STREAM}}}:")
            kind = name.split(":")[0]
            expires = int(self.ask("PTTL", raw)) > 0
            if name == STREAM or kind in WEIGHTS:
                if self.redis.type(raw) == b"list" or self.ask("XLEN", raw):
                    left.append(name)
            elif kind in {"task", "key", "control", "tail", "live", "follow", "images", "images-used"}:
                if not expires:
                    left.append(name)
            elif name not in {"results", "dead", "index:tails"} and not name.startswith(
                ("meta:", "index:finished:")
            ):
                left.append(name)
        assert not left, f"left for ever: {left}"
        ended = [entry["id"] for entry in self.entries("results")]
        assert len(ended) == len(set(ended)), "a task has two results"

    async def aclose(self) -> None:
        await self.store.aclose()
        self.redis.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What holds of the queue holds of both sources, unless a test is about one of them."""
    if "queue" in metafunc.fixturenames:
        one = metafunc.definition.get_closest_marker("source")
        metafunc.parametrize("queue", one.args if one else ["redis-stream", "redis-list"], indirect=True)


@pytest.fixture
def no_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a ring ends a wait."""
    monkeypatch.setattr(source_module, "POLL_SECONDS", LONG)


@asynccontextmanager
async def listening(*sources: Source) -> AsyncIterator[None]:
    """With their doorbells."""
    async with anyio.create_task_group() as group:
        for source in sources:
            group.start_soon(source.listen, name="doorbell")
        try:
            yield
        finally:
            group.cancel_scope.cancel()


@pytest.fixture
async def queue(
    redis_server: RedisUnderTest, request: pytest.FixtureRequest
) -> AsyncIterator[QueueUnderTest]:
    """A queue that one instance, ``a``, has joined."""
    queue = QueueUnderTest(redis_server, request.param)
    await queue.tick()
    try:
        yield queue
        if not queue.destroyed:
            await queue.end_all()
            queue.check_keys()
    finally:
        queue.ask("CONFIG", "SET", "maxmemory", "0")
        await queue.aclose()


async def refused(queue: QueueUnderTest) -> bool:
    """Whether Redis takes no submission."""
    try:
        await queue.submit()
    except QueueUnavailable:
        return True
    return False
