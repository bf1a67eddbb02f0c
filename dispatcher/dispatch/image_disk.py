"""Disk space that images take: what no open task uses is removed, least recently used first.

Off unless IMAGE_DISK_HIGH is set. Then, when the images of a daemon take more than that, they
are brought down to IMAGE_DISK_LOW. Only what a dispatcher of this system pulled is removed, as
the ledger in Redis tells: never what was there before, what a reference stands for that somebody
has moved, what an open task names, what is being pulled or was used a moment ago, or what a
container uses.

Every instance does this for the daemon it uses. All of it may be done twice: what another has
removed is gone, and that is what was wanted. Nothing is removed while Redis or the daemon does
not answer, or when more tasks are open than can be looked through. A task that comes in the very
moment its image goes finds it gone, and has it pulled.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from random import uniform

import anyio
import structlog

from dispatcher.backends.base import Backend
from dispatcher.errors import BackendError, QueueError
from dispatcher.queue.images import ImageLedger, PulledImage
from dispatcher.reference import ImageReference
from dispatcher.retry import RetryPause

log = structlog.get_logger(__name__)

#: Seconds between looks: one asks the daemon for a number, and Redis only if that is too large.
LOOK_SECONDS = 60.0
#: Seconds from a pull to the look it calls for; others that end meanwhile share it.
SETTLE_SECONDS = 5.0
#: A look that took long is followed by a pause of so many times as long: Redis and the daemon
#: have others to serve.
REST = 10.0
#: Seconds before the first look is repeated that failed.
FIRST_PAUSE = 1.0
#: Seconds for which an image that was used is kept: its task may not have its container yet.
IMAGE_MIN_AGE = 60.0
#: Images removed until open tasks are looked at again.
REMOVALS = 10
#: Images whose pull or use waits to be written down; further ones are not.
MAX_NOTED = 10_000
#: Seconds for what is left to be written at the end.
LAST_WORDS_TIMEOUT = 2.0


class ImageDisk:
    """Keeps account of pulled images, and makes room where they take too much."""

    def __init__(
        self,
        backend: Backend,
        ledger: ImageLedger,
        *,
        daemon: Callable[[], str],
        high: int | None,
        low: int,
        in_use: Callable[[], Collection[str]],
        on_removed: Callable[[str], None],
        on_event: Callable[[str, Mapping[str, str | int | float]], None] = lambda kind, fields: None,
        interval: float = LOOK_SECONDS,
        settle: float = SETTLE_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``high`` and ``low`` in bytes; without ``high`` nothing is removed, and account is kept
        all the same. ``in_use`` tells references that must stay, ``on_removed`` is told those that
        are gone; ``interval`` and ``settle`` in seconds; ``clock`` tells Unix seconds."""
        self._backend = backend
        self._ledger = ledger
        self._daemon = daemon
        self._high = high
        self._low = low
        self._in_use = in_use
        self._on_removed = on_removed
        self._on_event = on_event
        self._interval = interval
        self._settle = settle
        self._clock = clock
        self._woken = anyio.Event()
        #: Whether images took too much at the last look, whatever it removed.
        self._full = False
        #: Pulls to be written down, as (reference, id before, id after, whether new, Unix seconds).
        self._pulls: list[tuple[str, str, str, bool, float]] = []
        #: Uses to be written down, in Unix seconds.
        self._uses: dict[str, float] = {}

    # --- what happens to images ---------------------------------------------------------

    def pulled(self, reference: str, before: str, after: str, new: bool) -> None:
        """A pull of ours has ended; the ids its reference had, '' for none, and whether the daemon
        had the second by no name before."""
        if after and len(self._pulls) < MAX_NOTED:
            self._pulls.append((reference, before, after, new, self._clock()))
            self.wake()

    def used(self, reference: str) -> None:
        """A task is being launched from an image."""
        if reference in self._uses or len(self._uses) < MAX_NOTED:
            self._uses[reference] = self._clock()

    def wake(self) -> None:
        """Look soon."""
        self._woken.set()

    # --- looks --------------------------------------------------------------------------

    async def run(self) -> None:
        """Look until cancelled, whatever Redis and the daemon do meanwhile."""
        retry = RetryPause(min(FIRST_PAUSE, self._interval), self._interval)
        try:
            while True:
                began = anyio.current_time()
                try:
                    await self.look()
                except (BackendError, QueueError) as error:
                    log.info("image_disk.put_off", error=str(error))
                    await retry.wait()
                except Exception:
                    log.exception("image_disk.failed")
                    await retry.wait()
                else:
                    retry.reset()
                    await self._rest(anyio.current_time() - began)
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(LAST_WORDS_TIMEOUT):
                await self._last_words()

    async def look(self) -> None:
        """Write down what happened, and make room if images take more than they may.

        Raises BackendError, QueueError: what was not written is written by the next look.
        """
        await self._write()
        if self._high is None:
            return
        size = await self._backend.images_size()
        if size > self._high:
            size = await self._make_room(size)
        if size > self._high and not self._full:
            log.warning("image_disk.full", bytes=size, high=self._high)
        self._full = size > self._high

    async def _rest(self, took: float) -> None:
        # Of instances on one daemon each looks at a moment of its own.
        with anyio.move_on_after(uniform(self._interval, 1.25 * self._interval)):  # noqa: S311 - jitter
            await self._woken.wait()
            pause = max(self._settle, min(REST * took, self._interval))
            await anyio.sleep(uniform(pause / 2, pause))  # noqa: S311 - jitter, not a secret
        self._woken = anyio.Event()

    # --- account ------------------------------------------------------------------------

    async def _write(self) -> None:
        """Write pulls and uses down. Raises QueueError."""
        daemon = self._daemon()
        known = await self._ledger.pulled(daemon) if self._pulls else {}
        while self._pulls:
            reference, before, after, new, moment = self._pulls[0]
            # What was there before us is not ours, neither the name nor what it names now, unless it
            # was we who had put it there.
            named_by_us = not before or (reference in known and known[reference].image_id == before)
            if named_by_us and (new or after in {image.image_id for image in known.values()}):
                await self._ledger.note(daemon, reference, after, moment)
                known[reference] = PulledImage(after, moment)
            self._pulls.pop(0)
        uses = dict(self._uses)
        if uses:
            await self._ledger.used(daemon, uses)
        for reference, moment in uses.items():
            if self._uses[reference] == moment:
                del self._uses[reference]

    async def _last_words(self) -> None:
        try:
            await self._write()
        except QueueError as error:
            log.info("image_disk.not_written", error=str(error))

    # --- room ---------------------------------------------------------------------------

    async def _make_room(self, size: int) -> int:
        """Remove what may go until images take no more than ``low``; the bytes they take then.

        Raises BackendError, QueueError.
        """
        removed = REMOVALS
        # Each round leaves the ledger shorter than it was.
        while size > self._low and removed == REMOVALS:
            daemon = self._daemon()
            pulled = await self._ledger.pulled(daemon)
            wanted = await self._wanted(pulled) if pulled else set()
            removed = 0
            for reference, image in sorted(pulled.items(), key=lambda item: item[1].used):
                if not await self._removed(daemon, reference, image, wanted):
                    continue
                before, size = size, await self._backend.images_size()
                self._tell(reference, image, max(0, before - size))
                removed += 1
                if size <= self._low or removed == REMOVALS:
                    break
        return size

    async def _removed(self, daemon: str, reference: str, image: PulledImage, wanted: set[str]) -> bool:
        """Remove one, if it may go; whether it went."""
        if reference in wanted or not self._may_go(reference, image):
            return False
        image_id = await self._backend.image_id(reference)
        if image_id != image.image_id:
            await self._ledger.forget(daemon, reference)
            log.info("image.forgotten", image=reference, image_id=image_id)
            return False
        # A task may have come for it while we asked.
        if await self._is_named(reference, image, wanted) or not self._may_go(reference, image):
            return False
        if not await self._backend.remove_image(reference, image.image_id):
            return False  # a container uses it
        self._on_removed(reference)
        await self._ledger.forget(daemon, reference)
        return True

    async def _wanted(self, pulled: Collection[str]) -> set[str]:
        """Of the references that open tasks name, normalised: those that were ``pulled``, and
        digests beside them. Raises QueueError."""
        repositories = {_repository(reference) for reference in pulled}
        wanted: set[str] = set()
        async for document in self._ledger.open_documents():
            named = str(_parsed(_image_of(document)) or "")
            if named in pulled or ("@" in named and _repository(named) in repositories):
                wanted.add(named)
        return wanted

    def _may_go(self, reference: str, image: PulledImage) -> bool:
        used = max(image.used, self._uses.get(reference, 0.0))
        return self._clock() - used >= IMAGE_MIN_AGE and reference not in self._in_use()

    async def _is_named(self, reference: str, image: PulledImage, wanted: Collection[str]) -> bool:
        """Whether an open task names the same image by its digest: an engine that removes the last
        tag of a repository removes the digests' names as well."""
        repository = _repository(reference)
        for other in (*wanted, *self._in_use()):
            # A reference without a digest is a tag, and this one is known not to be wanted.
            beside = other != reference and "@" in other and _repository(other) == repository
            if beside and await self._backend.image_id(other) == image.image_id:
                return True
        return False

    def _tell(self, reference: str, image: PulledImage, freed: int) -> None:
        unused = round(max(0.0, self._clock() - image.used))
        fields: dict[str, str | int | float] = {
            "image": reference,
            "bytes": freed,
            "unused_seconds": unused,
        }
        log.info("image.removed", image_id=image.image_id, **fields)
        self._on_event("image.removed", fields)


def _image_of(document: bytes) -> str:
    """The image a task's document names; '' if it names none."""
    try:
        found = json.loads(document)
    except (ValueError, RecursionError):  # it will be refused when it is taken
        return ""
    image = found.get("image") if isinstance(found, dict) else None
    return image if isinstance(image, str) else ""


@lru_cache(maxsize=1_000)
def _parsed(name: str) -> ImageReference | None:
    """What many tasks name is parsed once; None if it is no reference, and will be refused."""
    try:
        return ImageReference.parse(name)
    except ValueError:
        return None


def _repository(reference: str) -> str:
    parsed = _parsed(reference)
    return f"{parsed.registry}/{parsed.repository}" if parsed else ""
