"""Attempts as child processes of this host: no engine, no images, no isolation.

For ``dev`` and ``demo``, and for operators who allow it on purpose. An attempt is a
directory (``process_directory``) and a wrapper process in it (``process_wrapper``), which is
the parent of the program, outlives this dispatcher and writes down how the program ended.

Nothing here runs a thread or holds a call per task: the end of a wrapper is an event of its
pidfd in the event loop. Such an event is a state, not a message; it cannot be missed, so no
relist is needed beside it. File operations take place in worker threads.

One root belongs to one host and one pid namespace: a wrapper is signalled by its pid.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup, TaskStatus

from dispatcher.backends import process_wrapper as wrapper
from dispatcher.backends.base import Capabilities, Confirm, OnProgress
from dispatcher.backends.process_directory import AttemptDirectories, Name, Record
from dispatcher.backends.process_spec import specify
from dispatcher.errors import (
    BackendError,
    BackendUnreachable,
    ContainerGone,
    NoCapacity,
    StartFailed,
)
from dispatcher.model import Attempt, Exit, Handle, Health, Phase, container_name

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")

#: Seconds for an interpreter to start and execute the program, on a host that is very busy.
START_TIMEOUT = 30.0
#: Seconds until what was killed has ended; longer only for a process the kernel holds on to.
KILL_TIMEOUT = 30.0
#: Seconds ``probe`` may take; the contract's bound.
PROBE_TIMEOUT = 5.0
#: How often a launch meets others that create, start or remove the same attempt before it gives up.
LAUNCH_TRIES = 8
#: Seconds for one who took a creation over from us to start it, before it is taken over from him.
RIVAL_TIMEOUT = 2.0
#: Seconds between looks at an attempt that somebody else is starting just now.
LOOK_INTERVAL = 0.02
#: Seconds between looks at an attempt whose directory can't be read just now.
ABSENCE_INTERVAL = 1.0
#: Seconds between looks for new output: as short as the first while there is some, then longer.
FOLLOW_INTERVALS = (0.02, 0.5)
#: File operations at the same time; they are short, and a disk gains nothing from more.
WORKERS = 8

_WRAPPER = (sys.executable, "-I", "-S", "-X", "utf8", wrapper.__file__)
_NO_CAPACITY = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE})


class ProcessBackend:
    """Runs ``entrypoint`` + ``command`` of an attempt as a child process."""

    name = "process"
    #: A memory limit binds each process by its address space, so want of memory is an error the
    #: program sees, never an ``oom`` exit. The kernel counts processes by user and not by task:
    #: a limit on ``pids`` would be spent by whatever else the user runs.
    capabilities = Capabilities(
        pulls=False,
        isolated=False,
        not_applied=frozenset({"labels", "network", "pull_policy", "resources.cpus", "resources.pids"}),
    )

    def __init__(self, root: Path, *, output_max_bytes: int = 10 * 1024 * 1024) -> None:
        """Keep the attempts in ``root``.

        Of an attempt's output the latest ``output_max_bytes`` are kept, at most twice as many.
        """
        self._directories = AttemptDirectories(root)
        self._root = root
        self._output_max_bytes = output_max_bytes
        self._limiter = anyio.CapacityLimiter(WORKERS)
        self._daemon = ""
        self._tasks: TaskGroup | None = None

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """See ``Backend.run``: reaps the wrappers that this process has started."""
        if not hasattr(os, "pidfd_open"):
            raise BackendUnreachable("the process backend needs Linux 5.3 or newer")
        try:
            self._daemon = await self._blocking(self._directories.open)
        except BackendError as error:
            raise BackendUnreachable(str(error)) from error
        try:
            async with anyio.create_task_group() as self._tasks:
                task_status.started()
                await anyio.sleep_forever()
        finally:
            self._tasks = None

    async def probe(self) -> Health:
        """See ``Backend.probe``."""
        try:
            with anyio.fail_after(PROBE_TIMEOUT):
                daemon = await self._blocking(self._directories.identity)
        except (BackendError, TimeoutError) as error:
            return Health(ok=False, detail=str(error) or f"{self._root} does not answer")
        detail = "no isolation: tasks run as child processes of this host"
        return Health(ok=True, daemon=daemon, version=os.uname().release, detail=detail)

    async def image_id(self, image: str) -> str:
        """See ``Backend.image_id``: an image is only recorded, so any will do."""
        return "recorded"

    async def image_obtainable(self, image: str) -> bool:
        """See ``Backend.image_obtainable``: an image is only recorded, so any will do."""
        return True

    async def prepare(self, image: str, on_progress: OnProgress) -> bool:
        """See ``Backend.prepare``: there is nothing to pull."""
        return False

    async def images_size(self) -> int:
        """See ``Backend.images_size``: there are none."""
        return 0

    async def remove_image(self, image: str, image_id: str) -> bool:
        """See ``Backend.remove_image``: any image will do, also afterwards."""
        return False

    async def launch(self, attempt: Attempt, confirm: Confirm) -> Handle:
        """See ``Backend.launch``."""
        name = Name(attempt.namespace, attempt.task_id, attempt.number)
        scratch = self._directories.path(name) / wrapper.SCRATCH
        patience = 0.0
        replaces: set[str] = set()
        for _ in range(LAUNCH_TRIES):
            specification = await self._blocking(specify, attempt, scratch, self._output_max_bytes)
            if await self._blocking(self._directories.create, name, specification):
                record = await self._start(name, specification["id"], confirm, frozenset(replaces))
                if record is not None:
                    return self._handle(record)
                patience = RIVAL_TIMEOUT
                continue
            record = await self._settled(name, patience)
            if record is None:
                continue
            if record.phase is Phase.CREATED:
                if await self._blocking(self._directories.revoke, name, record.creation_id):
                    replaces.add(record.creation_id)
                continue
            if record.failure is not None:
                await self._blocking(self._directories.remove, name, record.creation_id)
                raise StartFailed(record.failure)
            handle = self._handle(record, adopted=True)
            await confirm(handle)
            return handle
        raise BackendError("others keep creating and removing this attempt")

    async def wait(self, handle: Handle) -> Exit:
        """See ``Backend.wait``."""
        while True:
            try:
                record = await self._blocking(self._directories.look, _name(handle))
                if record is not None and record.phase is Phase.RUNNING:
                    async with self._wrapper(handle) as pidfd:
                        if pidfd is not None:
                            await anyio.wait_readable(pidfd)
                            continue
            except BackendError:
                # A disk or descriptors that are wanting say nothing about the task.
                await anyio.sleep(ABSENCE_INTERVAL)
                continue
            if record is None or record.creation_id != handle.container_id:
                raise ContainerGone
            if record.exit is not None:
                return record.exit
            if record.phase is Phase.EXITED:
                raise ContainerGone("its wrapper was killed, and its exit with it")
            if record.phase is Phase.CREATED:
                raise BackendError("it was not started")

    async def logs(self, handle: Handle, *, follow: bool) -> AsyncIterator[bytes]:
        """See ``Backend.logs``."""
        directories, name, creation_id = self._directories, _name(handle), handle.container_id
        interval, longest = FOLLOW_INTERVALS
        async with self._wrapper(handle) as pidfd:
            # What ended has written all its output; of what runs, it is as much as there is now.
            ended, position = pidfd is None or not follow, 0
            end = None if follow else await self._blocking(directories.output_end, name, creation_id)
            while end is None or position < end:
                position, data = await self._blocking(directories.read_output, name, creation_id, position)
                if data:
                    position += len(data)
                    interval = FOLLOW_INTERVALS[0]
                    yield data
                elif ended or pidfd is None:
                    return
                else:
                    with anyio.move_on_after(interval):
                        await anyio.wait_readable(pidfd)
                        ended = True
                    interval = min(interval * 2, longest)

    async def stop(self, handle: Handle, grace: float) -> None:
        """See ``Backend.stop``."""
        async with self._wrapper(handle) as pidfd:
            if pidfd is None:
                return
            _signal(pidfd, signal.SIGTERM)
            with anyio.move_on_after(grace):
                await anyio.wait_readable(pidfd)
                return
            _signal(pidfd, signal.SIGUSR1)
            with anyio.move_on_after(KILL_TIMEOUT):
                await anyio.wait_readable(pidfd)
                return
        raise BackendError(f"it has been killed and does not end within {KILL_TIMEOUT:.0f} s")

    async def remove(self, handle: Handle) -> None:
        """See ``Backend.remove``; raises BackendError for one that runs."""
        if not await self._blocking(self._directories.remove, _name(handle), handle.container_id):
            raise BackendError("it runs and is not removed")

    async def find(self, namespace: str) -> list[Handle]:
        """See ``Backend.find``."""
        return [self._handle(record) for record in await self._blocking(self._directories.find, namespace)]

    # --- launching ----------------------------------------------------------------------

    async def _start(
        self, name: Name, creation_id: str, confirm: Confirm, replaces: frozenset[str]
    ) -> Record | None:
        """Confirm and start what we created; None if somebody has revoked it."""
        try:
            created = self._handle(Record(name, creation_id, Phase.CREATED))
            await confirm(replace(created, replaces=replaces))
            answer = await self._run_wrapper(name, creation_id)
        except BaseException:
            # Nothing if it was started: then it is found by its name, as after a crash.
            with anyio.CancelScope(shield=True):
                await self._blocking(self._directories.revoke, name, creation_id)
            raise
        if answer == "revoked":
            return None
        if answer == "started":
            record = await self._blocking(self._directories.look, name)
            return record if record is not None and record.creation_id == creation_id else None
        if answer.startswith("failed "):
            await self._blocking(self._directories.remove, name, creation_id)
            raise StartFailed(answer.removeprefix("failed "))
        # It may have started the program, and then it is adopted, and not removed to be run twice.
        await self._blocking(self._directories.revoke, name, creation_id)
        raise BackendError(f"the wrapper process: {answer}")

    async def _run_wrapper(self, name: Name, creation_id: str) -> str:
        """Start the wrapper; return the last line it answers with."""
        if self._tasks is None:
            raise RuntimeError("launch needs a running backend")
        pidfd, pipe = await self._blocking(_spawn, self._directories.path(name), creation_id)
        self._tasks.start_soon(_reap, pidfd, name=f"reap wrapper of {name.task_id}.{name.number}")
        answer = b""
        try:
            with anyio.fail_after(START_TIMEOUT):
                while True:
                    await anyio.wait_readable(pipe)
                    piece = os.read(pipe, wrapper.PIECE)
                    if not piece:
                        lines = answer.decode(errors="replace").splitlines()
                        return lines[-1] if lines else "ended without an answer"
                    answer += piece
        except TimeoutError:
            return "does not answer"
        finally:
            os.close(pipe)

    async def _settled(self, name: Name, patience: float) -> Record | None:
        """The attempt of this name when it is not just being started; None if there is none.

        One that is created is given ``patience`` seconds to be started.
        """
        began = anyio.current_time()
        while True:
            record = await self._blocking(self._directories.look, name)
            waited = anyio.current_time() - began
            if record is None or record.phase is Phase.EXITED or record.started_at is not None:
                return record
            if record.phase is Phase.CREATED and waited >= patience:
                return record
            if waited >= START_TIMEOUT:
                raise BackendError("its wrapper process has not started the program")
            await anyio.sleep(LOOK_INTERVAL)

    # --- below the verbs ----------------------------------------------------------------

    def _handle(self, record: Record, *, adopted: bool = False) -> Handle:
        name = record.name
        return Handle(
            container_id=record.creation_id,
            name=container_name(name.namespace, name.task_id, name.number),
            namespace=name.namespace,
            task_id=name.task_id,
            attempt=name.number,
            daemon=self._daemon,
            phase=record.phase,
            started_at=record.started_at,
            adopted=adopted,
        )

    @contextlib.asynccontextmanager
    async def _wrapper(self, handle: Handle) -> AsyncIterator[int | None]:
        """A pidfd of the attempt's wrapper; None if it has ended."""
        pidfd = await self._blocking(self._directories.open_wrapper, _name(handle), handle.container_id)
        try:
            yield pidfd
        finally:
            if pidfd is not None:
                os.close(pidfd)

    async def _blocking(self, function: Callable[[*_Ts], _T], *args: *_Ts) -> _T:
        """Call ``function`` in a thread; an error of the operating system leaves it sorted."""
        try:
            return await anyio.to_thread.run_sync(function, *args, limiter=self._limiter)
        except OSError as error:
            kind = NoCapacity if error.errno in _NO_CAPACITY else BackendError
            raise kind(str(error)) from error


