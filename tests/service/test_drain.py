"""What becomes of running tasks when their instance leaves, by DRAIN_MODE; and who looks after them then."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

from dispatcher.client import State
from tests.service.test_restart import TIMEOUT, gated, in_state, stopped
from tests.support.system import ProcessSystem
from tests.support.waiting import wait_until

#: Ends with 3 when it is told to end, unless it is to end with 4.
STOPPABLE = (
    'trap "exit 3" TERM; echo "$DISPATCHER_ATTEMPT" >> {0}/starts;'
    " until [ -e {0}/go ]; do sleep 0.05; done; exit 4"
)


def starts(marks: Path) -> list[str]:
    return (marks / "starts").read_text().split()


async def test_detach_leaves_at_once_what_runs(process_system: ProcessSystem) -> None:
    marks = process_system.directory
    async with process_system.client() as client:
        async with process_system.instance(drain_mode="detach", drain_timeout=3600) as dispatcher:
            handle = await client.submit(process_system.task(gated(marks)))
            await wait_until(in_state(client, handle.id, State.RUNNING), TIMEOUT)
            await stopped(dispatcher)
        assert (await handle.status()).state is State.RUNNING
        async with process_system.instance():
            (marks / "go").touch()
            status = await handle.wait(TIMEOUT)
        assert (status.exit_code, status.attempt) == (4, 1)
        assert starts(marks) == ["started"]


async def test_stop_ends_what_runs_and_it_begins_anew_for_free(process_system: ProcessSystem) -> None:
    marks = process_system.directory
    async with process_system.client() as client:
        async with process_system.instance(drain_mode="stop", drain_timeout=0) as dispatcher:
            handle = await client.submit(process_system.task(STOPPABLE.format(marks)))
            await wait_until((marks / "starts").exists, TIMEOUT)
            await wait_until(in_state(client, handle.id, State.RUNNING), TIMEOUT)
            await stopped(dispatcher)
        status = await handle.status()
        assert (status.state, status.attempt) == (State.QUEUED, 2)
        assert "leaving" in status.message
        async with process_system.instance():
            (marks / "go").touch()
            status = await handle.wait(TIMEOUT)
        # It may have one attempt only, and this one was not its own fault.
        assert (status.exit_code, status.attempt) == (4, 2)
        assert starts(marks) == ["1", "2"]


async def test_what_succeeds_when_it_is_stopped_has_succeeded(process_system: ProcessSystem) -> None:
    marks = process_system.directory
    script = f"trap 'exit 0' TERM; echo 1 > {marks}/starts; while :; do sleep 0.05; done"
    async with process_system.client() as client:
        async with process_system.instance(drain_mode="stop", drain_timeout=0) as dispatcher:
            handle = await client.submit(process_system.task(script))
            await wait_until((marks / "starts").exists, TIMEOUT)
            await wait_until(in_state(client, handle.id, State.RUNNING), TIMEOUT)
            await stopped(dispatcher)
        assert (await handle.status()).state is State.SUCCEEDED


async def test_stopping_goes_on_with_whoever_adopts_it(process_system: ProcessSystem) -> None:
    """The one that was stopping it died in the middle of that: the next one knows why it ended."""
    marks = process_system.directory
    task = process_system.task(STOPPABLE.format(marks).replace("exit 3", ": deaf"), grace_period=2)
    async with process_system.client() as client:
        async with process_system.instance(drain_mode="stop", drain_timeout=0, lease_seconds=1) as dispatcher:
            handle = await client.submit(task)
            await wait_until((marks / "starts").exists, TIMEOUT)
            await wait_until(in_state(client, handle.id, State.RUNNING), TIMEOUT)
            dispatcher.drain()
            with process_system.redis.client() as redis:
                record = f"{{dispatcher:tasks}}:task:{handle.id}"
                await wait_until(lambda: redis.hget(record, "cause") == b"drain", TIMEOUT)
        async with process_system.instance(lease_seconds=1):
            (marks / "go").touch()
            status = await handle.wait(TIMEOUT)
        assert (status.exit_code, status.attempt) == (4, 2)


async def test_a_full_instance_adopts_what_runs_and_takes_nothing_new(process_system: ProcessSystem) -> None:
    marks = process_system.directory
    other = marks / "other"
    other.mkdir()
    async with process_system.client() as client:
        async with process_system.instance(drain_mode="detach", num_consumers=1) as leaving:
            left = await client.submit(process_system.task(gated(marks)))
            await wait_until(in_state(client, left.id, State.RUNNING), TIMEOUT)
            async with process_system.instance(num_consumers=1) as full:
                own = await client.submit(process_system.task(gated(other)))
                await wait_until(in_state(client, own.id, State.RUNNING), TIMEOUT)
                waiting = await client.submit(process_system.task("exit 0"))
                await stopped(leaving)
                await wait_until(lambda: left.id in full.keeper.held, TIMEOUT)
                assert full.slots.used == 2
                # It heeds what is wanted of the one it took on.
                await left.cancel()
                assert (await left.wait(TIMEOUT)).state is State.CANCELLED
                await wait_until(lambda: full.slots.used == 1, TIMEOUT)
                assert (await waiting.status()).state is State.QUEUED
                (other / "go").touch()
                assert (await waiting.wait(TIMEOUT)).state is State.SUCCEEDED
        assert starts(marks) == ["started"]


async def test_what_somebody_removed_while_nobody_looked_is_lost_and_not_started_again(
    process_system: ProcessSystem,
) -> None:
    marks = process_system.directory
    attempts = process_system.settings().process_directory / "attempts"
    script = f'echo "$DISPATCHER_ATTEMPT" >> {marks}/starts; until [ -e {marks}/go ]; do sleep 0.05; done'
    async with process_system.client() as client:
        async with process_system.instance(drain_mode="detach") as dispatcher:
            handle = await client.submit(process_system.task(script))
            await wait_until((marks / "starts").exists, TIMEOUT)
            await wait_until(in_state(client, handle.id, State.RUNNING), TIMEOUT)
            await stopped(dispatcher)
        (marks / "go").touch()
        await wait_until(lambda: list(attempts.rglob("exit")), TIMEOUT)
        for attempt in attempts.glob(f"*/{handle.id}.1"):
            shutil.rmtree(attempt)
        async with process_system.instance():
            status = await handle.wait(TIMEOUT)
        assert (status.state, status.attempt) == (State.SUCCEEDED, 2)
        assert starts(marks) == ["1", "2"]


async def test_what_is_not_started_in_time_ends_while_all_consumers_are_busy(
    process_system: ProcessSystem,
) -> None:
    marks = process_system.directory
    async with process_system.running(num_consumers=1) as client:
        busy = await client.submit(process_system.task(gated(marks)))
        await wait_until(in_state(client, busy.id, State.RUNNING), TIMEOUT)
        expires = datetime.now(UTC) + timedelta(seconds=1)
        late = await client.submit(process_system.task("exit 0", expires_at=expires))
        status = await late.wait(TIMEOUT)
        assert (status.state, status.reason) == (State.FAILED, "expired")
        (marks / "go").touch()
        await busy.wait(TIMEOUT)
