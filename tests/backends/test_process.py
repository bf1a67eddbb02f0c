"""The process backend: the suite of all backends, and what only it does."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream

from dispatcher.backends import process, process_wrapper
from dispatcher.backends.process import ProcessBackend
from dispatcher.backends.process_directory import AttemptDirectories, Name, Record
from dispatcher.errors import BackendError, ContainerGone, LaunchRejected, NoCapacity, StartFailed
from dispatcher.model import Handle, Phase
from tests.backends.conformance import (
    UNTIL_KILL,
    UNTIL_TERM,
    BackendConformance,
    Harness,
    agree,
    output,
    phase,
    run_to_end,
    running,
    says,
)
from tests.backends.process_harness import ProcessHarness
from tests.support.waiting import wait_until

MIB = 1024 * 1024


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[ProcessHarness]:
    harness = ProcessHarness(tmp_path)
    yield harness
    harness.tidy()


class TestConformance(BackendConformance):
    """As every backend."""

    @pytest.fixture
    def harness(self, tmp_path: Path) -> Iterator[Harness]:
        harness = ProcessHarness(tmp_path)
        yield harness
        harness.tidy()


def _alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- what is launched -------------------------------------------------------------------


async def test_needs_something_to_run(harness: ProcessHarness) -> None:
    backend = harness.backend()
    async with running(backend):
        with pytest.raises(LaunchRejected, match="does not read the image"):
            await backend.launch(harness.blank(), agree)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"user": "nobody-has-this-name"}, "not known"),
        ({"user": "0:nobody-has-this-group"}, "not known"),
        ({"namespace": ".."}, "namespace"),
        ({"namespace": "a/b"}, "namespace"),
        ({"env": {"X": "\ud800"}}, "Unicode"),
    ],
)
async def test_refuses_what_it_cannot_do(
    harness: ProcessHarness, fields: dict[str, Any], message: str
) -> None:
    backend = harness.backend()
    async with running(backend):
        with pytest.raises(LaunchRejected, match=message):
            await backend.launch(harness.attempt(":", **fields), agree)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"workdir": "/no/such/directory"}, "/no/such/directory: No such file"),
        ({"entrypoint": ("no-such-program",)}, "No such file"),
        ({"entrypoint": ("/etc/passwd",)}, "Permission denied"),
        ({"env": {"LARGE": "x" * 4 * MIB}}, "Argument list too long"),
    ],
)
async def test_program_that_cannot_be_started(
    harness: ProcessHarness, fields: dict[str, Any], message: str
) -> None:
    backend = harness.backend()
    attempt = harness.attempt(":", **fields)
    async with running(backend):
        with pytest.raises(StartFailed, match=message):
            await backend.launch(attempt, agree)
        assert await backend.find(attempt.namespace) == []


async def test_start_that_failed_for_a_dispatcher_that_died(harness: ProcessHarness) -> None:
    """The next one to launch finds the failure, tells it and leaves nothing."""
    backend, other = harness.backend(), harness.backend()
    attempt = harness.attempt(":", entrypoint=("/no/such/program",))
    directories = AttemptDirectories(harness.root)
    name = Name(attempt.namespace, attempt.task_id, attempt.number)

    async def start_behind_the_creator(handle: Handle) -> None:
        await anyio.run_process(
            [sys.executable, process_wrapper.__file__, str(directories.path(name)), handle.container_id]
        )
        record = await anyio.to_thread.run_sync(directories.look, name)
        assert record is not None
        assert "No such file" in str(record.failure)
        with pytest.raises(StartFailed):
            await other.launch(attempt, agree)
        raise ConnectionError("the creator dies here")

    async with running(backend, other):
        with pytest.raises(ConnectionError):
            await backend.launch(attempt, start_behind_the_creator)
        assert await backend.find(attempt.namespace) == []


async def test_scratch_directory_goes_with_the_attempt(harness: ProcessHarness) -> None:
    backend = harness.backend()
    async with running(backend):
        handle, _ = await run_to_end(backend, harness.attempt('cd; touch "$HOME/kept"; mkdir d; pwd; ls'))
        directory = harness.directory(handle)
        assert await output(backend, handle) == f"{directory}/scratch\nd\nkept\n".encode()
        await backend.remove(handle)
        assert not await anyio.Path(directory).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_other_user(harness: ProcessHarness) -> None:
    backend = harness.backend()
    async with running(backend):
        attempt = replace(
            harness.blank(), entrypoint=("sh", "-c", "id -u; id -g; id -G; touch mine"), user="1234:567"
        )
        handle, end = await run_to_end(backend, attempt)
        assert await output(backend, handle) == b"1234\n567\n567\n"
        assert end.exit_code == 0


async def test_other_user_without_the_right_to(
    harness: ProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = harness.backend()
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    async with running(backend):
        with pytest.raises(LaunchRejected, match="only a dispatcher that runs as root"):
            await backend.launch(harness.attempt(":", user="0"), agree)


async def test_memory_limit(harness: ProcessHarness) -> None:
    backend = harness.backend()
    program = "try:\n  bytes(400 * 2**20)\nexcept MemoryError:\n  print('refused')"
    attempt = harness.blank(entrypoint=(sys.executable, "-c", program), memory=256 * MIB)
    async with running(backend):
        handle, end = await run_to_end(backend, attempt)
        assert await output(backend, handle) == b"refused\n"
    assert (end.exit_code, end.oom) == (0, False)


async def test_no_core_file_and_default_signals(harness: ProcessHarness) -> None:
    backend = harness.backend()
    attempt = harness.attempt("ulimit -c; grep -E 'Sig(Ign|Blk)' /proc/$$/status | cut -f 2")
    async with running(backend):
        handle, _ = await run_to_end(backend, attempt)
        core, *masks = (await output(backend, handle)).split()
    assert core == b"0"
    # Above 31 are those a C library keeps for itself: it sets them to be ignored when it spawns.
    assert [int(mask, 16) & 0x7FFF_FFFF for mask in masks] == [0, 0]


async def test_death_by_a_signal_is_told_as_a_container_does(harness: ProcessHarness) -> None:
    backend = harness.backend()
    async with running(backend):
        _, end = await run_to_end(backend, harness.attempt("kill -USR2 $$"))
    assert end.exit_code == 128 + signal.SIGUSR2


# --- what is left of it -----------------------------------------------------------------


async def test_descendants_end_with_the_program(harness: ProcessHarness) -> None:
    """Those in a session of their own too, which have left the process group."""
    backend = harness.backend()
    attempt = harness.attempt(
        "sleep 1000 & echo $!; setsid sh -c 'echo $$; exec sleep 1000' & sleep 0.3; exit 3"
    )
    async with running(backend):
        handle, end = await run_to_end(backend, attempt)
        pids = [int(pid) for pid in (await output(backend, handle)).split()]
    assert end.exit_code == 3
    assert len(pids) == 2
    assert not any(_alive(pid) for pid in pids)


async def test_program_that_closes_its_output(harness: ProcessHarness) -> None:
    backend = harness.backend()
    async with running(backend):
        handle = await backend.launch(harness.attempt("echo x; exec >&- 2>&-; sleep 0.2; exit 4"), agree)
        assert await output(backend, handle, follow=True) == b"x\n"
        assert (await backend.wait(handle)).exit_code == 4


async def test_wrapper_that_was_killed(harness: ProcessHarness) -> None:
    """Its program ends with it, and the exit is lost, which is said."""
    backend = harness.backend()
    attempt = harness.attempt(f"echo $$; {UNTIL_KILL}")
    async with running(backend):
        handle = await backend.launch(attempt, agree)
        await says(backend, handle, b"ready")
        program = int((await output(backend, handle)).split()[0])
        os.kill(await anyio.to_thread.run_sync(harness.wrapper_pid, handle), signal.SIGKILL)
        with pytest.raises(ContainerGone):
            await backend.wait(handle)
        await wait_until(lambda: not _alive(program), what="the end of the program")
        assert await phase(backend, handle) is Phase.EXITED
        again = await backend.launch(attempt, agree)
        assert (again.container_id, again.adopted) == (handle.container_id, True)
        assert await output(backend, handle, follow=True) == f"{program}\nready\n".encode()
        await backend.stop(handle, 1)
        await backend.remove(handle)
        assert await backend.find(attempt.namespace) == []
    assert await harness.starts(attempt) == 1


async def test_no_child_is_left_unreaped(harness: ProcessHarness) -> None:
    backend = harness.backend()
    async with running(backend):
        handle = await backend.launch(harness.attempt(UNTIL_TERM), agree)
        pid = await anyio.to_thread.run_sync(harness.wrapper_pid, handle)
        await backend.stop(handle, 0)
        await wait_until(lambda: not Path(f"/proc/{pid}").exists(), what="the wrapper to be reaped")


async def test_no_thread_or_descriptor_for_a_task_that_is_waited_for(harness: ProcessHarness) -> None:
    backend = harness.backend()

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def run_one() -> None:
        handle = await backend.launch(harness.attempt(UNTIL_TERM), agree)
        launched.append(handle)
        await backend.wait(handle)

    launched: list[Handle] = []
    async with running(backend):
        await run_to_end(backend, harness.attempt(":"))
        await wait_until(lambda: len(asyncio.all_tasks()) == 2, what="the wrapper to be reaped")
        before = await anyio.to_thread.run_sync(descriptors)
        async with anyio.create_task_group() as tasks:
            for _ in range(12):
                tasks.start_soon(run_one)
            await wait_until(lambda: len(launched) == 12, timeout=30)
            await anyio.wait_all_tasks_blocked()
            assert threading.active_count() <= 1 + 8 + 1  # workers are bounded, and one of the runner's
            for handle in launched:
                await backend.stop(handle, 0)
        await wait_until(lambda: len(asyncio.all_tasks()) == 2, what="all wrappers to be reaped")
        assert await anyio.to_thread.run_sync(descriptors) == before


# --- output -----------------------------------------------------------------------------


async def test_endless_output_is_bounded(harness: ProcessHarness) -> None:
    limit = 64 * 1024
    backend = harness.backend(output_max_bytes=limit)
    script = 'i=0; while :; do echo "$i"; i=$((i+1)); done'
    async with running(backend):
        handle = await backend.launch(harness.attempt(script), agree)
        directory = harness.directory(handle)

        def kept() -> list[Path]:
            return sorted(directory.glob("output-*"))

        await wait_until(lambda: kept() and kept()[0].name > f"output-{5 * limit:020d}", timeout=30)
        told = b""
        async for piece in backend.logs(handle, follow=True):
            if told == b"":
                await backend.stop(handle, 0)
            told += piece
        sizes = [path.stat().st_size for path in kept()]
        assert len(sizes) == 2
        assert sum(sizes) <= 2 * limit
        last = await output(backend, handle)
        assert len(last) == sum(sizes)
        numbers = [int(number) for number in last.split(b"\n")[1:-1]]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


# --- races and crashes ------------------------------------------------------------------


async def test_wrapper_of_a_revoked_creation_starts_nothing(harness: ProcessHarness) -> None:
    backend = harness.backend()
    attempt = harness.attempt("exit 0")
    path = AttemptDirectories(harness.root).path(Name(attempt.namespace, attempt.task_id, 1))
    created: list[str] = []

    async def give_up(handle: Handle) -> None:
        created.append(handle.container_id)
        raise ConnectionError

    async def late() -> bytes:
        done = await anyio.run_process([sys.executable, process_wrapper.__file__, str(path), created[0]])
        return done.stdout

    async with running(backend):
        with pytest.raises(ConnectionError):
            await backend.launch(attempt, give_up)
        assert await late() == b"revoked\n"  # nothing is there
        _, end = await run_to_end(backend, attempt)
        assert await late() == b"revoked\n"  # another creation is
        assert end.exit_code == 0
    assert await harness.starts(attempt) == 1


async def test_removal_that_stopped_half_way_is_finished(harness: ProcessHarness) -> None:
    backend = harness.backend()
    attempt = harness.attempt("exit 0")
    async with running(backend):
        handle, _ = await run_to_end(backend, attempt)
        directory = harness.directory(handle)
        await anyio.Path(directory / "exit").rename(directory / "removed")
        assert await backend.find(attempt.namespace) == []
        with pytest.raises(ContainerGone):
            await backend.wait(handle)
        made, _ = await run_to_end(backend, attempt)
        assert not made.adopted
        await anyio.Path(directory / "exit").rename(directory / "removed")
    async with running(harness.backend()):
        assert not await anyio.Path(directory).exists()


async def test_older_handle_does_not_reach_a_newer_creation(harness: ProcessHarness) -> None:
    backend = harness.backend()
    attempt = harness.attempt(UNTIL_TERM)
    async with running(backend):
        old = await backend.launch(attempt, agree)
        await backend.stop(old, 0)
        await backend.remove(old)
        new = await backend.launch(attempt, agree)
        await backend.stop(old, 0)
        await backend.remove(old)
        assert await phase(backend, new) is Phase.RUNNING
        with pytest.raises(ContainerGone):
            await backend.wait(old)
        with pytest.raises(ContainerGone):
            await output(backend, old)


async def test_remove_refuses_a_running_one(harness: ProcessHarness) -> None:
    backend = harness.backend()
    async with running(backend):
        handle = await backend.launch(harness.attempt(UNTIL_TERM), agree)
        with pytest.raises(BackendError, match="runs"):
            await backend.remove(handle)


async def test_many_launch_one_attempt_at_once(harness: ProcessHarness) -> None:
    backends = [harness.backend() for _ in range(6)]
    attempt = harness.attempt("exit 5")
    seen: set[str] = set()

    async def one(backend: ProcessBackend) -> None:
        handle, end = await run_to_end(backend, attempt)
        seen.add(handle.container_id)
        assert end.exit_code == 5

    async with running(*backends), anyio.create_task_group() as tasks:
        for backend in backends:
            tasks.start_soon(one, backend)
    assert len(seen) == 1
    assert await harness.starts(attempt) == 1


_DISPATCHER = """
import sys, anyio
from pathlib import Path
from dispatcher.backends.process import ProcessBackend
from dispatcher.model import Attempt