def _name(handle: Handle) -> Name:
    return Name(handle.namespace, handle.task_id, handle.attempt)


def _spawn(path: Path, creation_id: str) -> tuple[int, int]:
    """Start the wrapper of an attempt: its pidfd, and the end of the pipe its answer comes from."""
    # No secrets of ours: a task can read them, and they would stay as long as it runs. The one
    # variable is what some interpreters need to find their own library.
    environment = {key: value for key, value in os.environ.items() if key == "LD_LIBRARY_PATH"}
    pipe, pipe_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        os.set_blocking(pipe_end, True)
        pid = os.posix_spawn(
            sys.executable,
            [*_WRAPPER, str(path), creation_id],
            environment,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, pipe_end, 1),
                (os.POSIX_SPAWN_DUP2, pipe_end, 2),
            ],
        )
        return os.pidfd_open(pid), pipe  # nobody reaps the pid before this
    except BaseException:
        os.close(pipe)
        raise
    finally:
        os.close(pipe_end)


async def _reap(pidfd: int) -> None:
    """Wait for the end of a wrapper that is a child of ours, and release its pid."""
    try:
        await anyio.wait_readable(pidfd)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)  # noqa: ASYNC222 - WNOHANG: it has ended
    finally:
        os.close(pidfd)


def _signal(pidfd: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended, and that is what is wanted
        signal.pidfd_send_signal(pidfd, number)
