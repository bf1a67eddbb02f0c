"""What the tests of one backend share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.backends.docker_harness import DockerHarness
from tests.support.engine import EngineUnderTest


@pytest.fixture
def docker_harness(engine: EngineUnderTest) -> Iterator[DockerHarness]:
    """Containers on the tests' engine, removed at the end."""
    harness = DockerHarness(engine)
    yield harness
    harness.tidy()
