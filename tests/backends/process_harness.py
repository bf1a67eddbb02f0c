"""How tests get at the process backend and the processes behind it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from dispatcher.backends.process import ProcessBackend
from dispatcher.backends.process_directory import AttemptDirectories, Name
from dispatcher.model import Attempt, Handle
from tests.backends.conformance import Harness, fresh_namespace


class ProcessHarness(Harness):
    """A root of its own for each test; every program appends a line to a file as it starts."""

    def __init__(self, directory: Path) -> None:
        self.namespace = fresh_namespace()
        self.root = directory / "root"
        self._starts = directory / "starts"
        self._starts.mkdir()

    def backend(self, **options: Any) -> ProcessBackend:
        return ProcessBackend(self.root, **options)

    def attempt(self, script: str, **fields: Any) -> Attempt:
        attempt = self.blank(entrypoint=("/bin/sh", "-c"))
        counted = f"echo >> '{self._starts / attempt.task_id}'; {script}"
        return (
            replace(attempt, command=(counted,), **fields)
            if "command" not in fields
            else replace(attempt, **fields)
        )

    async def starts(self, attempt: Attempt) -> int:
        count = anyio.Path(self._starts / attempt.task_id)
        return len(await count.read_bytes()) if await count.exists() else 0

    def directory(self, handle: Handle) -> Path:
        return AttemptDirectories(self.root).path(Name(handle.namespace, handle.task_id, handle.attempt))

    def wrapper_pid(self, handle: Handle) -> int:
        return int((self.directory(handle) / f"lock-{handle.container_id}").read_text())

    async def vanish(self, handle: Handle) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(await anyio.to_thread.run_sync(self.wrapper_pid, handle), signal.SIGKILL)
        await anyio.to_thread.run_sync(shutil.rmtree, self.directory(handle))

    def tidy(self) -> None:
        """Kill every wrapper that still lives, and by that its program."""
        directories = AttemptDirectories(self.root)
        for path in (self.root / "attempts").glob("*"):
            for record in directories.find(path.name):
                pidfd = directories.open_wrapper(record.name, record.creation_id)
                if pidfd is not None:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    os.close(pidfd)
