"""What an owner may write for its task, and how it gives the task up."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from dispatcher.model import Outcome, Reason, State
from dispatcher.queue.exchange import Action, Limits, Submission
from dispatcher.task import Task
from tests.queue.conftest import FAILURE, LEASE, POISONED, SUCCESS, QueueUnderTest

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
RFC_3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
RESULT_FIELDS = {
    "id", "state", "reason", "exit_code", "attempt", "queue", "started_at", "finished_at", "traceparent",
}  # fmt: skip


# --- renew ------------------------------------------------------------------------------


async def test_a_renewal_moves_the_end_of_the_lease_and_records_progress(queue: QueueUnderTest) -> None:
    await queue.submit()
    delivery = await queue.take_one(lease=1)
    before = queue.members("index:leases")[delivery.task_id]
    assert await queue.renew(delivery, state="pulling", container="c1") == "ok"
    assert queue.members("index:leases")[delivery.task_id] > before + 20_000
    record = queue.record(delivery.task_id)
    assert (record["state"], record["container"]) == ("pulling", "c1")


async def test_a_renewal_of_a_cancelled_task_says_so_and_is_one(queue: QueueUnderTest) -> None:
    await queue.submit()
    delivery = await queue.take_one(lease=1)
    await queue.store.cancel(delivery.task_id)
    before = queue.members("index:leases")[delivery.task_id]
    assert await queue.renew(delivery, state="running") == "cancel"
    assert queue.members("index:leases")[delivery.task_id] > before
    assert queue.record(delivery.task_id)["state"] == "running"


async def test_whoever_lost_the_task_writes_nothing(queue: QueueUnderTest) -> None:
    await queue.submit()
    old = await queue.take_one("a")
    queue.lapse(old)
    await queue.tick()
    between = queue.record(old.task_id)
    assert await queue.renew(old, state="running") == "lost"
    assert queue.record(old.task_id) == between
    new = await queue.take_one("a")
    assert new.owner != old.owner
    held = queue.record(old.task_id)
    leases = queue.members("index:leases")
    assert await queue.renew(old, state="running") == "lost"
    assert await queue.finish(old) == "lost"
    assert await queue.finish(old, "retry", FAILURE, budget="app") == "lost"
    assert queue.record(old.task_id) == held
    assert queue.members("index:leases") == leases
    assert queue.entries("results") == []
    assert await queue.finish(new) == "ok"


async def test_a_lapsed_lease_that_nobody_took_over_is_still_ones_own(queue: QueueUnderTest) -> None:
    await queue.submit()
    delivery = await queue.take_one()
    queue.lapse(delivery)
    assert await queue.renew(delivery) == "ok"
    await queue.tick()
    assert await queue.finish(delivery) == "ok"


@pytest.mark.parametrize("token", ["", "a", "a/1", "b/1/1", "a/2/1"])
async def test_only_the_whole_token_counts(queue: QueueUnderTest, token: str) -> None:
    await queue.submit()
    delivery = await queue.take_one()
    stranger = replace(delivery, owner=token)
    assert await queue.renew(stranger) == "lost"
    assert await queue.finish(stranger) == "lost"
    await queue.finish(delivery, "release")
    assert await queue.renew(stranger) == "lost"
    assert await queue.finish(stranger) == "lost"


async def test_of_an_unknown_task_nothing_is_made(queue: QueueUnderTest) -> None:
    await queue.submit()
    delivery = replace(await queue.take_one(), task_id="nobody")
    assert await queue.renew(delivery, state="running") == "lost"
    assert await queue.finish(delivery) == "lost"
    assert queue.record("nobody") == {}


async def test_many_renewals_are_answered_in_their_order(queue: QueueUnderTest) -> None:
    queue.push(*['{"image": "busybox"}'] * 250)
    taken = await queue.take(250)
    await queue.store.cancel(taken[120].task_id)
    await queue.finish(taken[249])
    answers = await queue.store.renew_all([(d.task_id, d.owner) for d in taken], LEASE)
    assert answers[:120] == ["ok"] * 120
    assert (answers[120], answers[248], answers[249]) == ("cancel", "ok", "lost")


# --- finish: the end ----------------------------------------------------------------------


async def test_the_end_is_recorded_told_and_forgotten_in_time(queue: QueueUnderTest) -> None:
    await queue.tick(limits=Limits(retention=500))
    await queue.store.enqueue(Submission.of(Task(image="busybox", queue="low"), traceparent=TRACE))
    delivery = await queue.take_one()
    await queue.renew(delivery, state="running", daemon="engine-1", container="c1")
    assert await queue.finish(delivery, "final", SUCCESS) == "ok"
    (result,) = queue.entries("results")
    assert result.keys() == RESULT_FIELDS
    assert {name: value.decode() for name, value in result.items()} == {
        "id": delivery.task_id,
        "state": "succeeded",
        "reason": "",
        "exit_code": "0",
        "attempt": "1",
        "queue": "low",
        "started_at": "2023-11-14T22:13:20.250Z",
        "finished_at": "2023-11-14T22:13:21.500Z",
        "traceparent": TRACE,
    }
    record = queue.record(delivery.task_id)
    assert (record["state"], record["exit_code"], record["owner"]) == ("succeeded", "0", "")
    assert 490_000 < queue.lifetime_ms(f"task:{delivery.task_id}") <= 500_000
    assert queue.members("index:open") == queue.members("index:leases") == {}
    assert queue.members("index:finished:low").keys() == {delivery.task_id}
    assert queue.entries("dead") == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "1970-01-01T00:00:00.000Z"),
        (951_782_400.0, "2000-02-29T00:00:00.000Z"),
        (1_709_251_199.999, "2024-02-29T23:59:59.999Z"),
        (4_107_542_399.0, "2100-02-28T23:59:59.000Z"),
        (4_107_542_400.0, "2100-03-01T00:00:00.000Z"),
        (253_402_300_799.0, "9999-12-31T23:59:59.000Z"),
    ],
)
async def test_times_are_rfc_3339(queue: QueueUnderTest, seconds: float, text: str) -> None:
    await queue.submit()
    await queue.finish(await queue.take_one(), "final", replace(SUCCESS, started_at=seconds))
    assert queue.entries("results")[0]["started_at"].decode() == text


async def test_an_end_without_times_ends_now_and_never_started(queue: QueueUnderTest) -> None:
    await queue.submit()
    await queue.finish(await queue.take_one(), "final", POISONED)
    (result,) = queue.entries("results")
    assert result["started_at"] == result["exit_code"] == b""
    assert RFC_3339.fullmatch(result["finished_at"].decode())


@pytest.mark.parametrize("reason", list(Reason))
async def test_dead_letters_are_all_failures_that_answer_nothing(
    queue: QueueUnderTest, reason: Reason
) -> None:
    queue.push('{"image":  "busybox"}', queue="high", traceparent=TRACE)
    delivery = await queue.take_one()
    await queue.finish(delivery, "final", Outcome(State.FAILED, reason, "what went wrong"))
    assert queue.entries("results")[0]["reason"].decode() == reason
    dead = queue.entries("dead")
    answers = {"exit", "oom", "timeout", "expired"}
    assert len(dead) == (reason not in answers)
    for letter in dead:
        finished = letter.pop("finished_at").decode()
        assert RFC_3339.fullmatch(finished)
        assert letter == {
            "id": delivery.task_id.encode(),
            "reason": reason.encode(),
            "message": b"what went wrong",
            "queue": b"high",
            "attempt": b"1",
            "source_id": delivery.task_id.removeprefix("high.").encode(),
            "traceparent": TRACE.encode() if queue.source == "redis-stream" else b"",
            "task": b'{"image":  "busybox"}',
        }


async def test_the_results_stream_stays_about_its_length(queue: QueueUnderTest) -> None:
    await queue.tick(limits=Limits(results_length=10))
    for _ in range(300):
        await queue.submit()
    for delivery in await queue.take(300):
        await queue.finish(delivery)
    assert 10 <= int(queue.ask("XLEN", queue.key("results"))) < 220


# --- finish: not the end ------------------------------------------------------------------


async def test_a_retry_is_a_new_attempt_after_its_pause(queue: QueueUnderTest) -> None:
    await queue.submit(id="one")
    delivery = await queue.take_one()
    await queue.renew(delivery, state="running", daemon="engine-1", container="c1", cause="timeout")
    before = queue.now_ms()
    assert await queue.finish(delivery, "retry", FAILURE, delay=7, budget="app") == "ok"
    record = queue.record("one")
    assert (record["state"], record["attempt"], record["app"]) == ("scheduled", "2", "1")
    assert (record["reason"], record["message"], record["exit_code"]) == ("exit", "exit code 3", "3")
    assert not record.keys() & {"daemon", "container", "cause"}
    assert before + 7_000 <= int(record["due"]) <= queue.now_ms() + 7_000
    assert queue.entries("results") == []
    assert queue.members("index:open").keys() == {"one"}
    queue.fall_due()
    await queue.tick()
    again = await queue.take_one(daemon="engine-2")
    assert (again.attempt, again.app_failures, again.infra_failures) == (2, 1, 0)
    await queue.finish(again)
    assert queue.entries("results")[0]["attempt"] == b"2"


async def test_a_retry_without_pause_is_ready_at_once(queue: QueueUnderTest) -> None:
    await queue.submit()
    await queue.finish(await queue.take_one(), "retry", FAILURE, budget="infra")
    again = await queue.take_one()
    assert (again.attempt, again.infra_failures) == (2, 1)


async def test_a_release_is_the_same_attempt_anywhere(queue: QueueUnderTest) -> None:
    await queue.submit()
    delivery = await queue.take_one()
    await queue.renew(delivery, state="pulling", daemon="engine-1")
    assert await queue.finish(delivery, "release") == "ok"
    record = queue.record(delivery.task_id)
    assert (record["state"], record["attempt"]) == ("queued", "1")
    again = await queue.take_one("b", daemon="engine-2")
    assert (again.attempt, again.daemon, again.app_failures) == (1, "", 0)


async def test_a_release_may_come_back_later(queue: QueueUnderTest) -> None:
    await queue.submit()
    await queue.finish(await queue.take_one(), "release", delay=2)
    assert len(queue.due()) == 1
    assert await queue.take() == []


async def test_what_is_let_go_of_with_its_container_stays_on_its_daemon(queue: QueueUnderTest) -> None:
    await queue.submit()
    delivery = await queue.take_one()
    await queue.renew(delivery, state="running", daemon="engine-1", container="c1", cause="cancel")
    assert await queue.finish(delivery, "detach") == "ok"
    assert await queue.take(daemon="engine-2") == []
    again = await queue.take_one("b", daemon="engine-1")
    assert (again.attempt, again.daemon, again.cause) == (1, "engine-1", "cancel")


async def test_what_is_let_go_of_for_a_while_comes_back_to_its_daemon(queue: QueueUnderTest) -> None:
    await queue.submit()
    delivery = await queue.take_one()
    await queue.renew(delivery, state="running", daemon="engine-1")
    await queue.finish(delivery, "detach", FAILURE, delay=5, budget="infra")
    assert await queue.take(daemon="engine-1") == []
    queue.fall_due()
    await queue.tick()
    assert await queue.take(daemon="engine-2") == []
    again = await queue.take_one(daemon="engine-1")
    assert (again.attempt, again.infra_failures) == (1, 1)


@pytest.mark.parametrize("action", ["final", "retry", "release", "detach"])
async def test_a_call_whose_reply_was_lost_is_recognised(queue: QueueUnderTest, action: Action) -> None:
    await queue.submit()
    delivery = await queue.take_one()
    assert await queue.finish(delivery, action, FAILURE, delay=60, budget="app") == "ok"
    record, results = queue.record(delivery.task_id), queue.entries("results")
    assert await queue.finish(delivery, action, FAILURE, delay=60, budget="app") == "ok"
    assert queue.record(delivery.task_id) == record
    assert queue.entries("results") == results
    assert len(queue.due()) == (action != "final")


@pytest.mark.parametrize("action", ["retry", "release"])
@pytest.mark.parametrize("delay", [0.0, 604_800.0])
@pytest.mark.parametrize(
    ("outcome", "says"), [(FAILURE, "exit code 3"), (Outcome(State.FAILED, Reason.LOST), "not started")]
)
async def test_one_that_is_to_be_cancelled_is_given_no_other_attempt(
    queue: QueueUnderTest, action: Action, delay: float, outcome: Outcome, says: str
) -> None:
    await queue.submit(id="one")
    delivery = await queue.take_one()
    await queue.store.cancel("one")
    for _ in range(2):
        assert await queue.finish(delivery, action, outcome, delay=delay, budget="app") == "ok"
    record = queue.record("one")
    assert (record["state"], record["reason"]) == ("cancelled", "")
    assert record["message"] == f"cancelled; its last attempt: {says}"
    (result,) = queue.entries("results")
    assert (result["state"], result["reason"], result["attempt"]) == (b"cancelled", b"", b"1")
    assert queue.entries("dead") == []
    assert queue.due() == queue.members("index:open") == queue.members("index:leases") == {}
    assert await queue.take() == []


async def test_one_that_is_to_be_cancelled_is_let_go_of_with_its_container(queue: QueueUnderTest) -> None:
    await queue.submit()
    delivery = await queue.take_one()
    await queue.renew(delivery, state="running", daemon="engine-1")
    await queue.store.cancel(delivery.task_id)
    assert await queue.finish(delivery, "detach") == "ok"
    assert queue.entries("results") == []
    assert (await queue.take_one("b", daemon="engine-1")).cancelled


async def test_one_that_is_to_be_cancelled_and_ended_first_has_its_own_end(queue: QueueUnderTest) -> None:
    await queue.submit(id="one")
    delivery = await queue.take_one()
    await queue.store.cancel("one")
    await queue.finish(delivery, "final", SUCCESS)
    assert queue.record("one")["state"] == "succeeded"


async def test_nothing_follows_an_end(queue: QueueUnderTest) -> None:
    await queue.submit()
    delivery = await queue.take_one()
    await queue.finish(delivery, "final", FAILURE)
    record = queue.record(delivery.task_id)
    assert await queue.finish(delivery, "retry", SUCCESS, budget="app") == "ok", "it is its own end"
    assert await queue.renew(delivery, state="running") == "lost"
    assert queue.record(delivery.task_id) == record
    assert len(queue.entries("results")) == 1


async def test_how_long_it_has_run_is_told_by_redis_clock(queue: QueueUnderTest) -> None:
    await queue.submit(id="runs")
    delivery = await queue.take_one()
    assert delivery.ran is None
    await queue.renew(delivery, state="running", daemon="engine-1", started="5")
    queue.redis.hset(queue.key("task:runs"), "begun", queue.now_ms() - 4_000)
    await queue.renew(delivery, state="running", started="5")
    await queue.finish(delivery, "detach")
    adopted = await queue.take_one(daemon="engine-1")
    assert adopted.ran is not None
    assert 4 <= adopted.ran < 60
    await queue.finish(adopted, "retry", FAILURE)
    assert (await queue.take_one()).ran is None
