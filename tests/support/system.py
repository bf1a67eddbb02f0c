"""A whole dispatcher within a test: real Redis, a real backend, one or more instances."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio

from dispatcher.backends import load_backend
from dispatcher.client import AsyncClient, Task
from dispatcher.service import Dispatcher
from dispatcher.settings import Settings, load
from tests.support.engine import EngineUnderTest
from tests.support.redis_server import RedisUnderTest


class System(ABC):
    """Where tasks run, and how a test writes them so that they run there."""

    name: str

    def __init__(self, redis_server: RedisUnderTest, directory: Path) -> None:
        self.redis = redis_server
        self.directory = directory

    @abstractmethod
    def flags(self) -> dict[str, Any]:
        """Settings of this backend."""

    @abstractmethod
    def task(self, script: str, **fields: Any) -> Task:
        """A task that runs a shell script."""

    def settings(self, **flags: Any) -> Settings:
        """Settings of one instance, with a short lease."""
        given = {"redis_url": self.redis.url, "lease_seconds": 4, "num_consumers": 4, **self.flags(), **flags}
        return load(given).settings

    def client(self) -> AsyncClient:
        """A client of this system."""
        return AsyncClient(self.redis.url)

    @asynccontextmanager
    async def instance(self, **flags: Any) -> AsyncIterator[Dispatcher]:
        """An instance that takes tasks; killed, not drained, at the end if it still runs."""
        settings = self.settings(**flags)
        dispatcher = Dispatcher(settings, load_backend(settings, allow_process=True))
        async with anyio.create_task_group() as group:
            await group.start(dispatcher.run)
            yield dispatcher
            group.cancel_scope.cancel()

    @asynccontextmanager
    async def running(self, **flags: Any) -> AsyncIterator[AsyncClient]:
        """An instance and a client."""
        async with self.client() as client, self.instance(**flags):
            yield client


class ProcessSystem(System):
    """Tasks are child processes."""

    name = "process"

    def flags(self) -> dict[str, Any]:
        """See ``System.flags``."""
        return {"backend": "process", "process_directory": self.directory / "process"}

    def task(self, script: str, **fields: Any) -> Task:
        """See ``System.task``."""
        return Task(image="busybox", command=["/bin/sh", "-c", script], **fields)


class DockerSystem(System):
    """Tasks are containers of a real engine."""

    name = "docker"

    def __init__(self, redis_server: RedisUnderTest, directory: Path, engine: EngineUnderTest) -> None:
        super().__init__(redis_server, directory)
        self.engine = engine

    def flags(self) -> dict[str, Any]:
        """See ``System.flags``."""
        return {
            "backend": "docker",
            "docker_host": self.engine.base_url,
            "default_network": self.engine.network,
        }

    def task(self, script: str, **fields: Any) -> Task:
        """See ``System.task``."""
        return Task(image=self.engine.image, command=["sh", "-c", script], **fields)
