"""What becomes of a pull when the registry fails, on a real engine."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Iterator

import anyio
import docker.errors
import pytest

from dispatcher.backends import docker_images
from dispatcher.backends.base import PullProgress
from dispatcher.backends.docker import DockerBackend
from dispatcher.errors import (
    BackendError,
    ImageInvalid,
    ImageNotFound,
    ImagePullFailed,
    ImageUnauthorized,
    RegistryThrottled,
)
from tests.backends.conformance import running
from tests.backends.docker_harness import DockerHarness
from tests.support.engine import EngineUnderTest
from tests.support.faulty_registry import EVERY, Fault, FaultyRegistry
from tests.support.own_engine import own_engine
from tests.support.waiting import wait_until

MIB = 1024 * 1024
#: Of both ways to answer: what a person wrote, and what some proxy did.
PAGE = b"<html>no</html>"

pytestmark = pytest.mark.timeout(60)


def ignore(progress: PullProgress) -> None:
    """Nobody asks where the pull is."""


@pytest.fixture
def registry(engine: EngineUnderTest, faulty_registry: FaultyRegistry) -> Iterator[FaultyRegistry]:
    """A registry whose images the engine has not kept afterwards."""
    yield faulty_registry
    forget(engine, faulty_registry)


def forget(engine: EngineUnderTest, registry: FaultyRegistry) -> None:
    for image in engine.client.images():
        for name in [*(image["RepoTags"] or []), *(image["RepoDigests"] or [])]:
            if name.startswith(registry.host):
                with contextlib.suppress(docker.errors.ImageNotFound):
                    engine.client.remove_image(name)


@contextlib.asynccontextmanager
async def one_place(engine: EngineUnderTest) -> AsyncIterator[DockerBackend]:
    """A backend with one place for a pull: it is free again, or the next pull hangs."""
    backend = DockerHarness(engine).backend(max_pulls=1)
    async with running(backend):
        yield backend


async def failure_of(backend: DockerBackend, image: str) -> BackendError:
    with pytest.raises(BackendError) as failure:
        await backend.prepare(image, ignore)
    return failure.value


REFUSALS: list[tuple[Fault, type[BackendError]]] = [
    (Fault(status=401), ImageUnauthorized),
    (Fault(status=401, body=PAGE), ImageUnauthorized),
    # Told as the engine does, which can't know whether there is such an image.
    (Fault(status=403), ImageNotFound),
    (Fault(status=403, body=PAGE), ImageUnauthorized),
    (Fault(status=404), ImageNotFound),
    (Fault(status=404, body=PAGE), ImageNotFound),
    (Fault(status=404, on="blobs"), ImageInvalid),
    (Fault(bad_json=True), ImageInvalid),
    (Fault(manifest_type="application/vnd.example.thing+json"), ImageInvalid),
    (Fault(config_type="application/vnd.cncf.helm.config.v1+json"), ImageInvalid),
    (Fault(status=418, body=b"tea"), ImagePullFailed),
    (Fault(drop="close"), ImagePullFailed),
    (Fault(drop="reset"), ImagePullFailed),
]


async def test_refusals_and_broken_images(engine: EngineUnderTest, registry: FaultyRegistry) -> None:
    image = registry.add("app")
    async with one_place(engine) as backend:
        for fault, kind in REFUSALS:
            registry.fault("app", fault)
            error = await failure_of(backend, image)
            assert type(error) is kind, (str(fault), error)
            assert error.recoverable is (kind is ImagePullFailed)
            assert not await backend.image_id(image)
        registry.heal("app")
        await backend.prepare(image, ignore)
        assert await backend.image_id(image)


THROTTLES: list[tuple[Fault, float | None]] = [
    (Fault(status=429, retry_after="7"), 7),
    (Fault(status=429, retry_after="7", body=PAGE), 7),
    (Fault(status=429, body=b""), None),
    (Fault(status=503, retry_after="7"), 7),
    # It says so itself: nobody is asked.
    (Fault(status=429, message="retry-after: 1m30s, allowed: 9/minute", retry_after="7"), 90),
    (Fault(status=500, retry_after="7"), None),
    (Fault(status=502), None),
    (Fault(status=504), None),
]


async def test_throttled(engine: EngineUnderTest, registry: FaultyRegistry) -> None:
    image = registry.add("app")
    async with one_place(engine) as backend:
        for fault, seconds in THROTTLES:
            registry.fault("app", fault)
            before = registry.requests("app")["HEAD manifests"]
            error = await failure_of(backend, image)
            assert isinstance(error, RegistryThrottled), (str(fault), error)
            assert error.retry_after == seconds, str(fault)
            # One of them is the engine's.
            asked = registry.requests("app")["HEAD manifests"] - before
            assert asked == (1 if seconds == 90 else 2), str(fault)
        registry.heal("app")
        await backend.prepare(image, ignore)
        assert await backend.image_id(image)


async def test_a_registry_that_does_not_say_how_long_is_not_waited_for(
    engine: EngineUnderTest, registry: FaultyRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docker_images, "ASK_TIMEOUT", 0.3)
    async with (
        await anyio.create_tcp_listener(local_host="127.0.0.1") as silent,
        one_place(engine) as backend,
        anyio.create_task_group() as tasks,
    ):
        hung_up = anyio.Event()

        async def hold(stream: anyio.abc.SocketStream) -> None:
            async with stream:
                with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                    while True:
                        await stream.receive()
            hung_up.set()

        tasks.start_soon(silent.serve, hold)
        port = silent.extra(anyio.abc.SocketAttribute.local_port)
        monkeypatch.setattr(docker_images, "manifest_url", lambda *_: f"http://127.0.0.1:{port}/")
        image = registry.add("app")
        registry.fault("app", Fault(status=429))
        error = await failure_of(backend, image)
        assert type(error) is RegistryThrottled
        assert error.retry_after is None
        # The question has been ended, not left.
        with anyio.fail_after(5):
            await hung_up.wait()
        tasks.cancel_scope.cancel()


async def test_manifest_of_another_digest(engine: EngineUnderTest, registry: FaultyRegistry) -> None:
    registry.add("app")
    image = f"{registry.host}/app@{registry.digest('app')}"
    registry.fault("app", Fault(wrong_manifest=True))
    async with one_place(engine) as backend:
        assert type(await failure_of(backend, image)) is ImageInvalid
        registry.heal("app")
        await backend.prepare(image, ignore)
        assert await backend.image_id(image)


LAYER_FAULTS = {
    "digest": (Fault(wrong_layers=True), ImagePullFailed, "verification failed"),
    "reset": (Fault(reset_after=MIB), ImagePullFailed, "connection reset by peer"),
    "half": (Fault(close_after=MIB), ImagePullFailed, "unexpected EOF"),
    "error": (Fault(status=500, on="layers"), RegistryThrottled, "500"),
    "throttled": (Fault(status=429, on="layers"), RegistryThrottled, "toomanyrequests"),
    "gone": (Fault(status=404, on="layers"), ImageInvalid, "unknown blob"),
}


async def test_broken_layers(faulty_registry: FaultyRegistry) -> None:
    """All at once: an engine waits for five seconds before it tries such a layer again."""
    images = {name: faulty_registry.add(name, layers=[2 * MIB]) for name in LAYER_FAULTS}
    for name, (fault, _, _) in LAYER_FAULTS.items():
        faulty_registry.fault(name, fault)
    found: dict[str, BackendError] = {}
    with own_engine(hasty=True) as engine:
        backend = DockerBackend(base_url=engine.base_url, max_pulls=len(LAYER_FAULTS))

        async def pull(name: str) -> None:
            found[name] = await failure_of(backend, images[name])

        async with running(backend):
            async with anyio.create_task_group() as tasks:
                for name in images:
                    tasks.start_soon(pull, name)
            for name, (_, kind, words) in LAYER_FAULTS.items():
                assert type(found[name]) is kind, name
                assert words in str(found[name])
                assert not await backend.image_id(images[name])
                faulty_registry.heal(name)
            async with anyio.create_task_group() as tasks:
                for image in images.values():
                    tasks.start_soon(backend.prepare, image, ignore)
            assert all([await backend.image_id(image) for image in images.values()])


async def test_layers_that_drip_are_progress(engine: EngineUnderTest, registry: FaultyRegistry) -> None:
    image = registry.add("app", layers=[8 * MIB])
    registry.fault("app", Fault(drip=2 * MIB))
    told: list[PullProgress] = []
    async with one_place(engine) as backend:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(backend.prepare, image, told.append)
            await wait_until(lambda: len({one.bytes_done for one in told}) >= 4)
            assert registry.sending("app")
            tasks.cancel_scope.cancel()
        await wait_until(lambda: not registry.sending("app"))
        registry.heal("app")
        await backend.prepare(image, ignore)
    assert [one.bytes_done for one in told] == sorted(one.bytes_done for one in told)


async def test_layers_that_stall_are_none(engine: EngineUnderTest, registry: FaultyRegistry) -> None:
    image = registry.add("app", layers=[8 * MIB])
    registry.fault("app", Fault(stall_after=4 * MIB))
    told: list[PullProgress] = []
    since = anyio.Event()

    def on_progress(progress: PullProgress) -> None:
        told.append(progress)
        since.set()

    async with one_place(engine) as backend:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(backend.prepare, image, on_progress)
            # Until nothing is told any more: a report comes at least each quarter of a second.
            quiet = False
            while not quiet:
                since = anyio.Event()
                with anyio.move_on_after(1 if registry.sending("app") else math.inf) as patience:
                    await since.wait()
                quiet = patience.cancelled_caught
            assert registry.sending("app") == 1
            assert 0 < told[-1].bytes_done < told[-1].bytes_total
            tasks.cancel_scope.cancel()
        assert not await backend.image_id(image)
        # An engine keeps a connection that stalls. But it has given the layer up: the next pull does
        # not wait for it, it asks for it anew.
        asked = registry.requests("app")["GET blobs"]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(backend.prepare, image, ignore)
            await wait_until(lambda: registry.requests("app")["GET blobs"] > asked)
            registry.heal("app")
        assert await backend.image_id(image)


async def test_a_stall_that_ends_is_no_failure(engine: EngineUnderTest, registry: FaultyRegistry) -> None:
    image = registry.add("app", layers=[2 * MIB])
    registry.fault(EVERY, Fault(stall_after=MIB))
    async with one_place(engine) as backend, anyio.create_task_group() as tasks:
        tasks.start_soon(backend.prepare, image, ignore)
        await wait_until(lambda: registry.sending("app") > 0)
        registry.heal(EVERY)
    assert registry.pulls("app") == 1
