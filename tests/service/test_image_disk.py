"""Disk space of images, against a real engine and a real registry."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dispatcher.client import State, Task
from dispatcher.dispatch import image_disk
from tests.support.own_engine import own_engine
from tests.support.redis_server import RedisUnderTest
from tests.support.registry import RegistryUnderTest
from tests.support.system import DockerSystem
from tests.support.waiting import wait_until

TIMEOUT = 60
#: Beside it what else is on the engine and in an image is little.
BYTES = 8_000_000


@pytest.fixture
def docker_system(redis_server: RedisUnderTest, tmp_path: Path) -> Iterator[DockerSystem]:
    """On an engine whose images nobody else makes more or fewer."""
    with own_engine() as own:
        yield DockerSystem(redis_server, tmp_path, own.under_test)


def events(system: DockerSystem) -> list[str]:
    """The images that were told to be removed."""
    with contextlib.closing(system.redis.client()) as redis:
        found: Any = redis.xrange("{dispatcher:tasks}:events")
    return [fields[b"image"].decode() for _, fields in found if fields[b"kind"] == b"image.removed"]


async def test_the_least_recently_used_image_that_nobody_needs_is_removed(
    docker_system: DockerSystem, registry: RegistryUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_disk, "IMAGE_MIN_AGE", 0.0)
    engine = docker_system.engine
    names = ("theirs", "wanted", "recent", "unused")
    images = [registry.push(engine, f"disk-{name}", payload=os.urandom(BYTES)) for name in names]
    theirs, wanted, recent, unused = images
    engine.client.pull(theirs)
    async with docker_system.client() as client:

        async def run(image: str) -> None:
            handle = await client.submit(Task(image=image, command=["true"]))
            assert (await handle.wait(TIMEOUT)).state is State.SUCCEEDED

        def there() -> list[str]:
            return [image for image in images if engine.client.images(image)]

        async with docker_system.instance() as dispatcher:
            for image in images:
                await run(image)
            await run(recent)
            size = await dispatcher.backend.images_size()
        await client.submit(Task(image=wanted, command=["true"], delay=600))
        limits = {"image_disk_high": size - 1, "image_disk_low": size - BYTES // 2}
        async with docker_system.instance(**limits) as dispatcher:
            removed = "dispatcher_images_removed_total 1.0"
            await wait_until(lambda: removed in dispatcher.telemetry.exposition().decode(), TIMEOUT)
            assert there() == [theirs, wanted, recent]
            await wait_until(lambda: events(docker_system) == [unused], TIMEOUT)
            assert await dispatcher.backend.images_size() <= size - BYTES
            await run(unused)
            assert unused in there()
