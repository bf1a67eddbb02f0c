"""One Redis and one instance for all tests that only use what is there; their tasks have ids
of their own. A test that stops, counts or empties things takes ``program`` and starts its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.program import Program
from tests.support.redis_server import END_TIMEOUT, RedisUnderTest, start


@pytest.fixture
def program(redis_server: RedisUnderTest, tmp_path: Path) -> Iterator[Program]:
    """The program with an empty Redis; nothing else runs."""
    yield Program(redis_server.url, tmp_path)
    end_tasks_in(tmp_path)


@pytest.fixture(scope="session")
def served() -> Iterator[Program]:
    """The program with a Redis and an instance that takes tasks."""
    directory = Path(tempfile.mkdtemp(prefix="cli-"))
    process, server = start(directory)
    try:
        program = Program(server.url, directory)
        with program.serving():
            yield program
    finally:
        end_tasks_in(directory)
        process.terminate()
        process.wait(END_TIMEOUT)
        shutil.rmtree(directory, ignore_errors=True)


def end_tasks_in(home: Path) -> None:
    """Kill what a test's tasks still run: they outlive their dispatcher, and so a failed test."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if b"process_wrapper.py" in (line := entry.read_bytes()) and str(home).encode() in line:
                os.kill(int(entry.parent.name), signal.SIGUSR1)
