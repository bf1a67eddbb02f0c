"""How tests get at the Docker backend and the engine behind it."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from functools import partial
from typing import Any

import anyio.to_thread
import docker.errors

from dispatcher.backends.docker import DockerBackend
from dispatcher.model import Attempt, Handle
from tests.backends.conformance import Harness, fresh_namespace
from tests.support.engine import EngineUnderTest


class DockerHarness(Harness):
    """A namespace of its own for each test, on the session's engine."""

    def __init__(self, engine: EngineUnderTest) -> None:
        self.engine = engine
        self.namespace = fresh_namespace()
        self._began = time.time()

    def backend(self, **options: Any) -> DockerBackend:
        return DockerBackend(base_url=self.engine.base_url, **{"max_pulls": 2, **options})

    def attempt(self, script: str, **fields: Any) -> Attempt:
        attempt = self.blank(
            image=self.engine.image,
            network=self.engine.network,
            entrypoint=("/bin/sh", "-c"),
            command=(script,),
        )
        return replace(attempt, **fields)

    async def starts(self, attempt: Attempt) -> int:
        events = partial(self.engine.start_events, attempt.name, self._began)
        return (await anyio.to_thread.run_sync(events))[attempt.name]

    async def vanish(self, handle: Handle) -> None:
        remove = partial(self.engine.client.remove_container, handle.container_id, force=True)
        await anyio.to_thread.run_sync(remove)

    def inspect(self, name_or_id: str) -> dict[str, Any]:
        """A container as the engine shows it."""
        found: dict[str, Any] = self.engine.client.inspect_container(name_or_id)
        return found

    def containers(self) -> list[dict[str, Any]]:
        """The list's entries of all containers whose name this test's attempts bear."""
        found = self.engine.client.containers(all=True, filters={"name": self.namespace[:8]})
        return list(found)

    def tidy(self) -> None:
        """Remove by force whatever bears this test's names, also under another namespace."""
        for container in self.containers():
            with contextlib.suppress(docker.errors.APIError):
                self.engine.client.remove_container(container["Id"], force=True, v=True)
