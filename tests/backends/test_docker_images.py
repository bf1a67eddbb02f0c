"""Presence and pulls of the Docker backend, on a real engine and a real registry."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

import anyio
import anyio.to_thread
import pytest

from dispatcher.backends.base import PullProgress
from dispatcher.backends.docker import DockerBackend
from dispatcher.errors import (
    ImageNotFound,
    ImagePullFailed,
)
from tests.backends.conformance import run_to_end, running
from tests.backends.docker_harness import DockerHarness
from tests.support.engine import EngineUnderTest
from tests.support.registry import RegistryUnderTest

MIB = 1024 * 1024

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def harness(docker_harness: DockerHarness) -> DockerHarness:
    return docker_harness


@pytest.fixture
def backend(harness: DockerHarness) -> DockerBackend:
    return harness.backend()


def ignore(progress: PullProgress) -> None:
    """Nobody asks where the pull is."""


async def test_pull_and_presence(
    registry: RegistryUnderTest, engine: EngineUnderTest, harness: DockerHarness, backend: DockerBackend
) -> None:
    image = registry.push(engine, "pull-good", payload=os.urandom(4 * MIB))
    told: list[PullProgress] = []
    async with running(backend):
        assert not await backend.image_present(image)
        assert await backend.image_obtainable(image)
        await backend.prepare(image, told.append)
        assert await backend.image_present(image)
        _, end = await run_to_end(backend, harness.attempt("exit 5", image=image))
    assert end.exit_code == 5
    assert (told[-1].image, told[-1].layers_done, told[-1].layers_total) == (image, 1, 1)
    assert told[-1].bytes_done == told[-1].bytes_total
    assert [one.bytes_done for one in told] == sorted(one.bytes_done for one in told)


async def test_pull_by_digest(
    registry: RegistryUnderTest, engine: EngineUnderTest, harness: DockerHarness, backend: DockerBackend
) -> None:
    tagged = registry.push(engine, "pull-digest")
    digest = engine.client.inspect_distribution(tagged)["Descriptor"]["digest"]
    async with running(backend):
        for image in (f"{tagged.rpartition(':')[0]}@{digest}", f"{tagged}@{digest}"):
            await backend.prepare(image, ignore)
            assert await backend.image_present(image)
            _, end = await run_to_end(backend, harness.attempt("exit 6", image=image))
            assert end.exit_code == 6


async def test_pull_of_what_the_registry_lacks(
    registry: RegistryUnderTest, engine: EngineUnderTest, backend: DockerBackend
) -> None:
    image = registry.push(engine, "pull-absent")
    async with running(backend):
        for absent in (f"{image}-no-such-tag", f"{registry.host}/no-such-name:1"):
            with pytest.raises(ImageNotFound):
                await backend.prepare(absent, ignore)
            assert not await backend.image_obtainable(absent)


async def test_pull_from_a_registry_that_is_not_there(backend: DockerBackend) -> None:
    image = "127.0.0.1:1/nobody:1"
    async with running(backend):
        with pytest.raises(ImagePullFailed, match="connection refused") as failure:
            await backend.prepare(image, ignore)
        assert failure.value.recoverable
        assert not await backend.image_obtainable(image)


async def test_cancelled_pull_ends_in_the_engine_too(
    registry: RegistryUnderTest, engine: EngineUnderTest, harness: DockerHarness
) -> None:
    backend = harness.backend(max_pulls=1)
    image = registry.push(engine, "pull-cancelled", payload=os.urandom(48 * MIB))
    moving = anyio.Event()

    async with running(backend):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(backend.prepare, image, lambda progress: moving.set())
            await moving.wait()
            began = time.monotonic()
            tasks.cancel_scope.cancel()
        assert time.monotonic() - began < 2
        assert not await backend.image_present(image)
        # The only place for a pull is free again.
        await backend.prepare(image, ignore)
        assert await backend.image_present(image)


@contextlib.asynccontextmanager
async def silent_registry() -> Any:
    """An address that takes connections and never answers."""
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        connected = anyio.Event()

        async def hold(stream: anyio.abc.SocketStream) -> None:
            async with stream:
                connected.set()
                await anyio.sleep_forever()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, hold)
            port = listener.extra(anyio.abc.SocketAttribute.local_port)
            yield f"127.0.0.1:{port}/silent:1", connected
            tasks.cancel_scope.cancel()


async def test_pull_can_be_cancelled_before_its_first_answer(backend: DockerBackend) -> None:
    async with silent_registry() as (image, connected), running(backend):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(backend.prepare, image, ignore)
            await connected.wait()
            began = time.monotonic()
            tasks.cancel_scope.cancel()
        assert time.monotonic() - began < 2
