"""From an attempt to a container of a Docker engine: created, adopted, started, inspected, removed."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import anyio
import structlog
from docker import APIClient
from docker.errors import APIError, NotFound

from dispatcher.backends.base import Confirm
from dispatcher.backends.docker_client import (
    ENGINE_REMEMBERS,
    LAUNCH_TIMEOUT,
    Engine,
    engine_time,
    events_between,
)
from dispatcher.backends.docker_errors import explanation, is_conflict, sort_create, sort_start
from dispatcher.backends.docker_spec import (
    container_config,
    engine_name,
    handle_of,
    needs_image_user,
    new_handle_of,
)
from dispatcher.errors import BackendError, ContainerGone, ForeignContainer, ImageNotFound
from dispatcher.model import Attempt, Handle, Phase

log = structlog.get_logger(__name__)

#: Seconds for tidying up behind a launch that is being cancelled.
TIDY_TIMEOUT = 5.0
#: How often a launch looks again at a name that changes hands under it, and the seconds
#: between: in all some 6 s, more than the removal of a container takes.
_LOOKS = 7
_LOOK_INTERVAL = 0.05
#: Events of a container that has run.
_RAN = frozenset({"start", "die"})

Removal = Literal["removed", "gone", "refused"]


class Containers:
    """The containers of one engine."""

    def __init__(self, engine: Engine, *, log_max_bytes: int, platform: str | None) -> None:
        """``log_max_bytes``: size at which a container's log is rotated, once. ``platform``: the one
        its image must be for; None for any."""
        self._engine = engine
        self._platform = platform
        self._log_max_bytes = log_max_bytes

    async def launch(self, attempt: Attempt, confirm: Confirm, daemon: str) -> Handle:
        """See ``Backend.launch``; ``daemon`` is the engine's identity."""
        replaces: set[str] = set()
        for look in range(_LOOKS):
            missing: ImageNotFound | None = None
            try:
                created = await self._create(attempt, daemon, replaces)
            except ImageNotFound as error:
                # The engine looks for the image before it looks at the name. What runs needs none.
                created, missing = None, error
            if created is not None:
                return await self._start(created, confirm, daemon)
            adopted = await self._adopt(attempt, replaces, daemon)
            if adopted is not None:
                await confirm(adopted)
                return adopted
            if missing is not None:
                raise missing
            # Removed by us or by another, or about to be.
            await anyio.sleep(_LOOK_INTERVAL * 2**look if look else 0)
        raise BackendError(f"the name {attempt.name} kept changing hands")

    async def _image_user(self, attempt: Attempt) -> str:
        image = await self._engine.call(partial(APIClient.inspect_image, image=engine_name(attempt.image)))
        return str((image.get("Config") or {}).get("User") or "")

    async def _create(self, attempt: Attempt, daemon: str, replaces: set[str]) -> Handle | None:
        """A container of our own; None if the name is taken.

        May have created one also when it raises BackendUnreachable or is cancelled. That one
        is never started, and the next launch of this attempt removes it.
        """

        image_user = await self._image_user(attempt) if needs_image_user(attempt) else ""
        config = container_config(
            attempt, log_max_bytes=self._log_max_bytes, image_user=image_user, replaces=replaces
        )

        def create(client: Any) -> str | None:
            try:
                made = client.create_container_from_config(config, attempt.name, self._platform)
            except APIError as error:
                if is_conflict(error):
                    return None
                raise
            return str(made["Id"])

        container_id = await self._engine.call(create, within=LAUNCH_TIMEOUT, sort=sort_create)
        return None if container_id is None else new_handle_of(attempt, container_id, daemon, replaces)

    async def _adopt(self, attempt: Attempt, replaces: set[str], daemon: str) -> Handle | None:
        """What bears the attempt's name, if it was ever started; None if the name is free now, or
        about to be. One that certainly was not started is removed, and its id added to ``replaces``,
        with those that it replaced itself."""
        try:
            handle = handle_of(await self.inspect(attempt.name), daemon, adopted=True)
            wanted = (attempt.namespace, attempt.task_id, attempt.number)
            if (handle.namespace, handle.task_id, handle.attempt) != wanted:
                raise ForeignContainer(f"{attempt.name} is a container of another dispatcher or task")
            if handle.phase is not Phase.CREATED:
                return handle
            since = await self._engine.call(engine_time)
            handle = handle_of(await self.inspect(handle.container_id), daemon, adopted=True)
        except ContainerGone:
            return None
        if handle.phase is not Phase.CREATED:
            return handle
        # Its creator may be about to start it. Without force this is refused while it runs, and a
        # start of what is removed is refused as well. But it may have run and ended in between.
        if await self.remove(handle) == "removed" and await self._never_ran(handle, since):
            replaces.update({handle.container_id}, handle.replaces)
        return None

    async def _never_ran(self, handle: Handle, since: float) -> bool:
        """Whether the engine, by its own memory, has not started this since then (by its clock)."""
        until = await self._engine.call(engine_time)
        events = await self._engine.call(partial(events_between, since=since, until=until))
        if len(events) >= ENGINE_REMEMBERS:
            return False  # what is older has been forgotten
        return not any(
            event.get("Action") in _RAN and event.get("Actor", {}).get("ID") == handle.container_id
            for event in events
        )

    async def _start(self, created: Handle, confirm: Confirm, daemon: str) -> Handle:
        """Confirm and start what we created; it is removed again unless it ran."""
        try:
            await confirm(created)
        except BaseException:
            # Also when cancelled. Nobody starts what another created, so this can only be idle.
            with anyio.move_on_after(TIDY_TIMEOUT, shield=True):
                await self._remove_quietly(created)
            raise
        try:
            # Not abandoned: once a launch has raised, nothing of it starts any more.
            await self._engine.call(
                partial(APIClient.start, container=created.container_id),
                within=LAUNCH_TIMEOUT,
                abandon=False,
                sort=sort_start,
            )
        except ContainerGone:
            raise
        except BackendError as error:
            # A refusal, or an answer that got lost: only the engine knows whether it ran.
            started = await self._look_after_failed_start(created, daemon)
            if started is None:
                raise
            log.info("docker.start_answer_lost", container_id=created.container_id, error=str(error))
            return started
        return handle_of(await self.inspect(created.container_id), daemon)

    async def _look_after_failed_start(self, created: Handle, daemon: str) -> Handle | None:
        """The container, if it was started nevertheless; else remove it."""
        for _ in range(2):
            try:
                seen = handle_of(await self.inspect(created.container_id), daemon)
            except ContainerGone:
                return None
            if seen.phase is not Phase.CREATED:
                return seen
            # The engine refuses to remove what a late start has set running: look again.
            if await self._remove_quietly(created):
                return None
        return None

    async def remove(self, handle: Handle) -> Removal:
        """Remove without force. ``refused`` if it runs or goes already, ``gone`` if it is not there."""

        def remove(client: APIClient) -> Removal:
            try:
                client.remove_container(handle.container_id, v=True)
            except NotFound:
                return "gone"
            except APIError as error:
                if not is_conflict(error):
                    raise
                log.info("docker.remove_refused", container_id=handle.container_id, answer=explanation(error))
                return "refused"
            return "removed"

        return await self._engine.call(remove, within=LAUNCH_TIMEOUT)

    async def _remove_quietly(self, handle: Handle) -> bool:
        """As ``remove``, where another error is already on its way; whether it is not there now."""
        try:
            return await self.remove(handle) != "refused"
        except BackendError as error:
            log.warning("docker.left_behind", container_id=handle.container_id, error=str(error))
            return False

    async def inspect(self, name_or_id: str) -> dict[str, Any]:
        """As the engine tells it. Raises ContainerGone, BackendError."""
        inspect = partial(APIClient.inspect_container, container=name_or_id)
        return dict(await self._engine.call(inspect))
