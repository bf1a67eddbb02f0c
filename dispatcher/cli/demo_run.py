"""The course of ``demo``: start, submit, watch, report, end."""

from __future__ import annotations

import re
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio

from dispatcher.backends import load_backend
from dispatcher.cli.demo_board import Board
from dispatcher.cli.demo_cases import Case, cases, in_words
from dispatcher.cli.embedded import embedded_redis
from dispatcher.cli.engine import Engine, survey
from dispatcher.cli.exits import Stopped, tell
from dispatcher.cli.queues import pull_progress
from dispatcher.client import AsyncClient, State, Task, TaskStatus
from dispatcher.service import Dispatcher
from dispatcher.settings import Settings

#: Seconds for all tasks to end; most of it is for an image to come over a slow line.
TIME_LIMIT = 300.0
LOOK_SECONDS = 0.15
#: Seconds that cancelled tasks have to end when the demo is stopped.
CLEAN_UP_SECONDS = 10.0
STREAM = "dispatcher:tasks"
_PULLS = re.compile(rb'\ndispatcher_image_pull_seconds_count\{[^}]*outcome="pulled"[^}]*\} ([\d.]+)')


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one task."""

    name: str
    id: str
    ok: bool
    expected: str
    got: str
    attempts: int
    exit_code: int | None
    #: From its acceptance to its end.
    seconds: float | None
    #: The last line.
    output: str


@dataclass(frozen=True, slots=True)
class Report:
    """What became of all."""

    backend: str
    #: Why it is not Docker; '' if it is.
    why: str
    image: str
    #: Of the image; None where there was none to see.
    pulls: int | None
    seconds: float
    results: list[Result]


class Demo:
    """One run of it."""

    def __init__(self, settings: Settings, image: str, *, keep: bool, show: Callable[[Report], None]) -> None:
        """``show`` gets the report, before the end if the demo is to stay up."""
        self._settings = settings
        self._image = image
        self._keep = keep
        self._show = show
        self._stop = anyio.Event()
        self._signal = 0

    async def run(self) -> None:
        """All of it. Raises Stopped if a signal came before the report, QueueUnavailable."""
        with (
            tempfile.TemporaryDirectory(prefix="dispatcher-") as name,
            anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals,
        ):
            async with anyio.create_task_group() as group:
                group.start_soon(self._heed, signals, group.cancel_scope, name="signals")
                async with embedded_redis(Path(name)) as url:
                    engine = await survey(self._settings, self._image)
                    if engine.problem:
                        tell(f"dispatcher: {engine.problem}; using child processes of this host")
                    await self._demonstrate(self._own_settings(url, Path(name), engine), engine)
                group.cancel_scope.cancel()
        if self._signal:
            raise Stopped(self._signal)

    async def _heed(self, signals: Any, scope: anyio.CancelScope) -> None:
        """The first signal ends the demo in good order, the second at once."""
        async for signum in signals:
            if self._stop.is_set():
                scope.cancel()
            self._signal = signum
            self._stop.set()

    def _own_settings(self, url: str, directory: Path, engine: Engine) -> Settings:
        """The defaults, whatever the environment says, but for the engine's address."""
        defaults = {
            name: field.get_default(call_default_factory=True)
            for name, field in Settings.model_fields.items()
        }
        own: dict[str, Any] = {
            **defaults,
            "redis_url": url,
            "state_redis_url": url,
            "queue_stream_name": STREAM,
            "backend": "process" if engine.problem else "docker",
            "process_directory": directory / "process",
            "docker_host": self._settings.docker_host,
            "docker_default_platform": self._settings.docker_default_platform,
            "default_network": "none",
            "drain_timeout": CLEAN_UP_SECONDS,
        }
        return Settings(**own)

    async def _demonstrate(self, settings: Settings, engine: Engine) -> None:
        dispatcher = Dispatcher(settings, load_backend(settings, allow_process=True))
        chosen = cases(self._image, cold=engine.cold)
        async with AsyncClient(settings.queue_redis) as client, anyio.create_task_group() as group:
            await group.start(dispatcher.run, name="dispatcher")
            began = time.monotonic()
            ids = {case.name: await _hand_in(client, settings.queue_redis, case) for case in chosen}
            found = await self._watch(client, dispatcher, chosen, ids)
            if self._stop.is_set():
                await _cancel_all(client, ids)
            else:
                results = [await _result(client, case, ids[case.name], found[case.name]) for case in chosen]
                pulls = _pulls(dispatcher) if engine.cold else None
                report = Report(
                    settings.backend, engine.problem, self._image, pulls, time.monotonic() - began, results
                )
                self._tell_of_pulls(report, chosen)
                self._show(report)
                if self._keep:
                    tell(
                        f"dispatcher: try: dispatcher --redis-url {settings.queue_redis} list; Ctrl-C ends it"
                    )
                    await self._stop.wait()
                    self._signal = 0
                await _cancel_all(client, ids)
            dispatcher.drain()

    def _tell_of_pulls(self, report: Report, chosen: list[Case]) -> None:
        if report.pulls is not None:
            served = sum(isinstance(case.task, Task) for case in chosen) + 1
            tell(f"dispatcher: {report.pulls} pull of {report.image} for {served} tasks")
        elif report.backend == "docker":
            tell(f"dispatcher: {report.image} was here already, so there was no pull to show")

    async def _watch(
        self, client: AsyncClient, dispatcher: Dispatcher, chosen: list[Case], ids: dict[str, str]
    ) -> dict[str, TaskStatus]:
        """Show the tasks until all have ended, time is over or the demo is stopped."""
        board = Board([case.name for case in chosen])
        found: dict[str, TaskStatus] = {}
        waits = {case.name for case in chosen if case.then == "cancel"}
        with board.shown(), anyio.move_on_after(TIME_LIMIT):
            while not self._stop.is_set():
                for name, task_id in ids.items():
                    if name not in found or not found[name].state.terminal:
                        found[name] = await client.status(task_id)
                    if name in waits and found[name].state is State.RUNNING:
                        waits.remove(name)
                        await client.cancel(task_id)
                board.update(found, _pulling(dispatcher))
                if all(status.state.terminal for status in found.values()):
                    break
                await anyio.sleep(LOOK_SECONDS)
        return found


