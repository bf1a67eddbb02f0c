"""Answers of a real Redis that stand for a state which passes: borne, and nothing lost or doubled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from dispatcher.client import AsyncClient, Task
from dispatcher.errors import QueueUnavailable
from dispatcher.queue import connection
from dispatcher.queue.connection import command, connect, read_after
from dispatcher.queue.exchange import Submission
from dispatcher.queue.store import Store
from tests.support.troubles import ANSWERS, TroubledServer
from tests.support.waiting import wait_until

STREAM = "dispatcher:tasks"


@pytest.fixture
def troubled(tmp_path: Path) -> Iterator[TroubledServer]:
    server = TroubledServer(tmp_path)
    yield server
    server.close()


async def client_id(store: Store) -> int:
    return int(await command(store.redis, "CLIENT", "ID"))


@pytest.mark.parametrize("answer", ANSWERS)
async def test_an_answer_that_passes_is_told_as_such_and_passes(
    troubled: TroubledServer, answer: str
) -> None:
    store = Store(troubled.server.url, STREAM, max_connections=1)
    submission = Submission.of(Task(image="busybox"))
    try:
        await store.enqueue(Submission.of(Task(image="busybox")))
        with ANSWERS[answer](troubled) as says:
            with pytest.raises(QueueUnavailable, match=says) as told:
                await store.enqueue(submission)
            assert told.value.recoverable
            if answer not in {"OOM", "LOADING"}:
                with pytest.raises(QueueUnavailable):  # told by redis-py in another way than in a script
                    await command(store.redis, "XADD", "somewhere", "*", "a", "b")
        assert await store.enqueue(submission) == submission.task_id
        assert await store.enqueue(submission) == submission.task_id
        assert troubled.client.xlen(STREAM) == 2
    finally:
        await store.aclose()


@pytest.mark.parametrize("answer", ["READONLY", "MASTERDOWN"])
async def test_a_server_that_became_a_replica_is_left(troubled: TroubledServer, answer: str) -> None:
    for ask in (
        lambda store: store.enqueue(Submission.of(Task(image="busybox"))),  # from within a script
        lambda store: command(store.redis, "SET", "{dispatcher:tasks}:meta:x", "y"),
    ):
        store = Store(troubled.server.url, STREAM, max_connections=1)
        try:
            await store.enqueue(Submission.of(Task(image="busybox")))
            before = await client_id(store)
            assert await client_id(store) == before, "one connection"
            with ANSWERS[answer](troubled), pytest.raises(QueueUnavailable):
                await ask(store)
            assert await client_id(store) != before, "by its name the new master may be found"
        finally:
            await store.aclose()


async def test_who_is_unblocked_asks_again(troubled: TroubledServer) -> None:
    redis = connect(troubled.server.url, max_connections=1)
    told: list[str] = []

    async def read() -> None:
        try:
            await read_after(redis, 1, {STREAM: "0-0"})
        except QueueUnavailable as error:
            told.append(str(error))
        assert [key for key, _, _ in await read_after(redis, 1, {STREAM: "0-0"})] == [STREAM]

    def blocked() -> list[int]:
        return [int(c["id"]) for c in troubled.client.client_list() if "b" in c["flags"]]

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(read)
            [blocked_id] = await wait_until(blocked)
            assert troubled.client.client_unblock(blocked_id, error=True)
            troubled.client.xadd(STREAM, {"task": "{}"})
        assert "UNBLOCKED" in told[0]
    finally:
        await redis.aclose()


async def test_a_wait_bears_being_unblocked_cut_and_scripts_forgotten(troubled: TroubledServer) -> None:
    """Also NOSCRIPT, after which the very same call goes through."""
    async with AsyncClient(troubled.server.url) as client, anyio.create_task_group() as group:
        handle = await client.submit(Task(image="busybox"))
        ends = []

        async def wait() -> None:
            ends.append((await handle.wait(30)).state)

        def blocked() -> list[int]:
            return [int(c["id"]) for c in troubled.client.client_list() if "b" in c["flags"]]

        group.start_soon(wait)
        for kind in ("unblock", "kill"):
            [blocked_id] = await wait_until(blocked)
            if kind == "unblock":
                troubled.client.client_unblock(blocked_id, error=True)
            else:
                troubled.client.client_kill_filter(_id=blocked_id)
            await wait_until(lambda: blocked() not in ([], [blocked_id]))  # noqa: B023 - ends first
        troubled.client.script_flush()
        assert (await handle.cancel()).state == "cancelled"
        troubled.client.script_flush()
        assert (await client.submit(Task(image="busybox"))).id
    assert ends == ["cancelled"]


async def test_a_server_that_hangs_holds_a_call_up_for_its_tries_only(
    troubled: TroubledServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SOCKET_TIMEOUT", 0.3)
    store = Store(troubled.server.url, STREAM)
    submission = Submission.of(Task(image="busybox"))
    try:
        await store.ping()
        with troubled.hanging() as says, anyio.fail_after(4), pytest.raises(QueueUnavailable, match=says):
            await store.enqueue(submission)
        assert await store.enqueue(submission) == submission.task_id
        await wait_until(lambda: troubled.client.xlen(STREAM) == 1)
    finally:
        await store.aclose()
