"""What is kept of tasks' output, within a limit on all of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from dispatcher.errors import QueueUnavailable
from dispatcher.queue import connection
from dispatcher.queue.tails import LIVE_LENGTH, Piece, Tail, Tails
from tests.queue.conftest import STREAM, QueueUnderTest

KIB = 1024


@pytest.fixture
async def tails(queue: QueueUnderTest) -> AsyncIterator[Tails]:
    tails = Tails(queue.server.url, STREAM, retention=100, total_limit=4 * KIB)
    yield tails
    await tails.aclose()


def total(queue: QueueUnderTest) -> int:
    return int(queue.redis.hget(queue.key("meta:tails"), "") or 0)


async def test_what_is_kept_is_given_back(tails: Tails, queue: QueueUnderTest) -> None:
    tail = Tail(b"\x00\xff the end\n", total=1_000, attempt=2, asked="me")
    await tails.keep("one", tail)
    assert await tails.get("one") == tail
    assert tail.dropped == 1_000 - len(tail.data)
    assert 90_000 < queue.lifetime_ms("tail:one") <= 100_000
    assert total(queue) == len(tail.data)


async def test_nothing_kept_is_none(tails: Tails) -> None:
    assert await tails.get("nobody") is None


async def test_a_later_tail_of_a_task_replaces_the_earlier(tails: Tails, queue: QueueUnderTest) -> None:
    await tails.keep("one", Tail(b"x" * KIB, KIB, 1))
    await tails.keep("one", Tail(b"yy", 2, 2))
    assert await tails.get("one") == Tail(b"yy", 2, 2)
    assert total(queue) == 2


@pytest.mark.parametrize("late", [Tail(b"xxx", 3, 2, "me"), Tail(b"x" * 99, 99, 1, "me")])
async def test_an_earlier_look_that_comes_late_replaces_nothing_but_answers(
    tails: Tails, queue: QueueUnderTest, late: Tail
) -> None:
    last = Tail(b"xxxx the end", 12, 2)
    await tails.keep("one", last)
    await tails.keep("one", late)
    assert await tails.get("one") == replace(last, asked="me")
    assert total(queue) == len(last.data)
    assert queue.lifetime_ms("tail:one") > 0


async def test_a_later_look_at_the_same_output_takes_the_place_of_the_earlier(
    tails: Tails, queue: QueueUnderTest
) -> None:
    for tail in (Tail(b"abc", 3, 1), Tail(b"abcde", 5, 1), Tail(b"cde", 5, 1)):
        await tails.keep("one", tail)
        assert await tails.get("one") == tail
    assert total(queue) == 3


async def test_over_the_limit_the_oldest_lose_their_output_and_say_so(
    tails: Tails, queue: QueueUnderTest
) -> None:
    for number in range(6):
        await tails.keep(f"t{number}", Tail(bytes([number]) * KIB, KIB, 1))
        queue.ask("ZADD", queue.key("index:tails"), 1_000 + queue.now_ms() + number, f"t{number}")
    kept = [await tails.get(f"t{number}") for number in range(6)]
    assert [len(tail.data) if tail else None for tail in kept] == [0, 0, KIB, KIB, KIB, KIB]
    assert kept[0] == Tail(b"", KIB, 1)
    assert kept[0].dropped == KIB
    assert total(queue) == 4 * KIB


async def test_one_that_is_alone_over_the_limit_is_not_kept(tails: Tails, queue: QueueUnderTest) -> None:
    await tails.keep("small", Tail(b"x", 1, 1))
    await tails.keep("large", Tail(b"x" * 5 * KIB, 5 * KIB, 1))
    assert await tails.get("large") == Tail(b"", 5 * KIB, 1)
    assert total(queue) == 0


async def test_what_is_past_its_time_is_counted_no_more(tails: Tails, queue: QueueUnderTest) -> None:
    await tails.keep("old", Tail(b"x" * KIB, KIB, 1))
    queue.redis.delete(queue.key("tail:old"))
    queue.ask("ZADD", queue.key("index:tails"), queue.now_ms() - 200_000, "old")
    await tails.keep("new", Tail(b"x", 1, 1))
    assert total(queue) == 1
    assert queue.members("index:tails").keys() == {"new"}


async def test_one_that_is_gone_already_is_not_made_again_to_be_dropped(
    tails: Tails, queue: QueueUnderTest
) -> None:
    await tails.keep("gone", Tail(b"x" * 4 * KIB, 4 * KIB, 1))
    queue.redis.delete(queue.key("tail:gone"))  # evicted, or past its time a moment ago
    await tails.keep("new", Tail(b"x", 1, 1))
    assert await tails.get("gone") is None
    assert total(queue) == 1


async def test_interest_is_shown_for_a_while(tails: Tails, queue: QueueUnderTest) -> None:
    assert not await tails.wanted("one")
    await tails.show_interest("one")
    assert await tails.wanted("one")
    assert queue.lifetime_ms("follow:one") > 0


async def test_live_pieces_run_by_from_where_one_was(tails: Tails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BLOCK_TIMEOUT", 0.05)
    await tails.publish("one", 1, 0, b"\xffab")
    await tails.publish("one", 1, 3, b"cd")
    pieces = [piece async for piece in tails.live("one", "0-0")]
    assert [(p.attempt, p.offset, p.data) for p in pieces] == [(1, 0, b"\xffab"), (1, 3, b"cd")]
    assert [piece async for piece in tails.live("one", pieces[0].entry_id)] == pieces[1:]
    nothing: list[Piece] = []
    assert [piece async for piece in tails.live("one", pieces[1].entry_id)] == nothing
    await tails.begin_live("one")
    assert [piece async for piece in tails.live("one", "0-0")] == nothing


async def test_live_pieces_are_bounded_and_go_away(tails: Tails, queue: QueueUnderTest) -> None:
    for number in range(LIVE_LENGTH + 150):
        await tails.publish("one", 1, number, b"x")
    assert int(queue.ask("XLEN", queue.key("live:one"))) <= LIVE_LENGTH + 100
    assert queue.lifetime_ms("live:one") > 0


async def test_without_room_live_output_is_refused_and_a_tail_is_kept(
    tails: Tails, queue: QueueUnderTest
) -> None:
    queue.ask("CONFIG", "SET", "maxmemory", "1")
    await tails.keep("one", Tail(b"x", 1, 1))  # it is bounded, and its task's last word
    with pytest.raises(QueueUnavailable):
        await tails.publish("one", 1, 0, b"x")
