"""Memory and open descriptors of dispatchers through a slice, from /proc."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.chaos.member import Member

#: Seconds between samples.
INTERVAL = 2.0


@dataclass
class Range:
    """First, last and highest of what was measured."""

    first: int
    last: int
    max: int

    def add(self, value: int) -> None:
        """A further measurement."""
        self.last = value
        self.max = max(self.max, value)


class Vitals:
    """Samples one dispatcher as long as its life lasts; a thread of its own."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self.rss_kb: Range | None = None
        self.descriptors: Range | None = None
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="vitals")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._enough.set()
        self._thread.join()

    def _sample(self) -> None:
        proc = Path(f"/proc/{self._member.pid}")
        while True:
            with contextlib.suppress(OSError):
                fields = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
                rss = int(fields["VmRSS"].split()[0])
                descriptors = len(list((proc / "fd").iterdir()))
                if self.rss_kb is None or self.descriptors is None:
                    self.rss_kb, self.descriptors = Range(rss, rss, rss), Range(*[descriptors] * 3)
                self.rss_kb.add(rss)
                self.descriptors.add(descriptors)
            if self._enough.wait(INTERVAL):
                return
