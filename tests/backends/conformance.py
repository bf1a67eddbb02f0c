"""The suite every backend must pass, one of a third party too.

Subclass ``BackendConformance`` in a test module (pytest-asyncio in auto mode) and give it a
fixture ``harness`` that returns a ``Harness``::

    class TestMine(BackendConformance):
        @pytest.fixture
        def harness(self) -> Iterator[Harness]:
            harness = MyHarness(namespace=fresh_namespace())
            yield harness
            ...  # force away all that bears the namespace

The tests hold a backend to ``dispatcher.backends.base``, from outside: what they believe of
starts is what the harness has seen, not what the backend says. Several backend objects of
one test stand for several dispatchers on one daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import anyio
import pytest

from dispatcher.backends.base import Backend
from dispatcher.errors import BackendError, ContainerGone, ForeignContainer, LeaseLost, StartFailed
from dispatcher.model import Attempt, Exit, Handle, Phase
from dispatcher.task import Resources, Task
from tests.support.waiting import wait_until

#: Seconds a test may take; an engine on a busy machine needs a few for a container.
BOUND = 50.0
#: Seconds by which an engine's clock, or what it rounds to, may differ from ours.
CLOCK_TOLERANCE = 2.0

#: Runs until it is told to end by SIGTERM, and then exits with 3.
UNTIL_TERM = "trap 'echo last; exit 3' TERM; echo ready; while :; do sleep 0.05; done"
#: Runs until it is killed.
UNTIL_KILL = "trap '' TERM; echo ready; while :; do sleep 0.05; done"


def fresh_namespace() -> str:
    """A namespace no other test has, such as the queue makes."""
    return secrets.token_hex(16)


class Harness(ABC):
    """How the suite gets at one backend and its daemon."""

    #: Namespace of this test's attempts.
    namespace: str

    @abstractmethod
    def backend(self) -> Backend:
        """A new backend object for the same daemon; not running yet."""

    @abstractmethod
    def attempt(self, script: str, **fields: Any) -> Attempt:
        """An attempt of a new task that runs ``sh -c script``, with ``fields`` replaced."""

    @abstractmethod
    async def starts(self, attempt: Attempt) -> int:
        """How often a program of this attempt was started, as seen from outside the backend."""

    @abstractmethod
    async def vanish(self, handle: Handle) -> None:
        """Kill and remove the container behind the backend's back."""

    def blank(self, **fields: Any) -> Attempt:
        """What ``attempt`` may build upon: a new task's attempt, with ``fields`` replaced."""
        task_id = f"t-{secrets.token_hex(6)}"
        attempt = Attempt(
            namespace=self.namespace, task_id=task_id, number=1, fence=1, instance="test", image="busybox"
        )
        return replace(attempt, **fields)


@contextlib.asynccontextmanager
async def running(*backends: Backend) -> AsyncIterator[None]:
    """Run these backends in a task group of the test, all of it bounded in time."""
    failure = None
    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as tasks:
            for backend in backends:
                await tasks.start(backend.run, name=f"run {backend.name}")
            try:
                yield
            except Exception as error:  # told as it is, not in a group
                failure = error
            tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def agree(handle: Handle) -> None:
    """A ``confirm`` of somebody who holds the lease."""


async def refuse(handle: Handle) -> None:
    """A ``confirm`` of somebody who has lost it."""
    raise LeaseLost


async def launch(backend: Backend, attempt: Attempt) -> Handle:
    """Launch as the pipeline does: what may succeed later is tried again."""
    while True:
        try:
            return await backend.launch(attempt, agree)
        except BackendError as error:
            if not error.recoverable:
                raise


async def run_to_end(backend: Backend, attempt: Attempt) -> tuple[Handle, Exit]:
    """Launch and wait."""
    handle = await backend.launch(attempt, agree)
    return handle, await backend.wait(handle)


async def output(backend: Backend, handle: Handle, *, follow: bool = False) -> bytes:
    """All the output there is."""
    return b"".join([piece async for piece in backend.logs(handle, follow=follow)])


