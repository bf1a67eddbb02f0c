"""What lies in a list: others' documents, good or not, and our references to tasks."""

from __future__ import annotations

import hashlib
import re

import pytest

from dispatcher.errors import InvalidTask, TaskNotFound
from dispatcher.model import Delivery
from dispatcher.queue.exchange import Limits
from dispatcher.queue.views import Views
from dispatcher.queue.wire import parse_delivery
from dispatcher.task import Task
from tests.queue.conftest import LEASE, POISONED, STREAM, QueueUnderTest

pytestmark = pytest.mark.source("redis-list")

MAX_BYTES = 65_536
BUSYBOX = '{"image": "busybox"}'


def problem(delivery: Delivery) -> str:
    with pytest.raises(InvalidTask) as refusal:
        parse_delivery(delivery, max_bytes=MAX_BYTES)
    return str(refusal.value)


def references(queue: QueueUnderTest) -> dict[str, int]:
    """How many the scripts believe to be in each list, where it is not 0."""
    found = queue.redis.hgetall(queue.key("meta:counters"))
    prefix = b"references:"
    return {
        k.removeprefix(prefix).decode(): int(v) for k, v in found.items() if k.startswith(prefix) and int(v)
    }


async def audit(queue: QueueUnderTest) -> int:
    """A whole round; how many were put back."""
    count = 0
    while True:
        part = await queue.store.audit(LEASE)
        count += part.put_back
        if part.done:
            return count


# --- others' documents ------------------------------------------------------------------


async def test_an_element_is_a_task_with_an_id_from_its_taking_on(queue: QueueUnderTest) -> None:
    queue.push(BUSYBOX, queue="high")
    before = queue.now_ms()
    delivery = await queue.take_one()
    assert re.fullmatch(r"high\.\d+-\d+", delivery.task_id)
    assert delivery.task_id == f"high.{delivery.source_id}"
    assert before <= delivery.accepted_ms == int(delivery.source_id.split("-")[0]) <= queue.now_ms()
    assert (delivery.traceparent, delivery.tracestate) == ("", "")
    assert parse_delivery(delivery, max_bytes=MAX_BYTES) == Task(image="busybox")
    assert queue.length("high") == 0


async def test_what_came_back_is_read_from_its_record(queue: QueueUnderTest) -> None:
    queue.push(BUSYBOX)
    first = await queue.take_one()
    await queue.finish(first, "release")
    again = await queue.take_one("b")
    assert (again.task_id, again.fields) == (first.task_id, first.fields)


async def test_equal_elements_are_tasks_of_their_own(queue: QueueUnderTest) -> None:
    queue.push(*[BUSYBOX] * 100)
    assert len({d.task_id for d in await queue.take(100)}) == 100


async def test_the_oldest_is_taken_first_whoever_put_it_there(queue: QueueUnderTest) -> None:
    queue.push('{"image": "a"}')
    await queue.submit(image="b")
    queue.push('{"image": "c"}')
    taken = [d.document or (d.fields or ((b"", b""),))[0][1] for d in await queue.take()]
    assert [document[-4:-2] for document in taken] == [b'"a', b'"b', b'"c']


@pytest.mark.parametrize(
    ("element", "says"),
    [
        pytest.param(b"", "no field 'task'", id="empty"),
        pytest.param(b"{", "Invalid JSON", id="half a document"),
        pytest.param(b"\x00\xff\xfe\x00", "not UTF-8: byte 1", id="binary"),
        pytest.param(b'{"image": "caf\xe9"}', "not UTF-8", id="latin 1"),
        pytest.param(b"[" * 30_000, "Invalid JSON", id="deep nesting"),
        pytest.param(b"null", "", id="null"),
        pytest.param(b"7", "", id="number"),
        pytest.param(b'"busybox"', "", id="string"),
        pytest.param(b"[]", "", id="list"),
        pytest.param(b'{"image": 7}', "image", id="wrong type"),
        pytest.param(b"\x01", "Invalid JSON", id="first byte of a reference"),
        pytest.param(b"\x01mine", "Invalid JSON", id="half a reference"),
        pytest.param(b"\x011-1 ", "Invalid JSON", id="reference to no name"),
        pytest.param(b"\x011-1 nobody", "Invalid JSON", id="reference to nobody"),
        pytest.param(b"\x011-1 \xff\x00", "not UTF-8", id="binary reference"),
        pytest.param(b"\x01" + b"9" * 5_000 + b"-1 x", "Invalid JSON", id="endless token"),
        pytest.param(b"\x01-1 x", "Invalid JSON", id="token of one number"),
    ],
)
async def test_a_malformed_element_is_taken_told_and_dead_lettered_with_its_bytes(
    queue: QueueUnderTest, element: bytes, says: str
) -> None:
    queue.push(element, BUSYBOX)
    delivery, good = await queue.take()
    assert says in problem(delivery)
    assert parse_delivery(good, max_bytes=MAX_BYTES) == Task(image="busybox")
    assert re.fullmatch(r"default\.\d+-\d+", delivery.task_id)
    assert len(delivery.task_id) <= 63
    await queue.finish(delivery, "final", POISONED)
    (dead,) = queue.entries("dead")
    assert dead["task"] == element
    assert f"default.{dead['source_id'].decode()}" == dead["id"].decode() == delivery.task_id
    assert references(queue) == {}


