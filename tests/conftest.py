"""What holds for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from blockbuster import blockbuster_ctx

from dispatcher.settings import Settings

pytest_plugins = [
    "tests.support.engine",
    "tests.support.faulty_registry",
    "tests.support.redis_server",
    "tests.support.registry",
]

#: Variables of a developer's own environment that would change what is tested.
_OURS = [variable for name in Settings.model_fields for variable in (name.upper(), f"{name.upper()}_FILE")]


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[None]:
    """A call of ours that blocks the event loop is an error; what a test does itself is not."""
    with blockbuster_ctx("dispatcher"):
        yield


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the developer's shell reaches a test."""
    for name in _OURS:
        monkeypatch.delenv(name, raising=False)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
    """With REQUIRE_ALL=1 a test that skips has failed: somebody promised that all can run."""
    outcome: Any = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("REQUIRE_ALL") == "1" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, but REQUIRE_ALL=1: {report.longrepr}"
