"""The short form: a minute of chaos, with another seed each time it is run.

A failure tells its seed; CHAOS_SEED=… deals the same faults in the same order again.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

from tests.chaos.ground import DockerGround, ProcessGround
from tests.chaos.slices import Parameters, play
from tests.support.engine import EngineUnderTest

SEED = int(os.environ.get("CHAOS_SEED") or secrets.randbelow(10**6))


@pytest.mark.timeout(300)
def test_nothing_is_lost_or_started_twice(tmp_path: Path) -> None:
    parameters = Parameters(SEED, seconds=30, backlog=40, pace=0.8, faults=25)
    result = play(ProcessGround(tmp_path), tmp_path, parameters)
    assert not result.problems, f"seed {SEED}: {result.problems}"
    assert result.marks, result.missed


@pytest.mark.timeout(300)
def test_nor_are_containers(tmp_path: Path, engine: EngineUnderTest) -> None:
    parameters = Parameters(SEED, seconds=12, backlog=12, pace=1.5, faults=6)
    result = play(DockerGround(engine), tmp_path, parameters)
    assert not result.problems, f"seed {SEED}: {result.problems}"
    assert result.marks, result.missed