@pytest.mark.parametrize("size", [MAX_BYTES + 1, 1_048_576])
async def test_an_oversize_element_leaves_length_and_digest(queue: QueueUnderTest, size: int) -> None:
    element = b"x" * size
    queue.push(element)
    delivery = await queue.take_one()
    assert (delivery.document, delivery.fields) == (b"", ())
    assert f"{delivery.oversize} bytes; at most {MAX_BYTES}" in problem(delivery)
    await queue.finish(delivery, "final", POISONED)
    (dead,) = queue.entries("dead")
    assert "task" not in dead
    assert int(dead["task_bytes"]) == size
    assert dead["task_sha1"].decode() == hashlib.sha1(element, usedforsecurity=False).hexdigest()


async def test_an_element_of_exactly_the_limit_is_read(queue: QueueUnderTest) -> None:
    await queue.tick(limits=Limits(max_bytes=300))
    queue.push(BUSYBOX.ljust(300))
    assert parse_delivery(await queue.take_one(), max_bytes=300) == Task(image="busybox")


# --- references -------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["waiting", "held", "scheduled", "ready", "inbox", "ended"])
async def test_a_reference_that_is_not_ours_does_nothing_to_the_task(
    queue: QueueUnderTest, phase: str
) -> None:
    await queue.submit_in(phase, "mine")
    before = queue.record("mine"), references(queue)
    queue.push(b"\x011-1 mine", queue="high")
    delivery = await queue.take_one("b", queues={"high": 1})
    assert delivery.task_id != "mine"
    await queue.finish(delivery, "final", POISONED)
    assert (queue.record("mine"), references(queue)) == before
    (dead,) = queue.entries("dead")
    assert dead["task"] == b"\x011-1 mine"


@pytest.mark.parametrize("together", [True, False])
async def test_a_copy_of_a_reference_of_ours_is_nothing(queue: QueueUnderTest, *, together: bool) -> None:
    await queue.submit(id="mine")
    await queue.submit(id="next")
    (copy,) = queue.redis.lrange(STREAM, -1, -1)
    queue.redis.rpush(STREAM, copy)
    assert [d.task_id for n in ([10] if together else [1, 1, 1]) for d in await queue.take(n)] == [
        "mine",
        "next",
    ]
    assert references(queue) == {}


async def test_a_reference_moved_by_hand_gives_its_task_in_its_own_queue(queue: QueueUnderTest) -> None:
    await queue.submit(id="mine", queue="low")
    queue.redis.rpoplpush(queue.stream("low"), queue.stream("high"))
    assert [(d.task_id, d.queue) for d in await queue.take(queues={"high": 1})] == [("mine", "low")]
    assert references(queue) == {}


