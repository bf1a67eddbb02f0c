"""A backend whose pulls end when the test says so, and a governor on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio

from dispatcher.backends.base import Capabilities, OnProgress, PullProgress
from dispatcher.dispatch import images, pull_line
from dispatcher.dispatch.images import ImageGovernor
from dispatcher.errors import BackendError
from dispatcher.task import Task


def a_task(image: str, **fields: object) -> Task:
    return Task.model_validate({"image": image, **fields})


@dataclass
class _UnderWay:
    ended: anyio.Event = field(default_factory=anyio.Event)
    error: BackendError | None = None
    on_progress: OnProgress | None = None


class PullingBackend:
    """Of a backend only what has to do with images. It refuses what the governor must not do."""

    capabilities = Capabilities(pulls=True, isolated=True)

    def __init__(self, *, at_once: int, per_registry: int) -> None:
        self._at_once = at_once
        self._per_registry = per_registry
        self.present: set[str] = set()
        self.under_way: dict[str, _UnderWay] = {}
        #: How often each image was asked for, and pulled.
        self.looks: Counter[str] = Counter()
        self.pulls: Counter[str] = Counter()
        #: What it was asked to do and must not be.
        self.broken: list[str] = []

    async def image_id(self, image: str) -> str:
        self.looks[image] += 1
        await anyio.lowlevel.checkpoint()
        return f"id of {image}" if image in self.present else ""

    async def prepare(self, image: str, on_progress: OnProgress) -> bool:
        if image in self.under_way:
            self.broken.append(f"two pulls of {image}")
        mine = self.under_way[image] = _UnderWay(on_progress=on_progress)
        self.pulls[image] += 1
        registries = Counter(name.partition("/")[0] for name in self.under_way)
        if len(self.under_way) > self._at_once or max(registries.values()) > self._per_registry:
            self.broken.append(f"too many pulls: {sorted(self.under_way)}")
        try:
            await mine.ended.wait()
            await anyio.lowlevel.checkpoint()
        finally:
            # Ending takes a moment, as it does with an engine.
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
            if self.under_way.get(image) is mine:
                del self.under_way[image]
        if mine.error is not None:
            raise mine.error
        new = image not in self.present
        self.present.add(image)
        return new

    def end(self, image: str, error: BackendError | None = None) -> None:
        """The pull of ``image`` ends."""
        self.under_way[image].error = error
        self.under_way[image].ended.set()

    def move(self, image: str, done: int, total: int) -> None:
        """The pull of ``image`` makes progress."""
        report = self.under_way[image].on_progress
        assert report is not None
        report(PullProgress(image, done, total, 0, 1))


@dataclass
class Governed:
    """A governor that runs, and what it told."""

    governor: ImageGovernor
    backend: PullingBackend
    events: list[tuple[str, dict[str, str | int | float]]] = field(default_factory=list)
    pulled: list[tuple[str, str, str, bool]] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    bytes: int = 0

    def kinds(self, image: str) -> list[str]:
        """The kinds of events of one image, in order."""
        return [kind for kind, fields in self.events if fields.get("image") == image]


@asynccontextmanager
async def governing(
    *, at_once: int = 2, per_registry: int | None = None, stall_timeout: float = 60.0, max_waiting: int = 100
) -> AsyncIterator[Governed]:
    """A running governor; ended, with its pulls, at the end."""
    backend = PullingBackend(at_once=at_once, per_registry=per_registry or at_once)

    def on_event(kind: str, fields: Mapping[str, str | int | float]) -> None:
        told.events.append((kind, dict(fields)))

    def on_bytes(count: int) -> None:
        told.bytes += count

    governor = ImageGovernor(
        backend,  # type: ignore[arg-type] # of its verbs only those that are asked for
        max_concurrent=at_once,
        max_per_registry=per_registry or at_once,
        max_waiting=max_waiting,
        stall_timeout=stall_timeout,
        on_pulled=lambda *pull: told.pulled.append(pull),
        on_used=lambda image: told.used.append(image),  # noqa: PLW0108 - there is no `told` yet
        on_event=on_event,
        on_ended=lambda seconds, outcome: told.ended.append(outcome),
        on_bytes=on_bytes,
    )
    told = Governed(governor, backend)
    async with anyio.create_task_group() as group:
        await group.start(governor.run)
        yield told
        group.cancel_scope.cancel()


def no_pauses(put: Callable[[object, str, float], None]) -> None:
    """Have ``put`` make the governor try again, and ask a registry again, at once."""
    put(images, "FIRST_PAUSE", 0.0)
    put(images, "MAX_PAUSE", 0.0)
    put(pull_line, "FIRST_COOL_DOWN", 0.0)


async def settled() -> None:
    """Let everything happen that waits for nothing but its turn in the loop."""
    for _ in range(30):
        await anyio.lowlevel.checkpoint()


class Waiters:
    """Tasks that wait for images, and what became of each."""

    def __init__(self, told: Governed, group: anyio.abc.TaskGroup) -> None:
        self._told = told
        self._group = group
        self.scopes: dict[str, anyio.CancelScope] = {}
        self.ends: dict[str, str] = {}

    def start(self, task_id: str, image: str) -> None:
        self.scopes[task_id] = anyio.CancelScope()
        self._group.start_soon(self._wait, task_id, image)

    async def want(self, task_id: str, image: str) -> None:
        self.start(task_id, image)
        await settled()

    async def _wait(self, task_id: str, image: str) -> None:
        self.ends[task_id] = "cancelled"
        with self.scopes[task_id]:
            try:
                await self._told.governor.pull(a_task(image), task_id, f"{task_id}.1")
                self.ends[task_id] = "pulled"
            except BackendError as error:
                self.ends[task_id] = type(error).__name__

    @property
    def open(self) -> set[str]:
        return {name for name, scope in self.scopes.items() if name not in self.ends or self._runs(name)}

    def _runs(self, name: str) -> bool:
        return any(name in pull.waiting_tasks for pull in self._told.governor.pulls)


async def governed(scenario: Callable[[Governed, Waiters], Awaitable[None]], **limits: float) -> None:
    async with governing(**limits) as told, anyio.create_task_group() as group:  # type: ignore[arg-type]
        await scenario(told, Waiters(told, group))
        group.cancel_scope.cancel()
    assert not told.backend.broken
