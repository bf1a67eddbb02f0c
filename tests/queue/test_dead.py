"""Dead letters are seen, tried again once and only once, and dropped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import anyio
import pytest

from dispatcher.client import AsyncClient
from dispatcher.errors import ExpiredTask, InvalidTask, QueueFull, TaskNotFound, TaskRefused, UnknownQueue
from dispatcher.model import Outcome, Reason, State
from dispatcher.queue.dead import PAGE, DeadLetters
from dispatcher.queue.exchange import Limits, Submission
from dispatcher.queue.scripts import Scripts
from dispatcher.queue.views import Views
from dispatcher.task import Task
from tests.queue.conftest import POISONED, STREAM, QueueUnderTest

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NOT_PULLED = Outcome(State.FAILED, Reason.IMAGE_PULL_FAILED, "the registry was away")


@pytest.fixture
def dead(queue: QueueUnderTest) -> DeadLetters:
    return DeadLetters(queue.store)


async def died(queue: QueueUnderTest, /, **fields: Any) -> str:
    """A task that the client submitted and that is dead now."""
    task = Task(**({"image": "busybox"} | fields))
    task_id = await queue.store.enqueue(Submission.of(task, traceparent=TRACE, tracestate="a=b"))
    queue.fall_due()
    await queue.tick()
    await queue.finish(await queue.take_one(), "final", NOT_PULLED)
    return task_id


async def died_plain(queue: QueueUnderTest, document: str | bytes, name: str = "default") -> str:
    """What another program handed in, and is dead now."""
    if queue.source == "redis-list":
        queue.redis.lpush(queue.stream(name), document)
    else:
        queue.xadd({"task": document}, name)
    delivery = await queue.take_one()
    await queue.finish(delivery, "final", POISONED)
    return delivery.task_id


async def refusal(dead: DeadLetters, letter: str) -> TaskRefused:
    [answer] = await dead.retry([letter])
    assert isinstance(answer, TaskRefused)
    assert [found.id for found in await dead.newest()] == [letter], "the letter stays"
    return answer


# --- seeing -----------------------------------------------------------------------------


async def test_they_are_shown_newest_first_with_their_bytes(queue: QueueUnderTest, dead: DeadLetters) -> None:
    for document in (b"\xff first", b"x" * 70_000):
        await died_plain(queue, document)
    large, small = await dead.newest()
    assert (small.task, small.task_bytes, small.reason) == (b"\xff first", 7, "invalid")
    assert (large.task, large.task_bytes, len(large.task_sha1)) == (None, 70_000, 40)
    if queue.source == "redis-stream":
        assert small.id == f"default.{small.source_id}"
    assert [letter.id for letter in await dead.newest(1)] == [large.id]
    assert await dead.newest(0) == []
    assert await dead.entry_ids() == [small.entry_id, large.entry_id]


async def test_any_number_of_them_is_shown(queue: QueueUnderTest, dead: DeadLetters) -> None:
    count = 2 * PAGE + 50
    for number in range(count):
        queue.redis.xadd(queue.key("dead"), {"id": f"t{number}", "reason": "invalid", "task": "{}"})
    shown = [letter.id for letter in await dead.newest(2 * PAGE + 1)]
    assert shown == [f"t{number}" for number in reversed(range(count))][: 2 * PAGE + 1]
    assert [letter.id for letter in await dead.newest(10 * PAGE)][-1] == "t0"
    assert len(await dead.entry_ids()) == count
    assert await dead.drop(["t0", "t0", "t249", "nobody"]) == [True, False, True, False]
    assert len(await dead.newest(count)) == count - 2


# --- trying again -----------------------------------------------------------------------


async def test_a_retry_is_a_new_task_that_tells_where_it_came_from(
    queue: QueueUnderTest, dead: DeadLetters
) -> None:
    old = await died(queue, id="mine", command=["echo", "hi"], queue="high")
    [new] = await dead.retry([old])
    assert isinstance(new, str)
    assert new != old
    assert await dead.newest() == []
    status = await Views(queue.store).task(new)
    assert (status.state, status.queue, status.retry_of, status.traceparent) == (
        State.QUEUED, "high", old, TRACE,
    )  # fmt: skip
    assert (await Views(queue.store).task(old)).retry_of == ""
    delivery = await queue.take_one()
    assert (delivery.task_id, delivery.attempt) == (new, 1)
    assert (delivery.traceparent, delivery.tracestate) == (TRACE, "a=b")
    assert json.loads(delivery.document) == {
        "image": "busybox", "command": ["echo", "hi"], "queue": "high",
    }  # fmt: skip
    await queue.finish(delivery)
    assert [entry["id"].decode() for entry in queue.entries("results")] == [old, new]


async def test_asking_twice_makes_no_second_task(queue: QueueUnderTest, dead: DeadLetters) -> None:
    old = await died(queue)
    [letter] = await dead.newest()
    first = await dead.retry([old, letter.entry_id, old])
    assert len(set(cast(list[str], first))) == 1
    assert await dead.retry([old, letter.entry_id]) == first[:2]
    assert len(await queue.take()) == 1
    assert await dead.retry([old]) == first[:1], "also while it runs"


async def test_a_lost_reply_makes_no_second_task(
    queue: QueueUnderTest, dead: DeadLetters, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = await died(queue)
    real, calls = Scripts.call, []

    async def call(self: Scripts, name: str, args: Sequence[str], **more: Any) -> list[Any]:
        calls.append(name)
        await real(self, name, args, **more)
        return await real(self, name, args, **more)  # as if the first reply had been lost

    monkeypatch.setattr(Scripts, "call", call)
    [new] = await dead.retry([old])
    monkeypatch.undo()
    assert calls == ["revive"]
    assert [delivery.task_id for delivery in await queue.take()] == [new]


async def test_many_who_ask_at_once_get_one_task(queue: QueueUnderTest, dead: DeadLetters) -> None:
    old = await died(queue)
    answers: list[Any] = []

    async def ask() -> None:
        answers.extend(await dead.retry([old]))

    async with anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(ask)
    assert len(set(answers)) == 1
    assert len(await queue.take()) == 1


async def test_a_task_that_dies_again_can_be_tried_again(queue: QueueUnderTest, dead: DeadLetters) -> None:
    ids: list[Any] = [await died(queue)]
    for _ in range(3):
        ids += await dead.retry([ids[-1]])
        await queue.finish(await queue.take_one(), "final", NOT_PULLED)
    assert len(set(ids)) == 4
    assert [letter.id for letter in await dead.newest()] == [ids[-1]]
    assert (await Views(queue.store).task(ids[-1])).retry_of == ids[-2]


async def test_identity_and_time_of_the_original_do_not_stand_in_the_way(
    queue: QueueUnderTest, dead: DeadLetters
) -> None:
    later = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    [first, second] = [
        await died(queue, id="a", idempotency_key="k", delay=3600),
        await died(queue, id="b", not_before=datetime.now(UTC) + timedelta(days=1)),
    ]
    third = await died_plain(queue, json.dumps({"image": "x", "id": "a", "not_before": later}))
    new = await dead.retry([first, second, third])
    taken = {delivery.task_id: json.loads(delivery.document) for delivery in await queue.take()}
    assert list(taken) == new, "at once, in order"
    assert [*taken.values()] == [{"image": "busybox"}, {"image": "busybox"}, {"image": "x"}]


@pytest.mark.parametrize(("document", "where"), [({}, "high"), ({"queue": "low"}, "low")])
async def test_it_goes_to_the_queue_it_was_meant_for(
    queue: QueueUnderTest, dead: DeadLetters, document: dict[str, str], where: str
) -> None:
    old = await died_plain(queue, json.dumps({"image": "x", **document}), "high")
    await dead.retry([old])
    assert (await queue.take_one()).queue == where


@pytest.mark.parametrize(
    ("document", "says", "field"),
    [
        (b"\xff", "not UTF-8", None),
        (b'{"image": ', "Invalid JSON", None),
        (b'{"image": "x", "timeout": "60"}', "timeout: must be a valid number", "timeout"),
        (b"x" * 70_000, "task: of dead letter", "task"),
    ],
)
async def test_what_cannot_run_as_it_is_stays(
    queue: QueueUnderTest, dead: DeadLetters, document: bytes, says: str, field: str | None
) -> None:
    error = await refusal(dead, await died_plain(queue, document))
    assert isinstance(error, InvalidTask)
    assert says in str(error)
    assert error.field == field
    assert "submit it" in str(error)


async def test_what_has_expired_stays(queue: QueueUnderTest, dead: DeadLetters) -> None:
    past = datetime(2020, 1, 1, tzinfo=UTC).isoformat()
    error = await refusal(dead, await died_plain(queue, json.dumps({"image": "x", "expires_at": past})))
    assert isinstance(error, ExpiredTask)
    assert "expires_at: 2020-01-01T00:00:00+00:00 has passed" in str(error)
    future = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    other = await died_plain(queue, json.dumps({"image": "x", "expires_at": future}))
    [new] = await dead.retry([other])
    assert [delivery.task_id for delivery in await queue.take()] == [new]


async def test_a_queue_nobody_serves_and_a_full_one_keep_the_letter(
    queue: QueueUnderTest, dead: DeadLetters
) -> None:
    lost = await died_plain(queue, json.dumps({"image": "x", "queue": "nowhere"}))
    late = await died(queue)
    await queue.tick(limits=Limits(max_length=1))
    waiting = await queue.submit()
    no_queue, full = await dead.retry([lost, late])
    assert isinstance(no_queue, UnknownQueue)
    assert isinstance(full, QueueFull)
    assert full.recoverable
    assert {letter.id for letter in await dead.newest()} == {lost, late}
    assert [delivery.task_id for delivery in await queue.take()] == [waiting]
    [new] = await dead.retry([late])
    assert isinstance(new, str)
    await queue.tick(queues=["nowhere"])
    [served] = await dead.retry([lost])
    assert [d.task_id for d in await queue.take(queues={"nowhere": 1})] == [served]
    queue.redis.delete(queue.stream("nowhere"))  # empty


async def test_each_of_many_has_its_own_answer(queue: QueueUnderTest, dead: DeadLetters) -> None:
    good = [await died(queue) for _ in range(PAGE + 5)]
    bad = await died_plain(queue, b"{")
    answers = await dead.retry([bad, *good, "nobody", "1-1"])
    assert isinstance(answers[0], InvalidTask)
    assert [type(answer) for answer in answers[1:-2]] == [str] * len(good)
    assert [str(answer) for answer in answers[-2:]] == ["no dead letter 'nobody'", "no dead letter '1-1'"]
    assert all(isinstance(answer, TaskNotFound) for answer in answers[-2:])
    taken = [delivery.task_id for delivery in await queue.take(1000)]
    assert taken == answers[1:-2], "in the order asked for"


async def test_a_letter_whose_task_is_forgotten_can_be_tried_again(
    queue: QueueUnderTest, dead: DeadLetters
) -> None:
    old = await died(queue)
    [letter] = await dead.newest()
    queue.redis.delete(queue.key(f"task:{old}"))
    [new] = await dead.retry([old])
    assert isinstance(new, str)
    assert queue.record(old) == {}, "nothing that stays for ever"
    assert await dead.retry([letter.entry_id]) == [new]


# --- dropping, and by the client ----------------------------------------------------------


async def test_a_dropped_letter_is_gone(queue: QueueUnderTest, dead: DeadLetters) -> None:
    old, other = await died(queue), await died(queue)
    [_, letter] = await dead.newest()
    assert await dead.drop([letter.entry_id, other, "nobody"]) == [True, True, False]
    assert await dead.newest() == []
    assert isinstance((await dead.retry([old]))[0], TaskNotFound)


async def test_the_client_has_the_same_verbs(queue: QueueUnderTest) -> None:
    old = await died(queue)
    lost = await died_plain(queue, b"{")
    async with AsyncClient(queue.server.url, stream=STREAM) as client:
        handle, error = await client.retry_dead([old, lost])
        assert not isinstance(handle, Exception)
        assert (await handle.status()).retry_of == old
        assert isinstance(error, InvalidTask)
        [entry] = await client.dead_ids()
        assert await client.drop_dead([entry]) == [True]
        assert await client.dead() == []
