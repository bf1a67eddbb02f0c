"""What comes from an engine in pieces: a pull's progress, and a container's output."""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from typing import Any, Protocol

import anyio
from anyio import from_thread
from docker.errors import create_api_error_from_http_exception
from docker.utils import version_lt
from requests import HTTPError

from dispatcher.backends.base import OnProgress, PullProgress
from dispatcher.backends.docker_client import StreamClient
from dispatcher.backends.docker_errors import sort_pull_message
from dispatcher.backends.docker_spec import pull_arguments, unix_time
from dispatcher.errors import BackendError

#: Seconds between two reports of a pull; an engine writes hundreds of lines in each.
REPORT_INTERVAL = 0.25
#: Bytes of output read ahead of whoever reads it.
READ_AHEAD = 1024 * 1024

#: The API of Docker 23. Engines before it may end a follower when the container ends, although
#: there is more to read.
_FOLLOWS_TO_THE_END = "1.42"
#: Bytes by which a log is known again.
_HEAD = 4096
#: Seconds in which output is gathered before the loop turns to it again.
GATHER_INTERVAL = 0.02

#: Each piece of a log: one byte for the stream it came from, three of padding, its length.
_FRAME_HEADER = struct.Struct(">BxxxL")
#: Lines that repeat while nothing moves.
_STANDSTILL = ("Waiting", "Retrying")
_DOWNLOADED = frozenset({"Download complete", "Extracting", "Pull complete", "Already exists"})
_DONE = frozenset({"Pull complete", "Already exists"})
_ENDS = frozenset({"Download complete", *_DONE})


class PullReader:
    """Adds up the lines of a pull over its layers."""

    def __init__(self, image: str) -> None:
        self._image = image
        self._status: dict[str, str] = {}
        self._bytes: dict[str, tuple[int, int]] = {}
        self._last: dict[str, tuple[str, int]] = {}
        self._reported = -REPORT_INTERVAL

    def read(self, line: Mapping[str, Any]) -> PullProgress | None:
        """Where the pull is, if this line says that it moved and a report is due."""
        layer, status = line.get("id"), str(line.get("status", ""))
        if layer is None or status.startswith(("Pulling from", *_STANDSTILL)):
            return None
        detail = line.get("progressDetail") or {}
        current, total = int(detail.get("current") or 0), int(detail.get("total") or 0)
        if self._last.get(layer) == (status, current):
            return None
        # What is told of one that has been downloaded must not be that some of it is missing.
        layer_ended = status in _ENDS and self._status.get(layer) != status
        self._last[layer] = (status, current)
        self._status[layer] = status
        if status == "Downloading":
            self._bytes[layer] = (current, total)
        elif status in _DOWNLOADED and layer in self._bytes:
            size = self._bytes[layer][1]
            self._bytes[layer] = (size, size)
        now = time.monotonic()
        if not layer_ended and now - self._reported < REPORT_INTERVAL:
            return None
        self._reported = now
        return PullProgress(
            image=self._image,
            bytes_done=sum(done for done, _ in self._bytes.values()),
            bytes_total=sum(size for _, size in self._bytes.values()),
            layers_done=sum(status in _DONE for status in self._status.values()),
            layers_total=len(self._status),
        )


def pull(
    client: StreamClient,
    image: str,
    credentials: Mapping[str, str],
    platform: str | None,
    on_progress: OnProgress,
) -> None:
    """In a thread: pull, and raise also what the engine only says inside the stream.

    ``credentials`` as from ``docker_credentials``; ``platform`` None for the engine's own.
    """
    repository, tag_or_digest = pull_arguments(image)
    reader = PullReader(image)
    lines = client.pull(
        repository,
        tag=tag_or_digest,
        stream=True,
        decode=True,
        auth_config=dict(credentials),
        platform=platform,
    )
    for line in lines:
        if error := line.get("error"):
            raise sort_pull_message(str(error))
        if progress := reader.read(line):
            from_thread.run_sync(on_progress, progress)


class Readable(Protocol):
    """A body that is read as it comes."""

    def read(self, amt: int) -> bytes:
        """At most ``amt`` bytes; none at the end."""
        ...


