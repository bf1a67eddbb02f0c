"""How ``demo`` shows its tasks: a live table on a terminal, a line a change without one."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dispatcher.cli import output
from dispatcher.cli.exits import tell
from dispatcher.client import TaskStatus

if TYPE_CHECKING:
    from rich.live import Live


class Board:
    """What is known of each task now, by the task's name, on stderr."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._told: dict[str, str] = {}
        self._began = time.monotonic()
        self._live: Live | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Have the live table on the terminal, if there is one, and take it away again."""
        if not output.is_terminal(sys.stderr):
            yield
            return
        from rich.live import Live

        with Live(console=output.console(sys.stderr), auto_refresh=False, transient=True) as self._live:
            yield
        self._live = None

    def update(self, found: Mapping[str, TaskStatus], pulling: str) -> None:
        """Show how things are; ``pulling`` is a word on the image's pull, or ''."""
        if self._live is not None:
            rows = [self._row(name, found.get(name), pulling) for name in self._names]
            table = output.rich_table(("TASK", "STATE", "ATTEMPT", "SECONDS", ""), rows)
            self._live.update(table, refresh=True)
            return
        for name, status in found.items():
            word = f"{status.state}" + (f", attempt {status.attempt}" if status.attempt > 1 else "")
            if self._told.get(name) != word:
                self._told[name] = word
                tell(f"  {name}: {word}")

    def _row(self, name: str, status: TaskStatus | None, pulling: str) -> tuple[str, ...]:
        if status is None:
            return name, "", "", "", ""
        seconds = time.monotonic() - self._began
        if status.finished_at and status.accepted_at:
            seconds = (status.finished_at - status.accepted_at).total_seconds()
        detail = pulling if status.state == "pulling" else status.message
        return name, str(status.state), str(status.attempt), f"{seconds:.1f}", detail
