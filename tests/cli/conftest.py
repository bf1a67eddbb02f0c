"""One Redis and one instance for all tests that only use what is there; their tasks have ids
of their own. A test that stops, counts or empties things takes ``program`` and starts its own.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.program import Program
from tests.support.redis_server import END_TIMEOUT, RedisUnderTest, start


@pytest.fixture
def program(redis_server: RedisUnderTest, tmp_path: Path) -> Program:
    """The program with an empty Redis; nothing else runs."""
    return Program(redis_server.url, tmp_path)


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
        process.terminate()
        process.wait(END_TIMEOUT)
        shutil.rmtree(directory, ignore_errors=True)
