"""A master, its replica and three sentinels: real processes that fail over in a second or two."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from tests.support.redis_server import END_TIMEOUT, RedisUnderTest, free_port, server_program, start

MASTER = "mymaster"
SENTINELS = 3
QUORUM = 2
#: Milliseconds without an answer until a sentinel calls a server down.
DOWN_AFTER_MS = 500
#: Seconds that servers and sentinels have to find each other.
SETTLE_TIMEOUT = 30.0


class SentinelsUnderTest:
    """The processes, and what a test may ask of them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.servers: list[tuple[subprocess.Popen[bytes], RedisUnderTest]] = []
        self.sentinel_ports: list[int] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    @property
    def url(self) -> str:
        """Where dispatchers and clients are pointed to."""
        return f"redis+sentinel://{','.join(f'127.0.0.1:{p}' for p in self.sentinel_ports)}/{MASTER}/0"

    def server(self, *options: str) -> RedisUnderTest:
        """Start one more server."""
        directory = self.directory / f"server-{len(self.servers)}"
        directory.mkdir(parents=True)
        # Redis 7 else waits five seconds for more replicas before it sends what it has.
        process, server = start(directory, "--repl-diskless-sync-delay", "0", *options)
        self.servers.append((process, server))
        self.processes.append(process)
        return server

    def sentinel(self, port: int, *lines: str, quorum: int = QUORUM) -> int:
        """Start one more sentinel, of the master on ``port``; the sentinel's own port."""
        own = free_port()
        directory = self.directory / f"sentinel-{own}"
        directory.mkdir(parents=True)
        configuration = directory / "sentinel.conf"
        told = [
            f"port {own}", "bind 127.0.0.1", f"dir {directory}",
            f"sentinel monitor {MASTER} 127.0.0.1 {port} {quorum}",
            f"sentinel down-after-milliseconds {MASTER} {DOWN_AFTER_MS}",
            f"sentinel failover-timeout {MASTER} 5000", *lines,
        ]  # fmt: skip
        configuration.write_text("\n".join(told) + "\n")
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(
                [server_program(), configuration, "--sentinel"], stdout=log, stderr=subprocess.STDOUT
            )
        self.processes.append(process)
        self.sentinel_ports.append(own)
        _until(lambda: self._answers(own))
        return own

    def _answers(self, port: int) -> bool:
        try:
            return bool(self.ask(port, "PING"))
        except redis.AuthenticationError:
            return True

    def ask(self, port: int, *command: str) -> Any:
        """One command to a sentinel or server on ``port``."""
        with redis.Redis(port=port, decode_responses=True) as client:
            return client.execute_command(*command)

    def master(self) -> RedisUnderTest:
        """The server that the first sentinel which answers calls master."""
        for port in self.sentinel_ports:
            try:
                _, named = self.ask(port, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER)
            except redis.ConnectionError:
                continue
            return next(server for _, server in self.servers if server.port == int(named))
        raise AssertionError("no sentinel answers")

    def kill_master(self) -> RedisUnderTest:
        """SIGKILL; the server that it was."""
        killed = self.master()
        os.kill(killed.pid, signal.SIGKILL)
        next(process for process, server in self.servers if server is killed).wait(END_TIMEOUT)
        return killed

    def replicated(self) -> None:
        """Wait until the replica has all that was written; what is not there a failover loses."""
        with self.master().client() as client:
            # WAIT counts what this connection wrote.
            client.set("{dispatcher:tasks}:meta:mark", "1")
            client.delete("{dispatcher:tasks}:meta:mark")
            assert client.wait(1, int(SETTLE_TIMEOUT * 1000)) >= 1

    def settle(self) -> None:
        """Wait until every sentinel knows the others and a replica that is in step."""

        def settled() -> bool:
            for port in self.sentinel_ports:
                flat = self.ask(port, "SENTINEL", "MASTER", MASTER)
                state = flat if isinstance(flat, dict) else dict(zip(flat[::2], flat[1::2], strict=True))
                if int(state["num-slaves"]) < 1 or int(state["num-other-sentinels"]) < SENTINELS - 1:
                    return False
            with self.servers[-1][1].client() as client:
                return bool(client.info("replication").get("master_link_status") == "up")

        _until(settled)

    def end(self) -> None:
        """End every process."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait(END_TIMEOUT)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SETTLE_TIMEOUT
    while True:
        try:
            if condition():
                return
        except redis.ConnectionError:
            pass  # it is still starting
        if time.monotonic() > deadline:
            raise TimeoutError("servers and sentinels have not found each other")
        time.sleep(0.02)


@contextmanager
def sentinels(directory: Path) -> Iterator[SentinelsUnderTest]:
    """A master, a replica and three sentinels that know each other."""
    found = SentinelsUnderTest(directory)
    try:
        master = found.server()
        found.server("--replicaof", "127.0.0.1", str(master.port))
        for _ in range(SENTINELS):
            found.sentinel(master.port)
        found.settle()
        yield found
    finally:
        found.end()
