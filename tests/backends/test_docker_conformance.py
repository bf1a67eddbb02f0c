"""The Docker backend under the suite of all backends, on a real engine."""

from __future__ import annotations

import pytest

from tests.backends.conformance import BackendConformance
from tests.backends.docker_harness import DockerHarness


class TestConformance(BackendConformance):
    """As every backend."""

    @pytest.fixture
    def harness(self, docker_harness: DockerHarness) -> DockerHarness:
        return docker_harness
