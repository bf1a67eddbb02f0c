"""Presence and pulls of the Docker backend, on a real engine and a real registry."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

import anyio
import anyio.to_thread
import pytest

from dispatcher.backends import docker_images
from dispatcher.backends.base import PullProgress
from dispatcher.backends.docker import DockerBackend
from dispatcher.backends.docker_spec import fits_platform, layers_size
from dispatcher.errors import (
    BackendError,
    ImageNotFound,
    ImagePullFailed,
)
from tests.backends.conformance import agree, run_to_end, running
from tests.backends.docker_harness import DockerHarness
from tests.support.engine import EngineUnderTest
from tests.support.faulty_registry import FaultyRegistry
from tests.support.own_engine import own_engine
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
        assert not await backend.image_id(image)
        assert await backend.image_obtainable(image)
        await backend.prepare(image, told.append)
        assert await backend.image_id(image) == engine.client.inspect_image(image)["Id"]
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
            assert await backend.image_id(image)
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
        assert not await backend.image_id(image)
        # The only place for a pull is free again.
        await backend.prepare(image, ignore)
        assert await backend.image_id(image)


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


# --- platforms --------------------------------------------------------------------------------


def host_platform(engine: EngineUnderTest) -> tuple[str, str]:
    """This host's, and another one of the same system."""
    image = engine.client.inspect_image(engine.image)
    other = "arm64" if image["Architecture"] == "amd64" else "amd64"
    return f"{image['Os']}/{image['Architecture']}", f"{image['Os']}/{other}"


async def test_an_image_for_another_platform_is_not_there(
    engine: EngineUnderTest, harness: DockerHarness
) -> None:
    own, other = host_platform(engine)
    for platform in (None, own):
        backend = harness.backend(platform=platform)
        async with running(backend):
            assert await backend.image_id(engine.image) == engine.client.inspect_image(engine.image)["Id"]
            if platform is not None:
                _, end = await run_to_end(backend, harness.attempt("exit 7"))
                assert end.exit_code == 7
    backend = harness.backend(platform=other)
    async with running(backend):
        assert await backend.image_id(engine.image) == ""
        with pytest.raises(ImageNotFound, match="does not match the specified platform"):
            await backend.launch(harness.attempt("exit 7"), agree)


async def test_a_pull_for_a_platform(
    faulty_registry: FaultyRegistry, engine: EngineUnderTest, harness: DockerHarness
) -> None:
    own, other = host_platform(engine)
    image = faulty_registry.add("foreign", architecture=other.partition("/")[2])
    backend = harness.backend(platform=other)
    async with running(backend):
        await backend.prepare(image, ignore)
        image_id = await backend.image_id(image)
        assert image_id
    backend = harness.backend(platform=own)
    async with running(backend):
        # The registry has nothing else, which engines only warn of.
        with pytest.raises(ImageNotFound, match="another platform"):
            await backend.prepare(image, ignore)
        assert await backend.image_id(image) == ""
        assert await backend.remove_image(image, image_id)


# --- sizes and removal ------------------------------------------------------------------------


async def test_what_images_take(faulty_registry: FaultyRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    with own_engine() as own:
        backend = DockerBackend(base_url=own.base_url, max_pulls=1)
        image = faulty_registry.add("big", layers=[8 * MIB])
        async with running(backend):
            before = await backend.images_size()
            await backend.prepare(image, ignore)
            assert 8 * MIB < await backend.images_size() - before < 16 * MIB
            # As a newer engine is asked, which an older one answers as well.
            monkeypatch.setattr(docker_images, "_SIZES_APART", "1.24")
            assert 8 * MIB < await backend.images_size() - before < 16 * MIB
            assert await backend.remove_image(image, await backend.image_id(image))
            assert await backend.images_size() == before


async def test_removal(faulty_registry: FaultyRegistry, backend: DockerBackend) -> None:
    image = faulty_registry.add("app")
    async with running(backend):
        await backend.prepare(image, ignore)
        image_id = await backend.image_id(image)
        # The name has come to mean another image.
        faulty_registry.add("app")
        await backend.prepare(image, ignore)
        assert not await backend.remove_image(image, image_id)
        new_id = await backend.image_id(image)
        assert new_id not in {"", image_id}
        assert await backend.remove_image(image, new_id)
        assert not await backend.image_id(image)
        assert await backend.remove_image(image, new_id)
        assert await backend.remove_image(image, "")


@pytest.mark.parametrize("other_name", [False, True])
async def test_an_image_with_a_container_keeps_its_name(
    faulty_registry: FaultyRegistry,
    engine: EngineUnderTest,
    harness: DockerHarness,
    backend: DockerBackend,
    *,
    other_name: bool,
) -> None:
    image = faulty_registry.add("app")
    async with running(backend):
        await backend.prepare(image, ignore)
        image_id = await backend.image_id(image)
        if other_name:
            # An engine would take one of two names without a look at containers.
            engine.client.tag(image, f"{faulty_registry.host}/other", "1")
        handle, _ = await run_to_end(backend, harness.attempt("exit 0", image=image))
        assert not await backend.remove_image(image, image_id)
        assert await backend.image_id(image) == image_id
        await backend.remove(handle)
        assert await backend.remove_image(image, image_id)
        assert not await backend.image_id(image)
        if other_name:
            other = f"{faulty_registry.host}/other:1"
            assert await backend.image_id(other) == image_id
            assert await backend.remove_image(other, image_id)


async def test_removal_by_digest(faulty_registry: FaultyRegistry, backend: DockerBackend) -> None:
    tagged = faulty_registry.add("app")
    image = f"{faulty_registry.host}/app@{faulty_registry.digest('app')}"
    async with running(backend):
        await backend.prepare(image, ignore)
        assert await backend.remove_image(image, await backend.image_id(image))
        assert not await backend.image_id(image)
        assert not await backend.image_id(tagged)


@pytest.mark.parametrize(
    ("usage", "size"), [({"LayersSize": 7}, 7), ({"LayersSize": 0}, 0), ({"ImageUsage": {"TotalSize": 9}}, 9)]
)
def test_sizes_are_told_in_two_ways(usage: dict[str, Any], size: int) -> None:
    assert layers_size(usage) == size


def test_sizes_may_not_be_told() -> None:
    with pytest.raises(BackendError, match="does not tell"):
        layers_size({})


@pytest.mark.parametrize(
    ("variant", "wanted", "fits"),
    [
        ("", "linux/arm64", True),
        ("v8", "linux/arm64", True),
        ("", "linux/arm64/v8", True),
        ("v8", "linux/arm64/v8", True),
        ("v9", "linux/arm64/v8", False),
        ("", "linux/arm/v7", False),
        ("", "windows/arm64", False),
        ("", None, True),
    ],
)
def test_platforms_fit(variant: str, wanted: str | None, *, fits: bool) -> None:
    inspected = {"Os": "linux", "Architecture": "arm64", "Variant": variant}
    assert fits_platform(inspected, wanted) is fits