async def says(backend: Backend, handle: Handle, text: bytes) -> None:
    """Wait until the container has written ``text``."""

    async def written() -> bool:
        return text in await output(backend, handle)

    await wait_until(written, timeout=BOUND, what=f"output {text!r}")


async def phase(backend: Backend, handle: Handle) -> Phase | None:
    """Where ``find`` sees the container; None if it does not."""
    found = {one.container_id: one for one in await backend.find(handle.namespace)}
    return found[handle.container_id].phase if handle.container_id in found else None


class Pause:
    """A ``confirm`` that is stopped in the middle, as by a paused machine."""

    def __init__(self) -> None:
        self.reached = anyio.Event()
        self.released = anyio.Event()

    async def __call__(self, handle: Handle) -> None:
        if not self.reached.is_set():
            self.reached.set()
            await self.released.wait()


@pytest.mark.timeout(BOUND + 10)
class BackendConformance:
    """See the module."""

    @pytest.fixture
    def harness(self) -> Harness:
        """Given by the subclass."""
        raise NotImplementedError

    @pytest.fixture
    def backend(self, harness: Harness) -> Backend:
        """The first backend object of a test."""
        return harness.backend()

    # --- one container, from start to end -----------------------------------------------

    @pytest.mark.parametrize("code", [0, 7, 255])
    async def test_exit_code(self, harness: Harness, backend: Backend, code: int) -> None:
        async with running(backend):
            _, end = await run_to_end(backend, harness.attempt(f"exit {code}"))
        assert (end.exit_code, end.oom) == (code, False)

    async def test_the_image_of_a_container_is_known_and_stays(
        self, harness: Harness, backend: Backend
    ) -> None:
        attempt = harness.attempt("exit 0")
        async with running(backend):
            await run_to_end(backend, attempt)
            image_id = await backend.image_id(attempt.image)
            assert image_id
            assert not await backend.remove_image(attempt.image, image_id)
            assert not await backend.remove_image(attempt.image, "another")
            assert await backend.image_id(attempt.image) == image_id

    async def test_handle_tells_what_was_launched(self, harness: Harness, backend: Backend) -> None:
        attempt = harness.attempt(UNTIL_TERM, number=3)
        async with running(backend):
            handle = await backend.launch(attempt, agree)
            health = await backend.probe()
        assert (handle.name, handle.namespace) == (attempt.name, attempt.namespace)
        assert (handle.task_id, handle.attempt) == (attempt.task_id, 3)
        assert handle.daemon == health.daemon
        assert handle.phase is Phase.RUNNING
        assert not handle.adopted
        assert handle.container_id

    async def test_times_are_the_daemons(self, harness: Harness, backend: Backend) -> None:
        before = time.time()
        async with running(backend):
            handle, end = await run_to_end(backend, harness.attempt("sleep 0.3"))
        assert handle.started_at is not None
        assert handle.started_at == pytest.approx(end.started_at, abs=0.01)
        assert before - CLOCK_TOLERANCE <= end.started_at
        assert end.finished_at <= time.time() + CLOCK_TOLERANCE
        assert end.finished_at - end.started_at >= 0.25

    async def test_environment_is_given_exactly(
        self, harness: Harness, backend: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OF_THE_DISPATCHER", "leaked")
        values = {
            "PLAIN": "x",
            "EMPTY": "",
            "LINES": "one\ntwo\n",
            "UNICODE": "grüße ✓ 🐙",
            "QUOTES": """a "b" 'c' $d `e` \\f""",
            "EQUALS": "a=b=c",
        }
        script = "".join(f'printf "%s|" "${name}";' for name in values)
        attempt = harness.attempt(script + 'printf "%s" "${OF_THE_DISPATCHER-absent}"', env=values)
        async with running(backend):
            handle, _ = await run_to_end(backend, attempt)
            told = (await output(backend, handle)).decode().split("|")
        assert told == [*values.values(), "absent"]

    async def test_working_directory(self, harness: Harness, backend: Backend) -> None:
        async with running(backend):
            handle, _ = await run_to_end(backend, harness.attempt("pwd", workdir="/"))
            assert await output(backend, handle) == b"/\n"

    async def test_program_that_is_not_there(self, harness: Harness, backend: Backend) -> None:
        attempt = harness.attempt("", entrypoint=("/no/such/program",), command=("x",))
        async with running(backend):
            with pytest.raises(StartFailed, match=r"(?i)no such file"):
                await backend.launch(attempt, agree)
            assert await backend.find(attempt.namespace) == []
        assert await harness.starts(attempt) == 0

    async def test_many_at_once(self, harness: Harness, backend: Backend) -> None:
        codes: dict[int, int] = {}

        async def one(code: int) -> None:
            _, end = await run_to_end(backend, harness.attempt(f"exit {code}"))
            codes[code] = end.exit_code

        async with running(backend), anyio.create_task_group() as tasks:
            for code in range(20):
                tasks.start_soon(one, code)
        assert codes == {code: code for code in range(20)}

    # --- output -------------------------------------------------------------------------

    async def test_output_of_both_streams(self, harness: Harness, backend: Backend) -> None:
        async with running(backend):
            handle, _ = await run_to_end(backend, harness.attempt("echo out; echo err >&2; echo more"))
            lines = (await output(backend, handle)).splitlines()
        assert sorted(lines) == [b"err", b"more", b"out"]
        assert lines.index(b"out") < lines.index(b"more")

    async def test_no_output(self, harness: Harness, backend: Backend) -> None:
        async with running(backend):
            handle, _ = await run_to_end(backend, harness.attempt(":"))
            assert await output(backend, handle) == b""
            assert await output(backend, handle, follow=True) == b""

    async def test_binary_output_comes_unchanged(self, harness: Harness, backend: Backend) -> None:
        script = r"printf '\000\001\377\200\015\012no newline'"
        async with running(backend):
            handle, _ = await run_to_end(backend, harness.attempt(script))
            assert await output(backend, handle) == b"\x00\x01\xff\x80\r\nno newline"

    async def test_following_yields_everything_and_ends(self, harness: Harness, backend: Backend) -> None:
        script = 'i=0; while [ $i -lt 20000 ]; do echo "line $i"; i=$((i+1)); done; exit 4'
        async with running(backend):
            handle = await backend.launch(harness.attempt(script), agree)
            told = await output(backend, handle, follow=True)
            assert (await backend.wait(handle)).exit_code == 4
            assert await output(backend, handle) == told
        assert told == b"".join(b"line %d\n" % number for number in range(20_000))

    async def test_following_yields_while_it_runs(self, harness: Harness, backend: Backend) -> None:
        async with running(backend):
            handle = await backend.launch(harness.attempt(UNTIL_TERM), agree)
            told = b""
            async for piece in backend.logs(handle, follow=True):
                if told == b"":
                    assert await phase(backend, handle) is Phase.RUNNING
                    await says(backend, handle, b"ready")
                    await backend.stop(handle, 20)
                told += piece
        assert told == b"ready\nlast\n"

    async def test_output_so_far_of_a_running_one(self, harness: Harness, backend: Backend) -> None:
        async with running(backend):
            handle = await backend.launch(harness.attempt(UNTIL_TERM), agree)
            await says(backend, handle, b"ready")
            assert await output(backend, handle) == b"ready\n"

    async def test_output_so_far_of_one_that_writes_without_end(
        self, harness: Harness, backend: Backend
    ) -> None:
        async with running(backend):
            handle = await backend.launch(harness.attempt("while :; do echo again; done"), agree)
            await says(backend, handle, b"again")
            with anyio.fail_after(BOUND / 2):
                assert (await output(backend, handle)).startswith(b"again\n")
            await backend.stop(handle, 0)

    async def test_output_of_one_that_is_gone(self, harness: Harness, backend: Backend) -> None:
        async with running(backend):
            handle, _ = await run_to_end(backend, harness.attempt("echo x"))
            await backend.remove(handle)
            for follow in (True, False):
                with pytest.raises(ContainerGone):
                    await output(backend, handle, follow=follow)

    # --- launched at most once ----------------------------------------------------------

    async def test_two_launch_at_once(self, harness: Harness) -> None:
        first, second = harness.backend(), harness.backend()
        attempt = harness.attempt("sleep 0.2; exit 5")
        ends: list[tuple[str, Exit]] = []

        async def one(backend: Backend) -> None:
            handle = await launch(backend, attempt)
            ends.append((handle.container_id, await backend.wait(handle)))

        async with running(first, second), anyio.create_task_group() as tasks:
            tasks.start_soon(one, first)
            tasks.start_soon(one, second)
        assert len(ends) == 2
        assert ends[0] == ends[1]
        assert ends[0][1].exit_code == 5
        assert await harness.starts(attempt) == 1

    async def test_running_one_is_adopted(self, harness: Harness) -> None:
        first, second = harness.backend(), harness.backend()
        attempt = harness.attempt(UNTIL_TERM)
        async with running(first, second):
            made = await first.launch(attempt, agree)
            adopted = await second.launch(replace(attempt, fence=2, instance="other"), agree)
            assert adopted == replace(made, adopted=True)
            await says(second, adopted, b"ready")
            await second.stop(adopted, 20)
            assert (await second.wait(adopted)).exit_code == 3
        assert await harness.starts(attempt) == 1

    async def test_exited_one_is_collected_and_not_started_again(self, harness: Harness) -> None:
        first, second = harness.backend(), harness.backend()
        attempt = harness.attempt("echo once; exit 9")
        async with running(first, second):
            made, end = await run_to_end(first, attempt)
            adopted, collected = await run_to_end(second, attempt)
            assert (adopted.container_id, adopted.phase) == (made.container_id, Phase.EXITED)
            assert adopted.adopted
            assert adopted.started_at == made.started_at
            assert collected == end
            assert await output(second, adopted) == b"once\n"
        assert await harness.starts(attempt) == 1

    async def test_creator_that_was_paused_before_the_start(self, harness: Harness) -> None:
        first, second = harness.backend(), harness.backend()
        attempt, pause = harness.attempt("exit 6"), Pause()
        late: list[Handle] = []

        async def paused() -> None:
            with contextlib.suppress(BackendError):
                late.append(await first.launch(attempt, pause))

        async with running(first, second):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(paused)
                await pause.reached.wait()
                made, end = await run_to_end(second, attempt)
                assert not made.adopted
                assert end.exit_code == 6
                pause.released.set()
            assert [(one.container_id, one.adopted) for one in late] in ([], [(made.container_id, True)])
            assert [one.container_id for one in await second.find(attempt.namespace)] == [made.container_id]
        assert await harness.starts(attempt) == 1

    async def test_creator_that_died_before_the_start(self, harness: Harness) -> None:
        first, second = harness.backend(), harness.backend()
        attempt, pause = harness.attempt("exit 6"), Pause()
        async with running(first, second):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(first.launch, attempt, pause)
                await pause.reached.wait()
                tasks.cancel_scope.cancel()
            _, end = await run_to_end(second, attempt)
            assert end.exit_code == 6
        assert await harness.starts(attempt) == 1

    async def test_lease_lost_before_the_start(self, harness: Harness, backend: Backend) -> None:
        attempt = harness.attempt("exit 0")
        async with running(backend):
            with pytest.raises(LeaseLost):
                await backend.launch(attempt, refuse)
            assert Phase.RUNNING not in {one.phase for one in await backend.find(attempt.namespace)}
            assert await harness.starts(attempt) == 0
            _, end = await run_to_end(backend, attempt)
            assert end.exit_code == 0
        assert await harness.starts(attempt) == 1

    async def test_lease_lost_while_adopting(self, harness: Harness, backend: Backend) -> None:
        attempt = harness.attempt(UNTIL_TERM)
        async with running(backend):
            handle = await backend.launch(attempt, agree)
            with pytest.raises(LeaseLost):
                await backend.launch(attempt, refuse)
            assert await phase(backend, handle) is Phase.RUNNING

    async def test_attempts_of_one_task_are_apart(self, harness: Harness, backend: Backend) -> None:
        first = harness.attempt("exit 1")
        second = replace(first, number=2)
        async with running(backend):
            one, two = await backend.launch(first, agree), await backend.launch(second, agree)
            assert one.container_id != two.container_id
            assert {found.attempt for found in await backend.find(first.namespace)} == {1, 2}

    async def test_another_namespace_is_never_touched(self, harness: Harness, backend: Backend) -> None:
        foreign = harness.attempt(UNTIL_TERM)
        # What a name shows of a namespace is its beginning: these two have one name.
        namespace = f"{foreign.namespace[:8]}{secrets.token_hex(12)}"
        own = replace(foreign, namespace=namespace)
        async with running(backend):
            theirs = await backend.launch(foreign, agree)
            with contextlib.suppress(ForeignContainer):
                ours = await backend.launch(own, agree)
                assert not ours.adopted
                assert ours.container_id != theirs.container_id
                await backend.stop(ours, 0)
                await backend.remove(ours)
            assert await backend.find(namespace) == []
            assert await phase(backend, theirs) is Phase.RUNNING

    # --- surviving a dispatcher ---------------------------------------------------------

    async def test_exit_outlives_the_dispatcher(self, harness: Harness) -> None:
        first, second = harness.backend(), harness.backend()
        attempt = harness.attempt("sleep 0.3; echo done; exit 8")
        async with running(first):
            handle = await first.launch(attempt, agree)
        async with running(second):
            [found] = await second.find(attempt.namespace)
            assert found.container_id == handle.container_id
            assert (await second.wait(found)).exit_code == 8
            assert await output(second, found) == b"done\n"
        assert await harness.starts(attempt) == 1

    async def test_one_that_vanished_while_it_is_waited_for(self, harness: Harness, backend: Backend) -> None:
        gone = anyio.Event()

        async def wait(handle: Handle) -> None:
            with pytest.raises(ContainerGone):
                await backend.wait(handle)
            gone.set()

        async with running(backend):
            handle = await backend.launch(harness.attempt(UNTIL_KILL), agree)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait, handle)
                await anyio.wait_all_tasks_blocked()
                await harness.vanish(handle)
                await gone.wait()
            assert await phase(backend, handle) is None

    async def test_one_that_vanished_before(self, harness: Harness, backend: Backend) -> None:
        async with running(backend):
            handle, _ = await run_to_end(backend, harness.attempt(":"))
            await harness.vanish(handle)
            with pytest.raises(ContainerGone):
                await backend.wait(handle)
            await backend.stop(handle, 1)
            await backend.remove(handle)

    # --- stop, remove, find -------------------------------------------------------------

    async def test_stop_lets_the_program_end_itself(self, harness: Harness, backend: Backend) -> None:
        async with running(backend):
            handle = await backend.launch(harness.attempt(UNTIL_TERM), agree)
            await says(backend, handle, b"ready")
            began = anyio.current_time()
            await backend.stop(handle, 30)
            assert anyio.current_time() - began < 25
            assert await phase(backend, handle) is Phase.EXITED
            assert (await backend.wait(handle)).exit_code == 3

    async def test_stop_kills_after_the_grace(self, harness: Harness, backend: Backend) -> None:
        async with running(backend):
            handle = await backend.launch(harness.attempt(UNTIL_KILL), agree)
            await says(backend, handle, b"ready")
            began = anyio.current_time()
            await backend.stop(handle, 1)
            assert anyio.current_time() - began >= 1
            end = await backend.wait(handle)
        assert (end.exit_code, end.oom) == (137, False)

    async def test_stop_of_an_ended_one(self, harness: Harness, backend: Backend) -> None:
        async with running(backend):
            handle, end = await run_to_end(backend, harness.attempt("exit 2"))
            await backend.stop(handle, 30)
            assert await backend.wait(handle) == end

    async def test_remove_kills_nothing(self, harness: Harness, backend: Backend) -> None:
        async with running(backend):
            handle = await backend.launch(harness.attempt(UNTIL_TERM), agree)
            with contextlib.suppress(BackendError):
                await backend.remove(handle)
            assert await phase(backend, handle) is Phase.RUNNING
            await says(backend, handle, b"ready")

    async def test_remove_is_fine_twice(self, harness: Harness, backend: Backend) -> None:
        async with running(backend):
            handle, _ = await run_to_end(backend, harness.attempt(":"))
            await backend.remove(handle)
            assert await phase(backend, handle) is None
            await backend.remove(handle)
            with pytest.raises(ContainerGone):
                await backend.wait(handle)

    async def test_find_tells_the_phase(self, harness: Harness, backend: Backend) -> None:
        attempt = harness.attempt(UNTIL_TERM)
        seen: list[Handle] = []

        async def look(handle: Handle) -> None:
            seen.extend(await backend.find(attempt.namespace))
            assert [one.container_id for one in seen] == [handle.container_id]

        async with running(backend):
            handle = await backend.launch(attempt, look)
            seen += await backend.find(attempt.namespace)
            await says(backend, handle, b"ready")
            await backend.stop(handle, 20)
            seen += await backend.find(attempt.namespace)
        assert [one.phase for one in seen] == [Phase.CREATED, Phase.RUNNING, Phase.EXITED]
        assert {(one.name, one.task_id, one.attempt) for one in seen} == {(attempt.name, attempt.task_id, 1)}
        assert [one.started_at is None for one in seen] == [True, False, False]

    async def test_created_one_can_be_removed(self, harness: Harness) -> None:
        first, second = harness.backend(), harness.backend()
        attempt, pause = harness.attempt("exit 0"), Pause()

        async def paused() -> None:
            with contextlib.suppress(BackendError):
                await first.launch(attempt, pause)

        async with running(first, second), anyio.create_task_group() as tasks:
            tasks.start_soon(paused)
            await pause.reached.wait()
            [created] = await second.find(attempt.namespace)
            await second.remove(created)
            assert await phase(second, created) is None
            tasks.cancel_scope.cancel()
        assert await harness.starts(attempt) == 0

    # --- cancelling ---------------------------------------------------------------------

    async def test_cancelling_leaves_nothing_behind(self, harness: Harness, backend: Backend) -> None:
        async def follow(handle: Handle) -> None:
            await output(backend, handle, follow=True)

        async with running(backend):
            handle = await backend.launch(harness.attempt(UNTIL_TERM), agree)
            await says(backend, handle, b"ready")
            await anyio.wait_all_tasks_blocked()
            before = asyncio.all_tasks()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(backend.wait, handle)
                tasks.start_soon(follow, handle)
                await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
            await wait_until(lambda: asyncio.all_tasks() <= before, what="the end of all tasks begun")
            assert await phase(backend, handle) is Phase.RUNNING
            await backend.stop(handle, 20)
            assert (await backend.wait(handle)).exit_code == 3

    # --- the daemon ---------------------------------------------------------------------

    async def test_probe(self, harness: Harness, backend: Backend) -> None:
        async with running(backend):
            health = await backend.probe()
        assert health.ok
        assert health.daemon
        assert health.version
        assert "\n" not in health.detail

    async def test_identity_of_the_daemon_is_stable(self, harness: Harness) -> None:
        seen = set()
        for _ in range(2):
            backend = harness.backend()
            async with running(backend):
                seen.add((await backend.probe()).daemon)
        assert len(seen) == 1

    async def test_capabilities_name_fields_of_a_task(self, backend: Backend) -> None:
        known = {*Task.model_fields, *(f"resources.{name}" for name in Resources.model_fields)}
        assert backend.name
        assert backend.capabilities.not_applied <= known
