"""What any program XADDs: good or not, it becomes a task and has one end."""

from __future__ import annotations

import hashlib

import pytest

from dispatcher.errors import InvalidTask
from dispatcher.model import Delivery
from dispatcher.queue.exchange import Limits
from dispatcher.queue.wire import parse_delivery
from dispatcher.task import Task
from tests.queue.conftest import POISONED, QueueUnderTest

pytestmark = pytest.mark.source("redis-stream")

MAX_BYTES = 65_536
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def problem(delivery: Delivery) -> str:
    with pytest.raises(InvalidTask) as refusal:
        parse_delivery(delivery, max_bytes=MAX_BYTES)
    return str(refusal.value)


async def test_a_plain_entry_is_a_task_named_by_its_queue_and_entry(queue: QueueUnderTest) -> None:
    task_id = queue.xadd('{"image": "busybox"}', "high")
    delivery = await queue.take_one()
    entry = task_id.removeprefix("high.")
    assert (delivery.task_id, delivery.queue, delivery.source_id) == (task_id, "high", entry)
    assert delivery.accepted_ms == int(entry.split("-")[0])
    assert delivery.fields == ((b"task", b'{"image": "busybox"}'),)
    assert parse_delivery(delivery, max_bytes=MAX_BYTES) == Task(image="busybox")
    assert queue.length("high") == 0


async def test_what_came_back_is_read_from_its_record(queue: QueueUnderTest) -> None:
    queue.xadd({"task": '{"image": "busybox"}', "traceparent": TRACE, "tracestate": "a=b"})
    first = await queue.take_one()
    await queue.finish(first, "release")
    again = await queue.take_one("b")
    assert again.task_id == first.task_id
    assert (again.traceparent, again.tracestate) == (TRACE, "a=b")
    assert parse_delivery(again, max_bytes=MAX_BYTES) == Task(image="busybox")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        pytest.param({"job": "x"}, "entry field 'job' is unknown", id="unknown field alone"),
        pytest.param(
            {"task": '{"image":"busybox"}', "prio": "1"},
            "'prio' is unknown; allowed: task",
            id="unknown field",
        ),
        pytest.param({"traceparent": TRACE}, "no field 'task'", id="missing task"),
        pytest.param({"task": ""}, "no field 'task'", id="empty task"),
        pytest.param({"": ""}, "entry field '' is unknown", id="empty names"),
        pytest.param({"task": "{"}, "Invalid JSON", id="half a document"),
        pytest.param({"task": b"\x00\xff\xfe\x00"}, "not UTF-8: byte 1", id="binary"),
        pytest.param({"task": b'{"image": "caf\xe9"}', b"tracestate": b"\xff"}, "not UTF-8", id="latin 1"),
        pytest.param({b"\xff\xfe": b"\xff"}, "is unknown", id="binary field name"),
        pytest.param({"task": "[" * 30_000}, "Invalid JSON", id="deep nesting"),
        pytest.param({"task": '{"a":' * 8_000}, "Invalid JSON", id="deep objects"),
        pytest.param({"task": "null"}, "", id="null"),
        pytest.param({"task": '{"image":"busybox"}', "ref": "x"}, "refers to a task", id="ref and task"),
        pytest.param({"ref": "nobody"}, "refers to a task whose record is gone", id="ref to nothing"),
        pytest.param({"ref": b"\xff\x00"}, "refers to a task whose record is gone", id="binary ref"),
        pytest.param({"ref": ""}, "refers to a task whose record is gone", id="empty ref"),
    ],
)
async def test_a_malformed_entry_is_taken_told_and_dead_lettered_with_its_bytes(
    queue: QueueUnderTest, fields: dict[str | bytes, str | bytes], says: str
) -> None:
    task_id = queue.xadd(fields)
    delivery = await queue.take_one()
    assert says in problem(delivery)
    await queue.finish(delivery, "final", POISONED)
    (dead,) = queue.entries("dead")
    values = [part.encode() if isinstance(part, str) else part for pair in fields.items() for part in pair]
    names = {name.encode() if isinstance(name, str) else name for name in fields}
    document = values[1] if b"task" in names else b" ".join(values)
    assert dead["task"] == document
    assert (dead["id"].decode(), dead["source_id"].decode()) == (task_id, task_id.removeprefix("default."))
    assert (dead["reason"], dead["message"]) == (b"invalid", b"image: not a reference")


