"""Images: what the governor costs where nothing is to be pulled, and what sharing a pull does."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from statistics import median

import anyio
import docker
from anyio import to_thread

from benchmarks.ground import Ground
from benchmarks.measure import Finding, measure
from dispatcher.backends import load_backend
from dispatcher.client import Task
from dispatcher.service import Dispatcher
from dispatcher.settings import load
from tests.support.faulty_registry import FaultyRegistry

#: Callers of one cold image.
CALLERS = 20
#: Bytes of a cold image, and what its registry sends a second: the pull takes about a second.
COLD_BYTES = 40_000_000
RATE = 40e6
#: Checks of a present image, whose median counts.
CHECKS = 300


@asynccontextmanager
async def dispatcher_on(ground: Ground) -> AsyncIterator[Dispatcher]:
    """A dispatcher in this process, for what is asked of its governor alone."""
    with ground.redis.client() as redis:
        redis.flushall()
    settings = load(ground.flags(log_level="error")).settings
    dispatcher = Dispatcher(settings, load_backend(settings, allow_process=False))
    async with anyio.create_task_group() as group:
        await group.start(dispatcher.run)
        yield dispatcher
        group.cancel_scope.cancel()


def raw_pull(client: docker.APIClient, reference: str) -> None:
    """As ``docker pull`` does it. Raises RuntimeError if the engine says that it failed."""
    repository, _, tag = reference.rpartition(":")
    for line in client.pull(repository, tag=tag, stream=True, decode=True):
        if "error" in line:
            raise RuntimeError(line["error"])


@measure
def shared_pull(ground: Ground, *, size: int = COLD_BYTES) -> Iterator[Finding]:
    """Many callers of one cold image, against one ``docker pull`` of an equal one."""
    with FaultyRegistry(rate=RATE) as registry:
        pair = [registry.add(name, layers=[size]) for name in ("a", "b")]
        ours, floor, pulls = anyio.run(_shared_pull, ground, registry, pair)
    batch = f"{CALLERS} callers, {size / 1e6:g} MB at {RATE / 1e6:g} MB/s"
    yield Finding(
        what="one cold image, many callers: seconds until all have it",
        batch=batch,
        ours_rounds=ours,
        floor_rounds=floor,
        against="one docker pull of an equal image",
        goal=1.05,
    )
    yield Finding(
        what="one cold image, many callers: pulls that the registry saw, at most",
        batch=batch,
        ours_rounds=[max(pulls)],
        unit="pulls",
        goal=1,
        judged="ours",
    )


async def _shared_pull(
    ground: Ground, registry: FaultyRegistry, pair: list[str]
) -> tuple[list[float], list[float], list[int]]:
    ours, floor, pulls = [], [], []
    async with dispatcher_on(ground) as dispatcher:
        for number in range(ground.rounds):
            # The two change places, so that no difference between them tells.
            mine, other = pair if number % 2 == 0 else reversed(pair)
            name = mine.rpartition("/")[2].partition(":")[0]
            before = registry.pulls(name)
            began = time.monotonic()
            async with anyio.create_task_group() as group:
                for caller in range(CALLERS):
                    group.start_soon(dispatcher.images.pull, Task(image=mine), f"caller-{caller}", "")
            ours.append(time.monotonic() - began)
            pulls.append(registry.pulls(name) - before)
            began = time.monotonic()
            await to_thread.run_sync(raw_pull, ground.client, other)
            floor.append(time.monotonic() - began)
            await to_thread.run_sync(partial(ground.remove, *pair))
    return ours, floor, pulls


@measure
def present(ground: Ground, *, checks: int = CHECKS) -> Iterator[Finding]:
    """Asking for an image that is there."""
    with FaultyRegistry() as registry:
        reference = registry.add("present")
        raw_pull(ground.client, reference)
        before = registry.requests("present").total()
        try:
            asked, remembered, floor = anyio.run(_present, ground, reference, checks)
        finally:
            ground.remove(reference)
        contacts = registry.requests("present").total() - before
    batch = f"p50 of {checks} in each round"
    inspect = "docker-py's inspect_image"
    yield Finding(
        what="an image that is there, asked of the engine",
        batch=batch,
        ours_rounds=[each * 1e3 for each in asked],
        floor_rounds=[each * 1e3 for each in floor],
        against=inspect,
        unit="ms",
        goal=1,
        judged="ours",
    )
    yield Finding(
        what="an image that was there a moment ago",
        batch=batch,
        ours_rounds=[each * 1e3 for each in remembered],
        floor_rounds=[each * 1e3 for each in floor],
        against=inspect,
        unit="ms",
        goal=1,
        judged="ours",
    )
    yield Finding(
        what="an image that is there: requests to its registry",
        batch=batch,
        ours_rounds=[contacts],
        unit="requests",
        goal=0,
        judged="ours",
    )


async def _present(
    ground: Ground, reference: str, checks: int
) -> tuple[list[float], list[float], list[float]]:
    """Medians of each round, in seconds: asked of the engine, remembered, the library alone."""
    task = Task(image=reference)
    asked, remembered, floor = [], [], []

    async def checked(*, forget: bool) -> float:
        took = []
        for _ in range(checks):
            if forget:
                dispatcher.images.forget(str(task.reference))
            began = time.perf_counter()
            if await dispatcher.images.needs_pull(task, ""):
                raise RuntimeError(f"{reference} is not there")
            took.append(time.perf_counter() - began)
        return median(took)

    def inspected() -> float:
        took = []
        for _ in range(checks):
            began = time.perf_counter()
            ground.client.inspect_image(reference)
            took.append(time.perf_counter() - began)
        return median(took)

    async with dispatcher_on(ground) as dispatcher:
        for _ in range(ground.rounds):
            asked.append(await checked(forget=True))
            remembered.append(await checked(forget=False))
            floor.append(await to_thread.run_sync(inspected))
    return asked, remembered, floor
