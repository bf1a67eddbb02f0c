"""What a user sees: a task goes in, and how it ended comes out. On every backend."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import anyio
import pytest

from dispatcher.client import AsyncClient, Backoff, Reason, State, Task, TaskStatus
from tests.support.system import System
from tests.support.waiting import wait_until

TIMEOUT = 30


async def end(client: AsyncClient, task: Task) -> TaskStatus:
    return await (await client.submit(task)).wait(TIMEOUT)


async def running(client: AsyncClient, task_id: str) -> TaskStatus:
    async def look() -> TaskStatus | None:
        status = await client.status(task_id)
        return status if status.state is State.RUNNING else None

    found = await wait_until(look, TIMEOUT)
    assert found is not None
    return found


async def test_a_task_ends_with_its_exit_code_and_output(system: System) -> None:
    async with system.running() as client:
        handle = await client.submit(system.task("echo out; echo err >&2; exit 7"))
        status = await handle.wait(TIMEOUT)
        assert (status.state, status.reason, status.exit_code) == (State.FAILED, Reason.EXIT, 7)
        assert status.started_at is not None
        assert status.finished_at is not None
        assert status.started_at <= status.finished_at
        assert sorted([line async for line in handle.logs()]) == ["err", "out"]


async def test_a_plain_xadd_with_image_and_command_is_a_task(system: System) -> None:
    task = system.task("echo plain; exit 3")
    with system.redis.client() as redis:
        entry = redis.xadd(
            "dispatcher:tasks", {"task": json.dumps({"image": task.image, "command": task.command})}
        )
    async with system.running() as client:
        handle = client.handle(f"default.{entry.decode()}")
        assert (await handle.status()).state in State
        status = await handle.wait(TIMEOUT)
        assert status.exit_code == 3
        assert [line async for line in handle.logs()] == ["plain"]


async def test_the_container_knows_its_task_and_its_trace(system: System) -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    task = system.task('echo "$DISPATCHER_TASK_ID $DISPATCHER_ATTEMPT $DISPATCHER_FENCE $TRACEPARENT $MINE"',
                       env={"MINE": "yes"}, id="known-1")  # fmt: skip
    with system.redis.client() as redis:
        redis.xadd("dispatcher:tasks", {"task": task.document(), "traceparent": traceparent})
    async with system.running() as client:

        async def accepted() -> bool:
            return any(t.id == "known-1" for t in await client.tasks())

        await wait_until(accepted, TIMEOUT)
        await client.wait("known-1", timeout=TIMEOUT)
        [line] = [line async for line in client.logs("known-1")]
        task_id, attempt, fence, parent, mine = line.split()
        assert (task_id, attempt, parent, mine) == ("known-1", "1", traceparent, "yes")
        assert int(fence) > 0
        with system.redis.client() as redis:
            [(_, result)] = redis.xrange("{dispatcher:tasks}:results")
        assert result[b"traceparent"].decode() == traceparent


async def test_the_result_is_one_entry_for_other_services(system: System) -> None:
    async with system.running() as client:
        status = await end(client, system.task("exit 0"))
        with system.redis.client() as redis:
            [(_, result)] = redis.xrange("{dispatcher:tasks}:results")
    assert set(result) == {
        b"id", b"state", b"reason", b"exit_code", b"attempt", b"queue",
        b"started_at", b"finished_at", b"traceparent",
    }  # fmt: skip
    assert (result[b"id"].decode(), result[b"state"], result[b"exit_code"]) == (status.id, b"succeeded", b"0")
    assert datetime.fromisoformat(result[b"finished_at"].decode()) == status.finished_at


async def test_an_application_failure_is_tried_again_until_it_succeeds(system: System) -> None:
    async with system.running() as client:
        task = system.task("exit $((3 - DISPATCHER_ATTEMPT))", max_attempts=5, backoff=Backoff(initial=0.05))
        status = await end(client, task)
        assert (status.state, status.attempt, status.exit_code) == (State.SUCCEEDED, 3, 0)


async def test_attempts_run_out(system: System) -> None:
    async with system.running() as client:
        status = await end(client, system.task("exit 9", max_attempts=2, backoff=Backoff(initial=0.05)))
        assert (status.state, status.reason, status.attempt) == (State.FAILED, Reason.EXIT, 2)
        assert await client.dead() == []


async def test_retry_on_says_what_is_tried_again(system: System) -> None:
    async with system.running() as client:
        status = await end(client, system.task("exit 9", max_attempts=5, retry_on=["oom"]))
        assert status.attempt == 1


async def test_a_task_past_its_timeout_is_stopped(system: System) -> None:
    async with system.running() as client:
        status = await end(
            client, system.task("trap 'exit 5' TERM; while :; do sleep 0.05; done", timeout=0.5)
        )
        assert (status.state, status.reason, status.exit_code) == (State.FAILED, Reason.TIMEOUT, 5)


async def test_one_that_ignores_sigterm_is_killed_after_its_grace(system: System) -> None:
    async with system.running() as client:
        script = "trap '' TERM; while :; do sleep 0.05; done"
        status = await end(client, system.task(script, timeout=0.3, grace_period=0.3))
        assert (status.reason, status.exit_code) == (Reason.TIMEOUT, 137)


async def test_a_running_task_is_cancelled(system: System) -> None:
    async with system.running() as client:
        handle = await client.submit(system.task("sleep 600", grace_period=0.2))
        await running(client, handle.id)
        await handle.cancel()
        assert (await handle.wait(TIMEOUT)).state is State.CANCELLED


async def test_a_waiting_task_is_cancelled_without_a_container(system: System) -> None:
    async with system.client() as client:
        handle = await client.submit(system.task("exit 0"))
        assert (await handle.cancel()).state is State.CANCELLED
        later = await client.submit(system.task("exit 0", delay=3600))
        assert (await later.cancel()).state is State.CANCELLED
        async with system.instance():
            await end(client, system.task("exit 0"))
            assert (await handle.status()).started_at is None


async def test_a_delayed_task_does_not_start_early(system: System) -> None:
    async with system.running() as client:
        handle = await client.submit(system.task("exit 0", delay=1.0))
        assert (await handle.status()).state is State.SCHEDULED
        status = await handle.wait(TIMEOUT)
        assert status.started_at is not None
        assert status.accepted_at is not None
        assert (status.started_at - status.accepted_at).total_seconds() >= 0.99


async def test_an_expired_task_is_not_started(system: System) -> None:
    async with system.running() as client:
        past = datetime.now(UTC) - timedelta(seconds=1)
        status = await end(client, system.task("exit 0", expires_at=past))
        assert (status.state, status.reason, status.started_at) == (State.FAILED, Reason.EXPIRED, None)
        assert await client.dead() == []


async def test_output_can_be_followed_and_looked_at_while_it_comes(system: System) -> None:
    gate = "until [ -e /tmp/none ] || [ $i -ge 50 ]; do i=$((i+1)); sleep 0.05; done"
    async with system.running() as client:
        handle = await client.submit(system.task(f"echo first; i=0; {gate}; echo last"))
        seen = []
        async for line in handle.logs(follow=True):
            seen.append(line)
            if line == "first":
                assert (await handle.status()).state is State.RUNNING
                assert [now async for now in handle.logs()] == ["first"]
        assert seen == ["first", "last"]


async def test_of_long_output_the_end_is_kept(system: System) -> None:
    async with system.running(log_tail_bytes=1000) as client:
        handle = await client.submit(system.task("seq 1 5000"))
        await handle.wait(TIMEOUT)
        tail = await client.tail(handle.id)
        assert tail is not None
        assert (len(tail.data), tail.total) == (1000, 23893)
        assert tail.data.endswith(b"4999\n5000\n")


BAD_ENTRIES = [
    ({"task": b"{not json"}, "invalid"),
    ({"task": b'{"image": "busybox", "comand": []}'}, "invalid"),
    ({"task": b'{"image": 5}'}, "invalid"),
    ({"task": b'{"image": "busybox", "timeout": "1"}'}, "invalid"),
    ({"task": b'{"image": "busybox", "secrets": {"A": "secret://env/A"}}'}, "invalid"),
    ({"task": b"x" * 100_000}, "invalid"),
    ({"task": b""}, "invalid"),
    ({"task": bytes(range(256))}, "invalid"),
    ({"other": b"field"}, "invalid"),
    ({"task": b'{"image": "busybox", "queue": "nobody"}'}, "invalid"),
    ({"task": b'{"image": "busybox", "network": "host"}'}, "rejected"),
    ({"task": b'{"image": "busybox", "timeout": 1e9}'}, "rejected"),
]


async def test_bad_input_is_dead_lettered_with_its_reason_and_stops_nobody(system: System) -> None:
    with system.redis.client() as redis:
        for fields, _ in BAD_ENTRIES:
            redis.xadd("dispatcher:tasks", fields)
    async with system.running(allowed_networks="none") as client:
        assert (await end(client, system.task("exit 0"))).state is State.SUCCEEDED

        async def all_dead() -> bool:
            return len(await client.dead()) == len(BAD_ENTRIES)

        await wait_until(all_dead, TIMEOUT)
        dead = list(reversed(await client.dead()))
        by_source = sorted(dead, key=lambda letter: tuple(int(n) for n in letter.source_id.split("-")))
        assert [letter.reason for letter in by_source] == [reason for _, reason in BAD_ENTRIES]
        for letter, (fields, _) in zip(by_source, BAD_ENTRIES, strict=True):
            original = fields.get("task", b"other field")
            assert letter.task == original if len(original) <= 65_536 else letter.task_bytes >= len(original)
            assert letter.message
        assert all(queue.depth == 0 for queue in await client.queues())


async def test_a_program_that_is_not_there_is_a_dead_letter(system: System) -> None:
    async with system.running() as client:
        task = system.task("").model_copy(update={"command": ["no-such-program"]})
        status = await end(client, task)
        assert (status.state, status.reason) == (State.FAILED, Reason.START_FAILED)
        assert "no-such-program" in status.message
        assert [letter.id for letter in await client.dead()] == [status.id]


async def test_never_more_containers_at_once_than_consumers(system: System) -> None:
    async with system.running(num_consumers=2) as client:
        handles = [await client.submit(system.task("sleep 0.3")) for _ in range(6)]
        most = 0

        async def all_ended() -> bool:
            nonlocal most
            states = [(await handle.status()).state for handle in handles]
            most = max(most, states.count(State.RUNNING) + states.count(State.STARTING))
            return all(state.terminal for state in states)

        await wait_until(all_ended, TIMEOUT)
        assert most == 2


async def test_instances_share_the_work_and_each_task_runs_once(system: System) -> None:
    async with system.client() as client, system.instance(instance_id="a"), system.instance(instance_id="b"):
        handles = await client.submit_many([system.task("exit 0") for _ in range(20)])
        async with anyio.create_task_group() as group:
            for handle in handles:
                assert not isinstance(handle, Exception)
                group.start_soon(handle.wait, TIMEOUT)
        with system.redis.client() as redis:
            assert redis.xlen("{dispatcher:tasks}:results") == 20
        assert {instance.id for instance in await client.instances()} == {"a", "b"}


@pytest.mark.parametrize("queue", ["high", "low"])
async def test_further_queues_are_served(system: System, queue: str) -> None:
    async with system.running() as client:
        status = await end(client, system.task("exit 0", queue=queue))
        assert (status.state, status.queue) == (State.SUCCEEDED, queue)


async def test_a_paused_queue_starts_nothing_until_it_is_resumed(system: System) -> None:
    async with system.running() as client:
        await client.pause("low")
        held = await client.submit(system.task("exit 0", queue="low"))
        await end(client, system.task("exit 0"))
        assert (await held.status()).state is State.QUEUED
        assert [q.name for q in await client.queues() if q.paused] == ["low"]
        await client.resume("low")
        assert (await held.wait(TIMEOUT)).state is State.SUCCEEDED