@pytest.mark.parametrize("way", ["taken", "cancelled", "expired"])
async def test_the_count_of_references_is_true(queue: QueueUnderTest, way: str) -> None:
    from datetime import UTC, datetime, timedelta

    expires = datetime.now(UTC) + timedelta(hours=1)
    for name in ("high", "low"):
        for number in range(3):
            await queue.submit(id=f"{name}-{number}", queue=name, expires_at=expires)
    queue.push(BUSYBOX)
    await queue.store.place(await queue.take_one(queues={"default": 1}), Task(image="busybox", queue="low"))
    assert references(queue) == {"high": 3, "low": 4}
    if way == "taken":
        await queue.take(7)
    elif way == "cancelled":
        for task_id in queue.members("index:open"):
            await queue.store.cancel(task_id)
    else:
        for task_id in queue.members("index:open"):
            queue.ask("ZADD", queue.key("index:expires"), 1, task_id)
        await queue.tick()
    assert references(queue) == {}
    assert queue.length("high") == queue.length("low") == 0


# --- what somebody deleted ----------------------------------------------------------------


async def test_of_a_deleted_list_what_clients_submitted_comes_back_and_nothing_else(
    queue: QueueUnderTest,
) -> None:
    ids = [await queue.submit(queue="high") for _ in range(250)]
    queue.push(*[BUSYBOX] * 5, queue="high")
    await queue.submit(id="elsewhere")
    queue.redis.delete(queue.stream("high"))
    assert await audit(queue) == 250
    assert references(queue) == {"default": 1}
    assert await audit(queue) == 0
    taken = [d.task_id for d in await queue.take(300, queues={"high": 1})]
    assert sorted(taken) == sorted(ids)
    assert [d.task_id for d in await queue.take()] == ["elsewhere"]


async def test_a_part_of_a_list_that_is_gone_comes_back(queue: QueueUnderTest) -> None:
    for number in range(6):
        await queue.submit(id=f"t{number}")
    queue.redis.ltrim(STREAM, 0, 2)  # the three newest stay
    assert await audit(queue) == 3
    assert [d.task_id for d in await queue.take()] == [f"t{number}" for number in range(6)]
    assert references(queue) == {}


async def test_what_others_pushed_since_hides_a_loss_only_until_it_is_taken(queue: QueueUnderTest) -> None:
    await queue.submit(id="one")
    await queue.submit(id="two")
    queue.redis.delete(STREAM)
    queue.push(*[BUSYBOX] * 5)
    assert len(await queue.take(4)) == 4
    assert await audit(queue) == 2
    assert {"one", "two"} < {d.task_id for d in await queue.take()}
    assert references(queue) == {}


@pytest.mark.parametrize("how", ["a forged reference", "a cancellation"])
async def test_no_loss_is_hidden_for_ever(queue: QueueUnderTest, how: str) -> None:
    queue.push(b"\x011-1 mine")
    await queue.submit(id="mine")
    await queue.submit(id="other")
    assert len(await queue.take(1)) == 1
    queue.redis.delete(STREAM)
    if how == "a cancellation":
        assert await queue.store.cancel("other") == ("cancelled", "cancelled")
    assert await audit(queue) == (1 if how == "a cancellation" else 2)
    assert references(queue) == {}


# --- what is seen -------------------------------------------------------------------------


async def test_queues_tell_what_waits_and_since_when_as_far_as_is_known(queue: QueueUnderTest) -> None:
    views = Views(queue.store)

    async def seen(name: str = "default") -> tuple[int, bool]:
        (info,) = [info for info in await views.queues() if info.name == name]
        return info.depth, info.oldest_seconds is not None

    assert await seen() == (0, False)
    queue.push(BUSYBOX)
    assert await seen() == (1, False), "what others pushed tells no time"
    await queue.submit()
    assert await seen() == (2, False)
    await queue.finish(await queue.take_one(), "release")
    assert await seen() == (2, True), "what came back has one, and so has the reference"
    await queue.finish(await queue.take_one())
    assert await seen() == (1, True)
    assert await seen("high") == (0, False)


async def test_what_is_not_taken_is_in_no_listing_and_has_no_id(queue: QueueUnderTest) -> None:
    views = Views(queue.store)
    queue.push(BUSYBOX)
    task_id = await queue.submit()
    assert [status.id for status in await views.tasks()] == [task_id]
    entry = queue.record(task_id)["entry"]
    for unknown in (f"default.{entry}", "default.1-1", "high.1-1"):
        with pytest.raises(TaskNotFound):
            await views.task(unknown)
        with pytest.raises(TaskNotFound):
            await queue.store.cancel(unknown)
    for delivery in await queue.take():
        assert (await views.task(delivery.task_id)).instance == "a"
