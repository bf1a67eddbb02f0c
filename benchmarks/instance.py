"""A dispatcher under measure, in a process of its own: ``python -m benchmarks.instance FILE [WIDTH]``.

It is the dispatcher as it is, set by its environment. Only the histogram of launches is watched:
each launch's seconds, from the start gate to the container's start, are written to FILE, a line
each, for buckets are too coarse to tell a median. With WIDTH the start gate does not tune itself: so
many are let in at once.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any, TextIO

import anyio
from opentelemetry.metrics import Histogram

from dispatcher.backends import load_backend
from dispatcher.cli.logging import configure
from dispatcher.dispatch import start_gate
from dispatcher.service import Dispatcher
from dispatcher.settings import load


class NotingHistogram(Histogram):
    """Writes every value down."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def record(self, amount: float, *args: Any, **kwargs: Any) -> None:
        """See ``Histogram.record``."""
        self._file.write(f"{amount:.6f}\n")


async def serve(file: TextIO) -> None:
    """One instance, until it is told to end."""
    settings = load().settings
    configure(settings.log_level, "json")
    dispatcher = Dispatcher(settings, load_backend(settings, allow_process=False))
    dispatcher.telemetry.launch = NotingHistogram(file)

    async def heed() -> None:
        async for _ in signals:
            dispatcher.drain()

    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        async with anyio.create_task_group() as group:
            group.start_soon(heed)
            await dispatcher.run()
            group.cancel_scope.cancel()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        start_gate.LEAST = start_gate.MOST = int(sys.argv[2])
    with Path(sys.argv[1]).open("w", buffering=1) as launches:
        anyio.run(serve, launches)
