"""The Docker backend under the suite of all backends, on a real engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.backends.conformance import BackendConformance
from tests.backends.docker_harness import DockerHarness
from tests.support.engine import EngineUnderTest


class TestConformance(BackendConformance):
    """As every backend."""

    @pytest.fixture
    def harness(self, engine: EngineUnderTest) -> Iterator[DockerHarness]:
        harness = DockerHarness(engine)
        yield harness
        harness.tidy()
