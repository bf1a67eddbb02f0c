"""The world's Redis: a real server that can be killed, stopped and started on what it has written."""

from __future__ import annotations

import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import redis

from tests.chaos.truth import plain_client
from tests.support.redis_server import END_TIMEOUT, RedisUnderTest, free_port, start

#: Whatever was acknowledged is on disk: what is lost then was lost by us.
DURABLE = ("--appendfsync", "always")


class Server:
    """A Redis with AOF, on the same port and socket file through all its lives."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it on what the last life has written, and wait until it answers."""
        process, under_test = start(self._directory, "--port", str(self._port), *DURABLE)
        self._process = process
        self.under_test: RedisUnderTest = replace(under_test, port=self._port)

    @property
    def url(self) -> str:
        """By its socket file."""
        return self.under_test.url

    @property
    def running(self) -> bool:
        """Whether there is a process; it may be stopped."""
        return self._process is not None and self._process.poll() is None

    def client(self) -> redis.Redis:
        """A plain client; the caller closes it."""
        return plain_client(self.url)

    def command(self, *words: str) -> object:
        """One command, by a client of its own."""
        with self.client() as client:
            answer: object = client.execute_command(*words)
            return answer

    def kill(self) -> None:
        """SIGKILL; ``start`` brings it back."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(END_TIMEOUT)

    def stop(self) -> None:
        """SIGSTOP: it is there, and does not answer."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def heal(self) -> None:
        """Let it run and answer, whatever was done to it."""
        if self.running:
            self.resume()
        else:
            self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
