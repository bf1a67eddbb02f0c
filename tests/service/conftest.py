"""The systems that end-to-end tests run on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.engine import EngineUnderTest
from tests.support.redis_server import RedisUnderTest
from tests.support.system import DockerSystem, ProcessSystem, System


@pytest.fixture
def process_system(redis_server: RedisUnderTest, tmp_path: Path) -> ProcessSystem:
    """Tasks as child processes."""
    return ProcessSystem(redis_server, tmp_path)


@pytest.fixture
def docker_system(redis_server: RedisUnderTest, tmp_path: Path, engine: EngineUnderTest) -> DockerSystem:
    """Tasks as containers."""
    return DockerSystem(redis_server, tmp_path, engine)


@pytest.fixture(params=["process", "docker"])
def system(request: pytest.FixtureRequest) -> System:
    """Each in turn."""
    found: System = request.getfixturevalue(f"{request.param}_system")
    return found