async def agree(handle): pass

async def main(root, namespace):
    backend = ProcessBackend(Path(root))
    async with anyio.create_task_group() as tasks:
        await tasks.start(backend.run)
        await backend.launch(Attempt(
            namespace=namespace, task_id="survivor", number=1, fence=1, instance="killed", image="x",
            command=("sh", "-c", "trap 'echo ended; exit 11' TERM; echo ready; while :; do sleep 0.05; done"),
        ), agree)
        print("launched", flush=True)
        await anyio.sleep_forever()

anyio.run(main, *sys.argv[1:])
"""


async def test_exit_survives_a_dispatcher_that_is_killed(harness: ProcessHarness) -> None:
    """A real process is killed, and its process group with it, as a service manager would."""
    async with await anyio.open_process(
        [sys.executable, "-c", _DISPATCHER, str(harness.root), harness.namespace], start_new_session=True
    ) as dispatcher:
        assert dispatcher.stdout is not None
        answer = BufferedByteReceiveStream(dispatcher.stdout)
        assert await answer.receive_until(b"\n", 100) == b"launched"
        os.killpg(dispatcher.pid, signal.SIGKILL)
        await dispatcher.wait()
    backend = harness.backend()
    async with running(backend):
        [handle] = await backend.find(harness.namespace)
        assert handle.phase is Phase.RUNNING
        await says(backend, handle, b"ready")
        await backend.stop(handle, 20)
        assert (await backend.wait(handle)).exit_code == 11
        assert await output(backend, handle) == b"ready\nended\n"


async def test_probe_of_a_root_that_is_gone(harness: ProcessHarness) -> None:
    backend = harness.backend()
    async with running(backend):
        await anyio.to_thread.run_sync(shutil.rmtree, harness.root)
        health = await backend.probe()
    assert not health.ok
    assert str(harness.root) in health.detail


async def test_waiting_outlasts_a_directory_that_cannot_be_read(
    harness: ProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = harness.backend()
    monkeypatch.setattr(process, "ABSENCE_INTERVAL", 0.01)
    looks: list[Name] = []
    look = AttemptDirectories.look

    def failing_twice(self: AttemptDirectories, name: Name) -> Record | None:
        looks.append(name)
        if len(looks) <= 2:
            raise OSError(errno.EMFILE, "Too many open files")
        return look(self, name)

    async with running(backend):
        handle = await backend.launch(harness.attempt("exit 3"), agree)
        monkeypatch.setattr(AttemptDirectories, "look", failing_twice)
        assert (await backend.wait(handle)).exit_code == 3
    assert len(looks) >= 3


async def test_no_room_for_another_process(harness: ProcessHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told as backpressure, and the next try is a start like any other."""
    backend = harness.backend()
    attempt = harness.attempt("exit 0")

    def refuse(*_: object, **__: object) -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    async with running(backend):
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_spawn", refuse)
            with pytest.raises(NoCapacity):
                await backend.launch(attempt, agree)
        assert await backend.find(attempt.namespace) == []
        _, end = await run_to_end(backend, attempt)
        assert end.exit_code == 0
