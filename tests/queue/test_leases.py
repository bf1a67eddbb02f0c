"""What an instance holds: renewed, told when it is lost or unwanted, given up for sure."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import anyio
import pytest

from dispatcher.dispatch.admission import Admission
from dispatcher.errors import LeaseLost, QueueUnavailable
from dispatcher.model import Delivery, State
from dispatcher.policy import Policy
from dispatcher.queue import leases as leases_module
from dispatcher.queue.exchange import Action, Held, Placed, Settlement, Submission
from dispatcher.queue.leases import Lease, LeaseKeeper, Wish
from dispatcher.queue.store import Store
from dispatcher.task import Task
from tests.queue.conftest import FAILURE, LEASE, STREAM, SUCCESS, WEIGHTS, QueueUnderTest
from tests.support import redis_server as servers
from tests.support.waiting import wait_until

SHORT = 0.4


@asynccontextmanager
async def renewing(keeper: LeaseKeeper) -> AsyncIterator[None]:
    async with anyio.create_task_group() as group:
        group.start_soon(keeper.run, name="leases")
        try:
            yield
        finally:
            group.cancel_scope.cancel()


async def held(queue: QueueUnderTest, keeper: LeaseKeeper) -> Lease:
    await queue.submit()
    return keeper.hold(await queue.take_one())


async def taken_by_another(queue: QueueUnderTest, lease: Lease) -> None:
    queue.ask("ZADD", queue.key("index:leases"), 1, lease.task_id)
    queue.forget_gaps()
    await queue.tick("b")
    await queue.take_one("b")


async def test_what_is_held_is_renewed(queue: QueueUnderTest) -> None:
    keeper = LeaseKeeper(queue.store, SHORT)
    leases = [await held(queue, keeper) for _ in range(3)]
    for lease in leases:
        queue.ask("ZADD", queue.key("index:leases"), 1, lease.task_id)
    async with renewing(keeper):
        await wait_until(lambda: min(queue.members("index:leases").values()) > queue.now_ms())
    assert keeper.held == {lease.task_id: lease for lease in leases}


async def test_what_is_forgotten_is_not_renewed(queue: QueueUnderTest) -> None:
    keeper = LeaseKeeper(queue.store, SHORT)
    forgotten, kept = await held(queue, keeper), await held(queue, keeper)
    keeper.forget(forgotten)
    for lease in (forgotten, kept):
        queue.ask("ZADD", queue.key("index:leases"), 1, lease.task_id)
    async with renewing(keeper):
        await wait_until(lambda: queue.members("index:leases")[kept.task_id] > 1)
    assert queue.members("index:leases")[forgotten.task_id] == 1


async def test_a_lost_lease_ends_all_that_is_done_for_its_task(queue: QueueUnderTest) -> None:
    keeper = LeaseKeeper(queue.store, SHORT)
    lost, kept = await held(queue, keeper), await held(queue, keeper)
    await taken_by_another(queue, lost)
    async with renewing(keeper):
        with anyio.fail_after(5), lost.scope:
            await anyio.sleep_forever()
    assert lost.lost
    assert not kept.lost
    assert not kept.scope.cancel_called
    assert keeper.held == {kept.task_id: kept}


async def test_progress_is_recorded_under_the_lease(queue: QueueUnderTest) -> None:
    keeper = LeaseKeeper(queue.store, SHORT)
    lease = await held(queue, keeper)
    await lease.mark(State.STARTING, {"daemon": "engine-1"})
    record = queue.record(lease.task_id)
    assert (record["state"], record["daemon"], lease.state) == ("starting", "engine-1", State.STARTING)
    await taken_by_another_on(queue, lease)
    with pytest.raises(LeaseLost):
        await lease.mark(State.RUNNING)
    assert queue.record(lease.task_id)["state"] == "starting"
    assert lease.scope.cancel_called


async def taken_by_another_on(queue: QueueUnderTest, lease: Lease) -> None:
    queue.ask("ZADD", queue.key("index:leases"), 1, lease.task_id)
    queue.forget_gaps()
    await queue.tick("b")


async def test_a_cancellation_becomes_a_wish(queue: QueueUnderTest) -> None:
    keeper = LeaseKeeper(queue.store, SHORT)
    lease = await held(queue, keeper)
    await queue.store.cancel(lease.task_id)
    async with renewing(keeper):
        with anyio.fail_after(5), lease.interruptible():
            await anyio.sleep_forever()
    assert lease.wish is Wish.CANCEL
    assert not lease.scope.cancel_called


async def test_a_task_cancelled_before_it_was_taken_comes_with_the_wish(queue: QueueUnderTest) -> None:
    keeper = LeaseKeeper(queue.store, SHORT)
    lease = await held(queue, keeper)
    await lease.mark(State.RUNNING, {"daemon": "engine-1"})
    await queue.store.cancel(lease.task_id)
    await taken_by_another_on(queue, lease)
    assert keeper.hold(await queue.take_one("b")).wish is Wish.CANCEL


async def test_wishes_cut_short_what_is_interruptible_and_nothing_else(queue: QueueUnderTest) -> None:
    lease = await held(queue, LeaseKeeper(queue.store, SHORT))
    passed = []
    with anyio.fail_after(5):
        lease.request(Wish.DETACH)
        await anyio.lowlevel.checkpoint()
        passed.append("outside")
        with lease.interruptible():
            await anyio.sleep_forever()
        await anyio.lowlevel.checkpoint()
        passed.append("after")
    assert passed == ["outside", "after"]
    assert lease.wish is Wish.DETACH


async def test_to_cancel_outweighs_to_let_go(queue: QueueUnderTest) -> None:
    lease = await held(queue, LeaseKeeper(queue.store, SHORT))
    seen = [lease.wish]
    for wish in (Wish.DETACH, Wish.CANCEL, Wish.DETACH):
        lease.request(wish)
        seen.append(lease.wish)
    assert seen == [None, Wish.DETACH, Wish.CANCEL, Wish.CANCEL]


async def test_what_one_wish_cuts_short_no_other_does(queue: QueueUnderTest) -> None:
    lease = await held(queue, LeaseKeeper(queue.store, SHORT))
    passed = []
    with anyio.fail_after(5):
        lease.request(Wish.CANCEL)
        with lease.interruptible(Wish.DETACH):
            await anyio.lowlevel.checkpoint()
            passed.append("a wish from before")
            lease.request(Wish.CANCEL)
            await anyio.lowlevel.checkpoint()
            passed.append("the same again")
            lease.request(Wish.DETACH)
            await anyio.sleep_forever()
        with lease.interruptible(Wish.DETACH):
            await anyio.sleep_forever()
        with lease.interruptible():
            await anyio.sleep_forever()
    assert passed == ["a wish from before", "the same again"]
    assert lease.wish is Wish.CANCEL, "both are wished, and this one more"


async def test_giving_up_records_and_lets_go(queue: QueueUnderTest) -> None:
    keeper = LeaseKeeper(queue.store, SHORT)
    lease = await held(queue, keeper)
    await lease.give_up("retry", FAILURE, delay=60, budget="app")
    assert not keeper.held
    assert queue.record(lease.task_id)["app"] == "1"


async def test_giving_up_what_is_anothers_is_refused(queue: QueueUnderTest) -> None:
    keeper = LeaseKeeper(queue.store, SHORT)
    lease = await held(queue, keeper)
    await taken_by_another(queue, lease)
    with pytest.raises(LeaseLost):
        await lease.give_up("final", SUCCESS)
    assert lease.lost
    assert not keeper.held
    assert queue.entries("results") == []


async def test_what_was_given_up_during_a_renewal_is_not_lost(
    queue: QueueUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = LeaseKeeper(queue.store, SHORT)
    lease = await held(queue, keeper)
    renew_all, renewed = queue.store.renew_all, anyio.Event()

    async def late(leases: Sequence[tuple[str, str]], seconds: float) -> list[Held]:
        if not renewed.is_set():
            await lease.give_up("final", SUCCESS)
        answers = await renew_all(leases, seconds)
        renewed.set()
        return answers

    monkeypatch.setattr(queue.store, "renew_all", late)
    async with renewing(keeper):
        with anyio.fail_after(5):
            await renewed.wait()
    assert not lease.lost
    assert not lease.scope.cancel_called


def listen(queue: QueueUnderTest, monkeypatch: pytest.MonkeyPatch) -> list[Held]:
    """All that renewals are answered from now on."""
    renew_all, answers = queue.store.renew_all, list[Held]()

    async def heard(leases: Sequence[tuple[str, str]], seconds: float) -> list[Held]:
        found = await renew_all(leases, seconds)
        answers.extend(found)
        return found

    monkeypatch.setattr(queue.store, "renew_all", heard)
    return answers


@pytest.mark.parametrize("action", ["final", "retry", "release", "detach"])
async def test_a_renewal_that_overtakes_the_answer_to_giving_up_is_no_loss(
    queue: QueueUnderTest, monkeypatch: pytest.MonkeyPatch, action: Action
) -> None:
    keeper = LeaseKeeper(queue.store, SHORT)
    lease = await held(queue, keeper)
    answers = listen(queue, monkeypatch)
    finish = queue.store.finish

    async def late(settlement: Settlement) -> Literal["ok", "lost"]:
        answer = await finish(settlement)
        await wait_until(lambda: answers.count("lost") >= 2)
        return answer

    monkeypatch.setattr(queue.store, "finish", late)
    cleaned_up = False
    async with renewing(keeper):
        with anyio.fail_after(5), lease.scope:
            await lease.give_up(action, FAILURE)
            await anyio.lowlevel.checkpoint()
            cleaned_up = True
    assert cleaned_up
    assert not lease.lost
    assert not lease.scope.cancel_called
    assert not keeper.held


async def test_what_is_lost_while_it_is_given_up_is_told_by_the_answer_to_that(
    queue: QueueUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = LeaseKeeper(queue.store, SHORT)
    lease = await held(queue, keeper)
    answers = listen(queue, monkeypatch)
    finish = queue.store.finish

    under_way = anyio.Event()

    async def late(settlement: Settlement) -> Literal["ok", "lost"]:
        under_way.set()
        await wait_until(lambda: "lost" in answers)
        return await finish(settlement)

    async def give_up() -> None:
        with pytest.raises(LeaseLost):
            await lease.give_up("final", SUCCESS)

    monkeypatch.setattr(queue.store, "finish", late)
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(give_up)
            await under_way.wait()
            await taken_by_another(queue, lease)
            async with renewing(keeper):
                await wait_until(lambda: not keeper.held)
    assert lease.lost
    assert not keeper.held
    assert queue.entries("results") == []


async def test_a_cancellation_is_heard_while_a_write_is_under_way(queue: QueueUnderTest) -> None:
    keeper = LeaseKeeper(queue.store, SHORT)
    lease = await held(queue, keeper)
    with lease.settling():
        lease.heard("cancel")
        lease.heard("lost")
        seen = [(lease.lost, lease.scope.cancel_called, len(keeper.held))]
    assert lease.wish is Wish.CANCEL
    lease.heard("lost")
    seen.append((lease.lost, lease.scope.cancel_called, len(keeper.held)))
    assert seen == [(False, False, 1), (True, True, 0)]


async def test_a_renewal_that_overtakes_the_answer_with_the_tasks_own_id_is_no_loss(
    queue: QueueUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = LeaseKeeper(queue.store, SHORT)
    queue.push('{"image": "busybox", "id": "mine"}')
    delivery = await queue.take_one()
    lease = keeper.hold(delivery)
    answers = listen(queue, monkeypatch)
    place = queue.store.place

    async def late(placed: Delivery, task: Task) -> tuple[Placed, str]:
        answer = await place(placed, task)
        await wait_until(lambda: answers.count("lost") >= 2)
        return answer

    monkeypatch.setattr(queue.store, "place", late)
    admission = Admission(queue.store, keeper, Policy(), max_bytes=65_536)
    async with renewing(keeper):
        with anyio.fail_after(5), lease.scope:
            assert await admission.admit(delivery, lease)
            await wait_until(lambda: answers[-1] == "ok")
    assert not lease.lost
    assert not lease.scope.cancel_called
    assert keeper.held == {"mine": lease}


async def test_a_renewal_that_fails_is_tried_once_and_soon_again(
    queue: QueueUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease_seconds = 4.0  # so renewals come a second apart
    monkeypatch.setattr(leases_module, "RETRY_PAUSE", 0.05)
    keeper = LeaseKeeper(queue.store, lease_seconds)
    lease = await held(queue, keeper)
    script, calls = queue.store._vital._script, list[float]()

    def failing(name: str) -> Callable[..., Awaitable[Any]]:
        if name != "renew":
            return script(name)
        calls.append(time.monotonic())
        if len(calls) <= 3:
            raise ConnectionResetError("peer")
        return script(name)

    monkeypatch.setattr(queue.store._vital, "_script", failing)
    started = time.monotonic()
    queue.ask("ZADD", queue.key("index:leases"), 1, lease.task_id)
    async with renewing(keeper):
        await wait_until(lambda: len(calls) == 5)
    pauses = [b - a for a, b in pairwise([started, *calls])]
    usual = lease_seconds / 4
    # Tries within one call would be 0.1 s apart or more, and the keeper's own as well as that.
    assert min(pauses[0], pauses[4]) > usual * 0.9
    assert max(pauses[1:4]) < usual / 2
    assert queue.members("index:leases")[lease.task_id] > queue.now_ms()
    assert not lease.lost


async def test_renewing_many_is_not_repeated_by_itself(
    queue: QueueUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def failing(name: str) -> Callable[..., Awaitable[Any]]:
        calls.append(name)
        raise ConnectionResetError("peer")

    monkeypatch.setattr(queue.store._vital, "_script", failing)
    with pytest.raises(QueueUnavailable):
        await queue.store.renew_all([("one", "a/1/1")], LEASE)
    assert calls == ["renew"]
    monkeypatch.undo()


async def test_a_slow_answer_is_part_of_the_interval(
    queue: QueueUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease_seconds = 2.0
    keeper = LeaseKeeper(queue.store, lease_seconds)
    await held(queue, keeper)
    renew_all, calls = queue.store.renew_all, list[float]()

    async def slow(leases: Sequence[tuple[str, str]], seconds: float) -> list[Held]:
        calls.append(time.monotonic())
        await anyio.sleep(lease_seconds / 4 * 0.8)
        return await renew_all(leases, seconds)

    monkeypatch.setattr(queue.store, "renew_all", slow)
    async with renewing(keeper):
        await wait_until(lambda: len(calls) == 4)
    assert calls[3] - calls[0] < 3 * lease_seconds / 4 * 1.4


async def test_a_task_that_got_its_own_id_during_a_renewal_is_not_lost(
    queue: QueueUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = LeaseKeeper(queue.store, SHORT)
    queue.push('{"image": "busybox", "id": "mine"}')
    delivery = await queue.take_one()
    lease = keeper.hold(delivery)
    renew_all, renewed = queue.store.renew_all, [0]

    async def late(leases: Sequence[tuple[str, str]], seconds: float) -> list[Held]:
        if not renewed[0]:
            verdict, task_id = await queue.store.place(delivery, Task(image="busybox", id="mine"))
            assert verdict == "held"
            keeper.rename(lease, task_id)
        answers = await renew_all(leases, seconds)
        renewed[0] += 1
        return answers

    monkeypatch.setattr(queue.store, "renew_all", late)
    async with renewing(keeper):
        await wait_until(lambda: renewed[0] == 2)
    assert not lease.lost
    assert keeper.held == {"mine": lease}


async def test_who_waits_until_nothing_is_held_is_told(queue: QueueUnderTest) -> None:
    keeper = LeaseKeeper(queue.store, SHORT)
    with anyio.fail_after(5):
        await keeper.until_empty()
        leases = [await held(queue, keeper) for _ in range(2)]
        async with anyio.create_task_group() as group:
            group.start_soon(keeper.until_empty)
            for lease in leases:
                await anyio.lowlevel.checkpoint()
                await lease.give_up("final", SUCCESS)
        assert not keeper.held


async def test_a_result_waits_for_redis_to_come_back(tmp_path: Path) -> None:
    process, server = servers.start(tmp_path, "--appendfsync", "always")
    store = Store(server.url, STREAM)
    keeper = LeaseKeeper(store, SHORT)
    try:
        await store.enqueue(Submission.of(Task(image="busybox", id="one")))
        (delivery,) = await store.take(
            1, instance="a", incarnation="1", lease=60, queues=WEIGHTS, daemon="engine-1"
        )
        lease = keeper.hold(delivery)
        process.kill()
        process.wait()
        async with anyio.create_task_group() as group:
            group.start_soon(keeper.run, name="leases")
            finishing = anyio.Event()

            async def give_up() -> None:
                await lease.give_up("final", SUCCESS)
                finishing.set()

            group.start_soon(give_up)
            await anyio.lowlevel.checkpoint()
            process, server = servers.start(tmp_path, "--appendfsync", "always")
            with anyio.fail_after(20):
                await finishing.wait()
            group.cancel_scope.cancel()
        assert not lease.lost
        with server.client() as client:
            assert client.xlen(store.keys.of("results")) == 1
            assert client.hget(store.keys.record("one"), "state") == b"succeeded"
    finally:
        await store.aclose()
        process.terminate()
        process.wait()
