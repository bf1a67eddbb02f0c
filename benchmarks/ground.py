"""What measures stand on: a real engine, a real Redis, dispatchers in processes of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import docker
import docker.errors
import requests.exceptions

from dispatcher.client import Client, Task, TaskStatus
from dispatcher.client.blocking import Handle
from dispatcher.model import State
from tests.support import redis_server
from tests.support.engine import image_archive, private_engine
from tests.support.redis_server import RedisUnderTest

#: An image that is there: a shell, and nothing to pull.
WARM = "dispatcher-bench/busybox:1"
#: Seconds for a task, a dispatcher and a server to come to an end, and for a dispatcher to start.
TASK_TIMEOUT = 300.0
END_TIMEOUT = 60.0
START_TIMEOUT = 60.0
#: Seconds between two looks at a log.
LOOK = 0.05
#: Tasks run one after another before anything is measured: clients connect, the start gate learns.
WARM_UP = 3
ROOT = Path(__file__).parents[1]


class Ground:
    """A context manager. Containers run without a network."""

    network = "none"

    def __init__(self, *, rounds: int = 3, base_url: str | None = None) -> None:
        """``base_url``: the engine's address; else what the environment names, if that answers, else
        an engine of our own, which takes root."""
        self.rounds = rounds
        self._wanted = base_url
        self._stack = ExitStack()
        self.base_url = ""
        self.client: docker.APIClient
        self.redis: RedisUnderTest
        self.home: Path

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            self.base_url = stack.enter_context(_engine(self._wanted))
            self.client = stack.enter_context(contextlib.closing(docker.APIClient(self.base_url)))
            repository, _, tag = WARM.partition(":")
            self.client.import_image_from_data(image_archive(), repository=repository, tag=tag)
            process, self.redis = redis_server.start(self.home)
            stack.callback(_end, process)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def flags(self, **settings: Any) -> dict[str, Any]:
        """Settings of a dispatcher on this ground."""
        return {
            "redis_url": self.redis.url,
            "backend": "docker",
            "docker_host": self.base_url,
            "default_network": self.network,
            **settings,
        }

    def another_client(self) -> docker.APIClient:
        """For another thread; the caller closes it."""
        return docker.APIClient(self.base_url, timeout=int(TASK_TIMEOUT))

    def remove(self, *references: str) -> None:
        """Have these images not on the engine, so that their next pull is a cold one."""
        for reference in references:
            # Its last container may be about to be removed.
            deadline = time.monotonic() + END_TIMEOUT
            while True:
                try:
                    self.client.remove_image(reference)
                except docker.errors.ImageNotFound:
                    break
                except docker.errors.APIError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(LOOK)

    @contextlib.contextmanager
    def instance(
        self, *, warm_up: int = WARM_UP, width: int | None = None, **settings: str
    ) -> Iterator[Instance]:
        """A dispatcher on an empty Redis, after so many tasks that nobody measures; drained at the end.

        ``width``: so many starts at once, instead of a start gate that tunes itself.
        """
        with self.redis.client() as redis:
            redis.flushall()
        with Instance(self, settings, width) as instance:
            for _ in range(warm_up):
                instance.run([warm()])
            yield instance


class Instance:
    """One dispatcher, and a client of it."""

    def __init__(self, ground: Ground, settings: dict[str, str], width: int | None) -> None:
        """``settings``: what is set besides ``Ground.flags``, as environment variables are.
        ``width``: see ``Ground.instance``."""
        self._width = [] if width is None else [str(width)]
        number = os.urandom(4).hex()
        self._launches = ground.home / f"launches-{number}"
        self._log = ground.home / f"log-{number}"
        kept = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
        flags = {name.upper(): str(value) for name, value in ground.flags().items()}
        self._environment = {**kept, "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8", **flags, **settings}
        self._url = ground.redis.url
        self._stack = ExitStack()
        self.client: Client

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            with self._log.open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.instance", self._launches, *self._width],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environment,
                )
            stack.callback(_end, process)
            self._wait_started(process)
            self.client = stack.enter_context(Client(self._url))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _wait_started(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while '"instance.started"' not in self._log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the dispatcher did not start: {self._log.read_text()[-2000:]}")
            time.sleep(LOOK)

    def submit(self, tasks: Sequence[Task]) -> list[Handle]:
        """Hand them in, in this order. Raises what refuses one."""
        handles = []
        for answer in self.client.submit_many(tasks):
            if not isinstance(answer, Handle):
                raise answer
            handles.append(answer)
        return handles

    def run(self, tasks: Sequence[Task]) -> list[TaskStatus]:
        """Hand them in and wait until all have succeeded. Raises RuntimeError if one has not."""
        return ended(self.submit(tasks))

    def launches(self) -> list[float]:
        """Seconds of every launch so far, from the start gate to the container's start."""
        return [float(line) for line in self._launches.read_text().splitlines()]


def warm() -> Task:
    """A task that has all it needs and does nothing."""
    return Task(image=WARM, command=["true"])


def ended(handles: Sequence[Handle]) -> list[TaskStatus]:
    """Wait until all have succeeded. Raises RuntimeError if one has not."""
    statuses = [handle.wait(TASK_TIMEOUT) for handle in handles]
    for status in statuses:
        if status.state is not State.SUCCEEDED:
            raise RuntimeError(f"a task that was to be measured failed: {status}")
    return statuses


def latency(status: TaskStatus) -> float:
    """Seconds from a task's acceptance to the end of its container, which the engine tells."""
    if status.accepted_at is None or status.finished_at is None:
        raise RuntimeError(f"a task without its times: {status}")
    return (status.finished_at - status.accepted_at).total_seconds()


@contextlib.contextmanager
def _engine(wanted: str | None) -> Iterator[str]:
    named = wanted or os.environ.get("TEST_DOCKER_HOST") or os.environ.get("DOCKER_HOST")
    if named:
        try:
            # Made with a question to the engine.
            docker.APIClient(named).close()
        except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
            raise RuntimeError(f"the engine at {named} does not answer: {error}") from error
        yield named
        return
    with private_engine() as (_, base_url, _):
        yield base_url


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
