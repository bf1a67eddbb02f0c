"""States of a real Redis server in which it answers, but not what one wants to hear."""

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

from tests.support.redis_server import END_TIMEOUT, free_port, start

TIMEOUT = 20.0
#: Keys that a loading server has to read, and microseconds for each: events are looked at each
#: thousandth or so, and the whole takes some seconds.
LOADED_KEYS = 20_000
LOAD_DELAY_US = 200


class TroubledServer:
    """A server of a test's own, and what can befall it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.process, self.server = start(directory)
        #: Kept open: in some of these states a new connection could not even say hello.
        self.client: Any = redis.Redis.from_url(self.server.url, protocol=2)
        self._stuck: Any = None

    def close(self) -> None:
        """End it, in whatever state it is."""
        if self._stuck is not None:
            self._stuck.disconnect()
        self.client.close()
        self.process.kill()
        self.process.wait(END_TIMEOUT)

    def commands(self) -> int:
        """Commands it was sent since it started, those it refused among them."""
        stats = self.client.info("commandstats").values()
        return sum(s["calls"] + s.get("rejected_calls", 0) for s in stats)

    def connections(self) -> int:
        """Connections it was asked for since it started."""
        return int(self.client.info("stats")["total_connections_received"])

    # --- troubles -------------------------------------------------------------------------

    @contextmanager
    def replica(self) -> Iterator[str]:
        """READONLY"""
        self.client.execute_command("REPLICAOF", "127.0.0.1", free_port())
        yield "read-only replica|READONLY"
        self.client.execute_command("REPLICAOF", "NO", "ONE")

    @contextmanager
    def orphan(self) -> Iterator[str]:
        """MASTERDOWN: a replica that does not serve what may be old"""
        self.client.config_set("replica-serve-stale-data", "no")
        with self.replica():
            yield "Link with MASTER is down|MASTERDOWN"

    @contextmanager
    def failed_snapshot(self) -> Iterator[str]:
        """MISCONF"""
        obstacle = self.directory / "dump.rdb"
        obstacle.mkdir()
        (obstacle / "x").touch()
        self.client.config_set("save", "3600 1000000")
        self.client.bgsave()
        self._until(lambda: self.client.info("persistence")["rdb_last_bgsave_status"] == "err")
        yield "MISCONF"
        self.client.config_set("save", "")

    @contextmanager
    def full(self) -> Iterator[str]:
        """OOM"""
        self.client.config_set("maxmemory", 1)
        yield "out of memory"
        self.client.config_set("maxmemory", 0)

    @contextmanager
    def busy(self) -> Iterator[str]:
        """BUSY: somebody's script does not end"""
        self.client.config_set("lua-time-limit", 20)
        pool = redis.ConnectionPool.from_url(self.server.url, protocol=2)
        self._stuck = pool.get_connection()
        self._stuck.send_command("EVAL", "while true do end", 0)

        def is_busy() -> bool:
            try:
                self.client.ping()
            except redis.ResponseError:
                return True
            return False

        self._until(is_busy)
        yield "BUSY"
        self.client.execute_command("SCRIPT", "KILL")
        self._until(lambda: not is_busy())

    @contextmanager
    def loading(self) -> Iterator[str]:
        """LOADING, after a restart"""
        with self.client.pipeline(transaction=False) as pipe:
            for number in range(LOADED_KEYS):
                pipe.set(f"{{dispatcher:tasks}}:meta:load:{number}", "x")
            pipe.execute()
        self.client.execute_command("CONFIG", "SET", "appendfsync", "always")
        self.client.ping()
        self.process.kill()
        self.process.wait(END_TIMEOUT)
        command = [
            str(part) for part in (
                self.server.program, "--bind", "127.0.0.1", "--port", self.server.port, "--unixsocket",
                self.directory / "redis.sock", "--dir", self.directory, "--appendonly", "yes", "--save", "",
                "--key-load-delay", LOAD_DELAY_US,
            )
        ]  # fmt: skip
        with (self.directory / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

        def answers(*kinds: type[Exception]) -> bool:
            try:
                self.client.ping()
            except redis.BusyLoadingError:
                return redis.BusyLoadingError in kinds
            except redis.ConnectionError:
                return False
            return True

        self._until(lambda: answers(redis.BusyLoadingError))
        yield "loading"
        self._until(answers)

    @contextmanager
    def hanging(self) -> Iterator[str]:
        """It takes connections, and answers nothing"""
        os.kill(self.process.pid, signal.SIGSTOP)
        yield "Timeout"
        os.kill(self.process.pid, signal.SIGCONT)

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError("the server does not get there")
            time.sleep(0.05)  # few looks: they are among the commands that are counted


Trouble = Callable[[TroubledServer], Any]
#: What befalls a server that still answers, by what it answers.
ANSWERS: dict[str, Trouble] = {
    "READONLY": TroubledServer.replica,
    "MASTERDOWN": TroubledServer.orphan,
    "MISCONF": TroubledServer.failed_snapshot,
    "OOM": TroubledServer.full,
    "BUSY": TroubledServer.busy,
    "LOADING": TroubledServer.loading,
}
