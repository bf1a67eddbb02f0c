"""What holds for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from blockbuster import blockbuster_ctx


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[None]:
    """A call of ours that blocks the event loop is an error; what a test does itself is not."""
    with blockbuster_ctx("dispatcher"):
        yield