def log_frames(body: Readable) -> Iterator[bytes]:
    """The pieces of both output streams, in the engine's order, without their headers."""
    while header := _read_exactly(body, _FRAME_HEADER.size):
        _, length = _FRAME_HEADER.unpack(header)
        if piece := _read_exactly(body, length):
            yield piece


def _read_exactly(body: Readable, size: int) -> bytes:
    """``size`` bytes; none at the end of the body, be it amid a piece that was cut off."""
    data = bytearray()
    while len(data) < size:
        more = body.read(size - len(data))
        if not more:
            return b""
        data += more
    return bytes(data)


class OutputPipe:
    """Bytes from a reading thread to one consumer in the event loop, bounded in between.

    A program may write a line in every microsecond: the loop is woken once for all that has
    come since its last turn, not for every line.
    """

    def __init__(self) -> None:
        # Appended to by the thread only and popped from by the loop only, hence no lock.
        self._pieces: deque[bytes] = deque()
        self._put = 0
        self._taken = 0
        self._announced = False
        self._news = anyio.Event()
        self._room = anyio.Event()
        self._ended = False
        self._error: BackendError | None = None
        #: Ends the reader; set by who starts it.
        self.reader = anyio.CancelScope()

    def put(self, piece: bytes) -> None:
        """In the thread: hand ``piece`` over; waits while the consumer is far behind."""
        self._pieces.append(piece)
        self._put += len(piece)
        if not self._announced:
            self._announced = True
            from_thread.run_sync(self._announce)
        while self._put - self._taken > READ_AHEAD:
            from_thread.run(self._wait_for_room)

    def end(self, error: BackendError | None = None) -> None:
        """No more will come; ``error`` is raised to the consumer after what has."""
        self._ended, self._error = True, error
        self._news.set()

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """What has come since the last, joined, until the end.

        Raises the error that reading ended with.
        """
        while True:
            await self._news.wait()
            self._news = anyio.Event()
            ended = self._ended
            self._announced = False
            taken = b"".join(self._pieces.popleft() for _ in range(len(self._pieces)))
            self._taken += len(taken)
            self._room.set()
            if taken:
                yield taken
                if not ended:
                    await anyio.sleep(GATHER_INTERVAL)
            if ended:
                if self._error is not None:
                    raise self._error
                return

    def _announce(self) -> None:
        self._news.set()

    async def _wait_for_room(self) -> None:
        if self._put - self._taken > READ_AHEAD:
            self._room = anyio.Event()
            await self._room.wait()


def read_log(client: StreamClient, container_id: str, follow: bool, pipe: OutputPipe) -> None:
    """In a thread: read a log to its end.

    Not by the library's ``logs``, which takes a broken stream for one that ended.
    """
    head, told = b"", 0
    for piece in _log(client, container_id, follow=follow):
        if len(head) < _HEAD:
            head += piece
        told += len(piece)
        pipe.put(piece)
    if follow and version_lt(client.api_version, _FOLLOWS_TO_THE_END):
        for piece in _beyond(_log(client, container_id, follow=False), head[:_HEAD], told):
            pipe.put(piece)


def _log(client: StreamClient, container_id: str, *, follow: bool) -> Iterator[bytes]:
    params: dict[str, Any] = {"stdout": 1, "stderr": 1, "follow": int(follow)}
    if not follow and client.inspect_container(container_id)["State"]["Running"]:
        # Else one that writes faster than we read is read for ever. By the engine's own clock.
        params["until"] = unix_time(client.info()["SystemTime"])
    address = f"{client.base_url}/v{client.api_version}/containers/{container_id}/logs"
    answer = client.get(address, params=params, stream=True)
    try:
        answer.raise_for_status()
    except HTTPError as error:
        create_api_error_from_http_exception(error)
    yield from log_frames(answer.raw)


def _beyond(pieces: Iterable[bytes], head: bytes, told: int) -> Iterator[bytes]:
    """What follows the first ``told`` bytes, unless they no longer begin with ``head``."""
    begin, seen = b"", 0
    for piece in pieces:
        if len(begin) < len(head):
            begin += piece
            if begin[: len(head)] != head[: len(begin)]:
                # Rotated away meanwhile: nobody can say where to go on.
                return
        seen += len(piece)
        if seen > told:
            yield piece[-(seen - told) :]