async def test_a_field_given_twice_is_refused(queue: QueueUnderTest) -> None:
    document = '{"image":"busybox"}'
    queue.ask("XADD", queue.stream("default"), "*", "task", document, "task", document)
    assert "more than once" in problem(await queue.take_one())


@pytest.mark.parametrize("size", [MAX_BYTES + 1, 1_048_576])
async def test_an_oversize_document_is_not_looked_at_and_leaves_length_and_digest(
    queue: QueueUnderTest, size: int
) -> None:
    document = b"x" * size
    queue.xadd({"task": document, "traceparent": TRACE})
    delivery = await queue.take_one()
    assert (delivery.document, delivery.fields) == (b"", ())
    assert f"{delivery.oversize} bytes; at most {MAX_BYTES}" in problem(delivery)
    await queue.finish(delivery, "final", POISONED)
    (dead,) = queue.entries("dead")
    assert "task" not in dead
    assert int(dead["task_bytes"]) == size
    assert dead["task_sha1"].decode() == hashlib.sha1(document, usedforsecurity=False).hexdigest()


async def test_a_document_of_exactly_the_limit_is_read(queue: QueueUnderTest) -> None:
    await queue.tick(limits=Limits(max_bytes=300))
    document = '{"image": "busybox"}'.ljust(300)
    queue.xadd(document)
    assert parse_delivery(await queue.take_one(), max_bytes=300) == Task(image="busybox")


async def test_oversize_of_other_fields_is_oversize_too(queue: QueueUnderTest) -> None:
    queue.xadd({"task": '{"image": "busybox"}', "tracestate": "x" * 1_000_000})
    delivery = await queue.take_one()
    assert delivery.oversize > 1_000_000
    assert delivery.tracestate == ""


async def test_an_entry_of_a_great_many_fields_is_one_task(queue: QueueUnderTest) -> None:
    queue.xadd({f"f{n}": "" for n in range(10_000)})
    delivery = await queue.take_one()
    assert "is unknown" in problem(delivery) or delivery.oversize


@pytest.mark.parametrize("phase", ["waiting", "held", "scheduled", "ready", "inbox", "ended"])
async def test_a_reference_that_is_not_ours_does_nothing_to_the_task_and_is_told(
    queue: QueueUnderTest, phase: str
) -> None:
    await queue.submit_in(phase, "mine")
    before = queue.record("mine")
    forged = queue.xadd({"ref": "mine"}, "high")
    delivery = await queue.take_one("b", queues={"high": 1})
    assert (delivery.task_id, delivery.source_id) == (forged, forged.removeprefix("high."))
    assert "refers to a task" in problem(delivery)
    await queue.finish(delivery, "final", POISONED)
    assert queue.record("mine") == before
    (dead,) = queue.entries("dead")
    assert (dead["id"].decode(), dead["task"], dead["reason"]) == (forged, b"ref mine", b"invalid")
    assert len(queue.entries("results")) == 1 + (phase == "ended")


async def test_a_second_reference_to_a_waiting_task_gives_it_once(queue: QueueUnderTest) -> None:
    task_id = await queue.submit()
    forged = queue.xadd({"ref": task_id})
    own, other = await queue.take()
    assert (own.task_id, own.fields) == (task_id, None)
    assert (other.task_id, other.fields) == (forged, ((b"ref", task_id.encode()),))


async def test_a_reference_ahead_of_ours_does_not_take_the_task_along(queue: QueueUnderTest) -> None:
    forged = queue.xadd({"ref": "mine"})
    await queue.submit(id="mine")
    assert [(d.task_id, d.fields is None) for d in await queue.take()] == [(forged, False), ("mine", True)]