async def _hand_in(client: AsyncClient, url: str, case: Case) -> str:
    """Submit the case's task; its id."""
    if isinstance(case.task, Task):
        return (await client.submit(case.task)).id
    return f"default.{await _xadd(url.removeprefix('unix://'), case.task)}"


async def _xadd(socket_path: str, document: bytes) -> str:
    """What any program in any language can do: one command, by hand. The entry's id."""
    parts = [b"XADD", STREAM.encode(), b"*", b"task", document]
    async with await anyio.connect_unix(socket_path) as redis:
        await redis.send(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts))
        reply = b""
        while reply.count(b"\r\n") < 2:  # a length and the id, as one bulk string
            reply += await redis.receive()
    return reply.split(b"\r\n")[1].decode("ascii")


async def _result(client: AsyncClient, case: Case, task_id: str, status: TaskStatus) -> Result:
    tail = await client.tail(task_id)
    lines = tail.data.decode("utf-8", "replace").split("\n") if tail else []
    seconds = None
    if status.finished_at and status.accepted_at:
        seconds = round((status.finished_at - status.accepted_at).total_seconds(), 3)
    return Result(
        name=case.name,
        id=task_id,
        ok=case.met_by(status),
        expected=case.expected,
        got=in_words(status.state, status.reason, status.exit_code),
        attempts=status.attempt,
        exit_code=status.exit_code,
        seconds=seconds,
        output=next((line for line in reversed(lines) if line.strip()), ""),
    )


async def _cancel_all(client: AsyncClient, ids: dict[str, str]) -> None:
    """Leave no container behind."""
    with anyio.move_on_after(CLEAN_UP_SECONDS):
        for task_id in ids.values():
            await client.cancel(task_id)
        for task_id in ids.values():
            await client.wait(task_id)


def _pulling(dispatcher: Dispatcher) -> str:
    return "; ".join(
        pull_progress(
            {
                "image": pull.image,
                "active": pull.active,
                "bytes_done": pull.progress.bytes_done,
                "bytes_total": pull.progress.bytes_total,
            }
        )
        for pull in dispatcher.images.pulls
    )


def _pulls(dispatcher: Dispatcher) -> int:
    """How many pulls there have been, by the dispatcher's own metrics."""
    return sum(int(float(count)) for count in _PULLS.findall(dispatcher.telemetry.exposition()))
