"""A backend that has images alone, and what keeps its disk."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast

import anyio

from dispatcher.backends.base import Backend
from dispatcher.dispatch.image_disk import IMAGE_MIN_AGE, ImageDisk
from dispatcher.errors import BackendUnreachable
from dispatcher.queue.images import ImageLedger
from tests.queue.conftest import QueueUnderTest

DAEMON = "engine-1"
DIGEST = f"sha256:{'0' * 64}"


def name(of: str) -> str:
    return f"docker.io/library/{of}:1"


class Shelf:
    """Of a backend only the images: each takes ten bytes."""

    def __init__(self) -> None:
        #: Ids by reference.
        self.images: dict[str, str] = {}
        #: Ids that containers use.
        self.used: set[str] = set()
        self.away = 0
        self.looks = 0
        #: Called before each removal.
        self.on_look: Callable[[str], object] = lambda image: None

    async def image_id(self, image: str) -> str:
        self.on_look(image)
        return self.images.get(image, "")

    async def images_size(self) -> int:
        self.looks += 1
        if self.away:
            self.away -= 1
            raise BackendUnreachable("it is away")
        return 10 * len(set(self.images.values()))

    async def remove_image(self, image: str, image_id: str) -> bool:
        if self.images.get(image, image_id) != image_id or image_id in self.used:
            return False
        self.images.pop(image, None)
        return True


class DiskUnderTest:
    """An ImageDisk on a shelf, with a clock that a test sets."""

    def __init__(self, queue: QueueUnderTest) -> None:
        self.queue = queue
        self.shelf = Shelf()
        self.ledger = ImageLedger(queue.store)
        self.now = 1_000_000.0
        self.in_use: set[str] = set()
        self.removed: list[str] = []
        self.events: list[tuple[str, dict[str, str | int | float]]] = []
        self.disk = self.of()

    def of(self, high: int | None = 0, low: int = 0, **more: Any) -> ImageDisk:
        """Another of these settings."""

        def in_use() -> Collection[str]:
            return self.in_use

        def on_event(kind: str, fields: Mapping[str, str | int | float]) -> None:
            self.events.append((kind, dict(fields)))

        self.disk = ImageDisk(
            cast(Backend, self.shelf),
            self.ledger,
            daemon=lambda: DAEMON,
            high=high,
            low=low,
            in_use=in_use,
            on_removed=self.removed.append,
            on_event=on_event,
            clock=lambda: self.now,
            **more,
        )
        return self.disk

    def pull(self, of: str, image_id: str = "") -> str:
        """As the governor does it; returns the reference."""
        reference = name(of)
        before, after = self.shelf.images.get(reference, ""), image_id or f"id of {of}"
        new = after not in self.shelf.images.values()
        self.shelf.images[reference] = after
        self.disk.pulled(reference, before, after, new)
        return reference

    async def pulled_before(self, *of: str) -> None:
        """Each was pulled a second after the one before, all of them some time ago."""
        for one in of:
            self.pull(one)
            self.now += 1
        await self.disk._write()
        self.now += IMAGE_MIN_AGE

    @property
    def left(self) -> set[str]:
        """The names of what is there."""
        return {reference.split("/")[2].split(":")[0] for reference in self.shelf.images}


@asynccontextmanager
async def running(disk: ImageDisk) -> AsyncIterator[None]:
    async with anyio.create_task_group() as group:
        group.start_soon(disk.run)
        yield
        group.cancel_scope.cancel()