FUTURE = "99999999999999999-1"


@pytest.mark.parametrize("how", ["taken", "cancelled"])
async def test_an_entry_from_the_future_was_accepted_now(queue: QueueUnderTest, how: str) -> None:
    task_id = queue.xadd('{"image": "busybox"}', "default", FUTURE)
    before = queue.now_ms()
    if how == "taken":
        await queue.take_one()
        assert before <= queue.members("index:open")[task_id] <= queue.now_ms()
    else:
        await queue.store.cancel(task_id)
    assert before <= int(queue.record(task_id)["accepted"]) <= queue.now_ms()


async def test_an_entry_from_the_future_with_a_delay_is_due_after_its_delay(queue: QueueUnderTest) -> None:
    queue.xadd("", "default", FUTURE)
    delivery = await queue.take_one()
    task = Task(image="busybox", delay=60.0)
    assert await queue.store.place(delivery, task) == ("moved", delivery.task_id)
    tick = await queue.tick()
    assert tick.next_due_ms == delivery.accepted_ms + 60_000 <= queue.now_ms() + 60_000
    assert await queue.submit(), "the stream goes on"
    assert len(await queue.take()) == 1


async def test_an_entry_from_the_past_keeps_its_time(queue: QueueUnderTest) -> None:
    queue.xadd('{"image": "busybox"}', "default", "1700000000000-0")
    assert (await queue.take_one()).accepted_ms == 1_700_000_000_000


@pytest.mark.parametrize("trace", ["junk", TRACE[1:], f"{TRACE}0", "x" * 60_000])
async def test_a_traceparent_that_can_be_none_is_not_kept(queue: QueueUnderTest, trace: str) -> None:
    queue.xadd({"task": '{"image": "busybox"}', "traceparent": trace})
    waits = queue.xadd({"task": '{"image": "busybox"}', "traceparent": trace}, "low")
    delivery = await queue.take_one(queues={"default": 1})
    assert delivery.traceparent == ""
    await queue.finish(delivery)
    await queue.store.cancel(waits)
    assert [result["traceparent"] for result in queue.entries("results")] == [b"", b""]


@pytest.mark.parametrize(("size", "kept"), [(512, 512), (513, 0), (60_000, 0)])
async def test_of_tracestate_512_bytes_are_kept(queue: QueueUnderTest, size: int, kept: int) -> None:
    state = "x" * size
    queue.xadd({"task": '{"image": "busybox"}', "traceparent": TRACE, "tracestate": state})
    delivery = await queue.take_one()
    assert (delivery.traceparent, delivery.tracestate) == (TRACE, state[:kept])
    assert parse_delivery(delivery, max_bytes=MAX_BYTES) == Task(image="busybox")


async def test_an_id_that_somebody_chose_by_hand_does_not_hide_the_entry(queue: QueueUnderTest) -> None:
    task_id = queue.xadd('{"image": "alpine"}')
    assert await queue.submit(id=task_id) == task_id
    plain, chosen = sorted(await queue.take(), key=lambda d: d.fields is None)
    assert chosen.task_id == task_id
    assert plain.task_id.startswith(f"{task_id}.")
    assert plain.fields == ((b"task", b'{"image": "alpine"}'),)


async def test_the_same_entry_id_in_two_streams_is_two_tasks(queue: QueueUnderTest) -> None:
    for name in ("high", "low"):
        queue.ask("XADD", queue.stream(name), "1700000000000-7", "task", '{"image":"busybox"}')
    assert {d.task_id for d in await queue.take()} == {"high.1700000000000-7", "low.1700000000000-7"}


async def test_malformed_entries_do_not_hold_up_good_ones(queue: QueueUnderTest) -> None:
    for number in range(200):
        queue.xadd({"task": f"junk {number}"})
    good = await queue.submit()
    taken = await queue.take(201)
    assert taken[-1].task_id == good
    for delivery in taken[:-1]:
        await queue.finish(delivery, "final", POISONED)
    assert len(queue.entries("dead")) == 200
