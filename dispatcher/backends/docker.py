"""Containers on a Docker engine.

The verbs are here; beside it, ``docker_client`` has the engine's client and its threads,
``docker_containers`` makes, adopts and removes, ``docker_images`` looks for and pulls, with the
operator's ``docker_credentials``, and asks a ``docker_registry`` when to come back;
``docker_absence`` knows an engine's end, ``docker_watcher`` wakes who waits for an end,
``docker_spec`` knows what a container looks like, ``docker_streams`` what comes in pieces, and
``docker_errors`` what an error means.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

import anyio
import structlog
from anyio.abc import TaskGroup, TaskStatus
from docker import APIClient
from docker.errors import APIError

from dispatcher.backends.base import Capabilities, Confirm, OnProgress
from dispatcher.backends.docker_client import Engine
from dispatcher.backends.docker_containers import Containers
from dispatcher.backends.docker_errors import is_conflict
from dispatcher.backends.docker_images import Images
from dispatcher.backends.docker_spec import (
    NAMESPACE_LABEL,
    created_handle_of,
    exit_of,
    handle_of,
    has_ended,
    oom_may_follow,
)
from dispatcher.backends.docker_streams import OutputPipe, read_log
from dispatcher.backends.docker_watcher import Watcher
from dispatcher.errors import (
    BackendError,
    BackendUnreachable,
    ContainerGone,
    ForeignContainer,
)
from dispatcher.model import Attempt, Exit, Handle, Health

log = structlog.get_logger(__name__)

#: Bytes of a container's log before it is rotated; one rotated file is kept beside it.
LOG_MAX_BYTES = 10 * 1024 * 1024
#: Requests to the engine at the same time, pulls and logs apart. An engine does most of a
#: launch under locks of its own: more only queue up there, where nobody can cancel them.
CONTROL_THREADS = 16
#: Logs read at the same time; further readers wait for one of these to end.
LOG_READERS = 64
#: Seconds in which an engine must say that it is there.
PROBE_TIMEOUT = 5.0
#: Seconds after SIGKILL until a container counts as stuck.
KILL_TIMEOUT = 30.0
#: Seconds for the word that it was for want of memory to follow the word that it was killed:
#: the engine hears the two in either order, some milliseconds apart on a busy machine.
OOM_SETTLE = 1.0


class DockerBackend:
    """Runs attempts as containers of one Docker engine."""

    name = "docker"
    capabilities = Capabilities(pulls=True, isolated=True)

    def __init__(
        self,
        *,
        base_url: str | None = None,
        max_pulls: int,
        platform: str | None = None,
        log_max_bytes: int = LOG_MAX_BYTES,
        control_threads: int = CONTROL_THREADS,
        log_readers: int = LOG_READERS,
    ) -> None:
        """Contact nothing yet.

        ``base_url``: the engine's address, such as ``unix:///var/run/docker.sock``; None for
        what DOCKER_HOST and Docker's other variables say. ``max_pulls``: pulls at the same
        time. ``platform``: of the images wanted, as ``os/arch[/variant]``; None for the engine's
        own. ``log_max_bytes``: size at which a container's log is rotated, once.
        """
        self._engine = Engine(
            base_url=base_url, max_pulls=max_pulls, control_threads=control_threads, log_readers=log_readers
        )
        self._watcher = Watcher(self._engine)
        self._containers = Containers(self._engine, log_max_bytes=log_max_bytes, platform=platform)
        self._images = Images(self._engine, platform=platform, max_pulls=max_pulls)
        self._daemon = ""
        #: Ids of containers that were told to end by ``stop``, and not waited for since.
        self._stopped: set[str] = set()
        #: Where readers of logs run; only while ``run`` does.
        self._tasks: TaskGroup | None = None

    # --- the engine ---------------------------------------------------------------------

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """See ``Backend.run``."""
        try:
            health = await self.probe()
            if not health.ok:
                raise BackendUnreachable(health.detail)
            async with anyio.create_task_group() as self._tasks:
                task_status.started()
                await self._watcher.run()
        finally:
            self._tasks = None
            self._engine.close()

    async def probe(self) -> Health:
        """See ``Backend.probe``."""
        try:
            info = await self._engine.call(APIClient.info, within=PROBE_TIMEOUT)
        except BackendError as error:
            return Health(ok=False, detail=str(error))
        self._daemon = str(info["ID"])
        version = str(info["ServerVersion"])
        return Health(ok=True, daemon=self._daemon, version=version, detail=f"Docker {version}")

    # --- images -------------------------------------------------------------------------

    async def image_id(self, image: str) -> str:
        """See ``Backend.image_id``."""
        return await self._images.image_id(image)

    async def image_obtainable(self, image: str) -> bool:
        """See ``Backend.image_obtainable``."""
        return await self._images.obtainable(image)

    async def prepare(self, image: str, on_progress: OnProgress) -> bool:
        """See ``Backend.prepare``. Each call of ``on_progress`` means that something moved."""
        return await self._images.prepare(image, on_progress)

    async def images_size(self) -> int:
        """See ``Backend.images_size``."""
        return await self._images.size()

    async def remove_image(self, image: str, image_id: str) -> bool:
        """See ``Backend.remove_image``."""
        return await self._images.remove(image, image_id)

    async def launch(self, attempt: Attempt, confirm: Confirm) -> Handle:
        """See ``Backend.launch``."""
        return await self._containers.launch(attempt, confirm, self._daemon)

    # --- the end ------------------------------------------------------------------------

    async def wait(self, handle: Handle) -> Exit:
        """See ``Backend.wait``; ContainerGone also for one that the engine's own end has ended."""
        found = await self._ended(handle)
        stopped = handle.container_id in self._stopped
        if not stopped and oom_may_follow(found):
            with anyio.move_on_after(OOM_SETTLE):
                # What wakes may only be the late news of its end.
                while oom_may_follow(found):
                    with self._watcher.watching(handle.container_id) as woken:
                        await woken.wait()
                    found = await self._ended(handle)
            found = await self._ended(handle)
        ended = exit_of(found)
        if not stopped and await self._watcher.ended_with_engine(handle.container_id, ended):
            raise ContainerGone("it ended together with its engine")
        self._stopped.discard(handle.container_id)
        return ended

    async def _ended(self, handle: Handle) -> dict[str, Any]:
        """The container as it is inspected once it has ended."""
        while True:
            with self._watcher.watching(handle.container_id) as woken:
                try:
                    found = await self._containers.inspect(handle.container_id)
                except ContainerGone:
                    raise
                except BackendError as error:
                    # The list taken after the engine is back wakes us again.
                    log.debug("docker.wait_unanswered", container_id=handle.container_id, error=str(error))
                else:
                    if has_ended(found):
                        return found
                await woken.wait()

    async def stop(self, handle: Handle, grace: float) -> None:
        """See ``Backend.stop``. Nothing is held while the grace passes."""
        self._stopped.add(handle.container_id)
        try:
            if grace > 0:
                await self._kill(handle, "SIGTERM")
                with anyio.move_on_after(grace):
                    await self._ended(handle)
                    return
            await self._kill(handle, "SIGKILL")
            with anyio.fail_after(KILL_TIMEOUT):
                await self._ended(handle)
        except ContainerGone:
            return
        except TimeoutError:
            raise BackendError(f"the container is still there {KILL_TIMEOUT:g} s after SIGKILL") from None

    async def _kill(self, handle: Handle, signal: str) -> None:
        def kill(client: APIClient) -> None:
            try:
                client.kill(handle.container_id, signal)
            except APIError as error:
                # It does not run (any more).
                if not is_conflict(error):
                    raise

        await self._engine.call(kill)

    async def remove(self, handle: Handle) -> None:
        """See ``Backend.remove``."""
        self._stopped.discard(handle.container_id)
        await self._containers.remove(handle)

    # --- looking ------------------------------------------------------------------------

    async def find(self, namespace: str) -> list[Handle]:
        """See ``Backend.find``."""
        handles = []
        filters = {"label": f"{NAMESPACE_LABEL}={namespace}"}
        for listed in await self._engine.call(partial(APIClient.containers, all=True, filters=filters)):
            try:
                # One that hangs in its start can't be inspected, and must not hide the others.
                handle = created_handle_of(listed, self._daemon)
                handles.append(
                    handle or handle_of(await self._containers.inspect(listed["Id"]), self._daemon)
                )
            except ContainerGone:
                continue
            except ForeignContainer:
                # Somebody else's use of our label; nothing of ours lacks the others.
                log.warning("docker.labels_incomplete", container_id=listed["Id"])
        return handles

    async def logs(self, handle: Handle, *, follow: bool) -> AsyncIterator[bytes]:
        """See ``Backend.logs``. Waits while LOG_READERS others are being read."""
        if self._tasks is None:
            raise RuntimeError("logs are read while the backend runs")
        pipe = OutputPipe()
        self._tasks.start_soon(self._read_logs, handle, follow, pipe, name=f"logs {handle.name}")
        try:
            async with aclosing(pipe.pieces()) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            pipe.reader.cancel()

    async def _read_logs(self, handle: Handle, follow: bool, pipe: OutputPipe) -> None:
        # Stands unless the reading comes to an end: the backend is being shut down.
        error: BackendError | None = BackendUnreachable("the backend has ended")
        try:
            with pipe.reader:
                await self._engine.stream(
                    partial(read_log, container_id=handle.container_id, follow=follow, pipe=pipe),
                    limiter=self._engine.log_readers,
                )
                error = None
        except BackendError as failed:
            error = failed
        finally:
            pipe.end(error)
