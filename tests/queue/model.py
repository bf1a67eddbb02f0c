"""What the state machine believes of the queue, and what it does to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from dispatcher.model import Delivery
from dispatcher.task import Task
from tests.queue.conftest import WEIGHTS, QueueUnderTest

DAEMONS = ("engine-1", "engine-2")
OFFERS = (
    {"high": 6, "default": 3, "low": 1},
    {"high": 0, "default": 1, "low": 5},
    {"low": 1},
    {"default": 2, "high": 0},
)

tasks = st.builds(
    lambda **fields: {name: value for name, value in fields.items() if value is not None},
    image=st.sampled_from(["busybox", "alpine"]),
    id=st.sampled_from([None, None, "one", "two", "three"]),
    idempotency_key=st.sampled_from([None, None, "k", "l"]),
    queue=st.sampled_from([None, *WEIGHTS]),
    delay=st.sampled_from([None, None, 60.0]),
)


#: Which of what there is: the choice itself must not depend on what Redis' clock brought about.
picks = st.integers(0, 127)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
#: By a client, or by a plain XADD to one of the streams, with a trace and an id of now or of a
#: year that no clock will ever show; or by an LPUSH, which has neither.
arrivals = st.tuples(
    st.sampled_from(["", "", *WEIGHTS]),
    tasks,
    st.sampled_from(["", TRACE, TRACE[1:], f"{TRACE}0"]),
    st.sampled_from([False, False, True]),
)
Arrival = tuple[str, dict[str, Any], str, bool]
#: What stands before the name of a place in its key.
KEYS = {"due": "index:"}
FAR_FUTURE = 99_999_999_999_999_999


@dataclass
class Expected:
    """What the model knows of one accepted task."""

    place: str
    queue: str
    #: None for an entry that nobody has placed: other tasks can't be compared with it.
    digest: str | None = None
    daemon: str = ""
    #: The daemon it is kept for while it is ready; '' for none.
    prefers: str = ""
    attempt: int = 1
    cancelled: bool = False
    delivery: Delivery | None = None
    #: That of a plain entry, or the plain element as it was pushed.
    entry: str = ""
    traceparent: str = ""
    #: Whether it is an entry that says of itself that it refers to a task, and does not.
    forged: bool = False


def unnamed(task_id: str) -> bool:
    """Whether this stands for an element of a list, which has no id before it is taken."""
    return task_id.startswith("?")


@dataclass
class Model:
    """Where every task is."""

    tasks: dict[str, Expected] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    paused: set[str] = field(default_factory=set)
    max_length: int = 0
    fence: int = 0

    def standing(self, task: Task, task_id: str | None, held: str = "") -> tuple[str, str] | None:
        """Whether a task stands already under this key or id."""
        for other in (self.keys.get(task.idempotency_key or ""), task_id):
            if other and other != held and other in self.tasks:
                same = self.tasks[other].digest == task.digest()
                return ("known" if same else "conflict"), other
        return None

    def at(self, place: str) -> list[str]:
        return [task_id for task_id, task in self.tasks.items() if task.place == place]

    def full(self, queue: str) -> bool:
        """Whether as many wait in ``queue`` as may."""
        waiting = sum(len(self.at(f"{kind}:{queue}")) for kind in ("stream", "ready", "due"))
        return 0 < self.max_length <= waiting

    @property
    def held(self) -> list[Expected]:
        return [task for task in self.tasks.values() if task.place == "lease"]

    @property
    def opened(self) -> set[str]:
        """Those without an end that have a record: not plain entries and elements that wait."""
        return {
            task_id
            for task_id, t in self.tasks.items()
            if t.place != "ended" and (t.digest or not t.entry or not t.place.startswith("stream:"))
        }

    def name(self, first: str, delivery: Delivery) -> None:
        """An element of a list has an id from its taking on."""
        assert delivery.task_id not in {*self.tasks, *self.aliases}
        task = self.tasks[delivery.task_id] = self.tasks.pop(first)
        assert delivery.fields == ((b"task", task.entry.encode()),), "a queue is taken from its beginning"

    def put_back(self, task: Expected) -> None:
        task.place = f"inbox:{task.daemon}" if task.daemon else f"ready:{task.queue}"
        task.delivery = None


def by_acceptance(queue: QueueUnderTest, model: Model, place: str) -> list[str]:
    """What is at a place that is ordered so."""

    def accepted(task_id: str) -> tuple[int, str]:
        return int(queue.record(task_id)["accepted"]), task_id

    return sorted(model.at(place), key=accepted)


def places(queue: QueueUnderTest, model: Model) -> list[tuple[str, str]]:
    """Every task that is found anywhere, with the model's name of the place."""
    found: list[tuple[str, str]] = []
    for name in WEIGHTS:
        lies = _in_list(queue, model, name) if queue.source == "redis-list" else _in_stream(queue, name)
        found += [(task_id, f"stream:{name}") for task_id in lies]
        found += [(task_id, f"ready:{name}") for task_id in queue.members(f"ready:{name}")]
        found += [(task_id, f"due:{name}") for task_id in queue.due(name)]
    for daemon in DAEMONS:
        found += [(task_id, f"inbox:{daemon}") for task_id in queue.members(f"inbox:{daemon}")]
    found += [(task_id, "lease") for task_id in queue.members("index:leases")]
    return [*found, *((entry["id"].decode(), "ended") for entry in queue.entries("results"))]


def _in_stream(queue: QueueUnderTest, name: str) -> list[str]:
    found = []
    for entry, fields in queue.redis.xrange(queue.stream(name)):
        task_id = fields.get(b"ref", b"").decode()
        if not task_id or queue.record(task_id).get("source") != entry.decode():
            task_id = f"{name}.{entry.decode()}"
        found.append(task_id)
    return found


def _in_list(queue: QueueUnderTest, model: Model, name: str) -> list[str]:
    """What has no id is told by its place and content."""
    found, references = [], 0
    plain = [task_id for task_id in model.at(f"stream:{name}") if unnamed(task_id)]
    for element in reversed(queue.redis.lrange(queue.stream(name), 0, -1)):
        token, _, task_id = element.decode().removeprefix("\1").partition(" ")
        if element[:1] == b"\1" and queue.record(task_id).get("source") == token:
            references += 1
            found.append(task_id)
        else:
            found.append(plain.pop(0))
            assert model.tasks[found[-1]].entry == element.decode()
    counted = queue.redis.hget(queue.key("meta:counters"), f"references:{name}") or 0
    assert int(counted) == references, "by this the audit finds what is lost"
    return found
