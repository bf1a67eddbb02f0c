"""A task on its way, for the one who waits for it: a status line, or lines without a terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import anyio

from dispatcher.cli import output
from dispatcher.cli.exits import tell, tell_gap
from dispatcher.cli.pulls import how_far
from dispatcher.errors import OutputUnavailable
from dispatcher.model import State

if TYPE_CHECKING:
    from dispatcher.client import AsyncClient, TaskStatus

#: Seconds between looks at the task.
LOOK_SECONDS = 0.25
_ERASE = "\r\x1b[K"


class StatusLine:
    """One line on stderr that is written over; without a terminal, a line a change."""

    def __init__(self) -> None:
        self._terminal = output.is_terminal(sys.stderr)
        self._last = ""

    def show(self, what: str, detail: str = "") -> None:
        """Say ``what`` it is at; ``detail`` changes all the time and is for terminals only."""
        if self._terminal:
            width = output.console(sys.stderr).width
            line = output.one_line(f"{what} {detail}".rstrip())[: width - 1]
            print(f"{_ERASE}{line}", end="", file=sys.stderr, flush=True)
        elif what != self._last:
            tell(what)
        self._last = what

    def clear(self) -> None:
        """Make room for other output."""
        if self._terminal and self._last:
            print(_ERASE, end="", file=sys.stderr, flush=True)
            self._last = ""


async def watched(client: AsyncClient, task_id: str, *, image: str, follow: bool) -> TaskStatus:
    """Wait for the task's end, showing how it goes; with ``follow`` its output as well."""
    line = StatusLine()
    written = output.ContainerOutput()

    async def output_of() -> None:
        async for piece in client.output(task_id, follow=True, on_gap=tell_gap):
            if piece:
                line.clear()
                written.write(piece)

    async with anyio.create_task_group() as group:
        group.start_soon(_show, client, task_id, image, line, follow, name="status line")
        if follow:
            try:
                await output_of()
            except OutputUnavailable as error:  # how it ends can be seen all the same
                line.clear()
                tell(f"dispatcher: {error}")
        ended = await client.wait(task_id)
        group.cancel_scope.cancel()
    line.clear()
    return ended


async def _show(client: AsyncClient, task_id: str, image: str, line: StatusLine, follow: bool) -> None:
    began = time.monotonic()
    while True:
        status = await client.status(task_id)
        if status.state.terminal:
            return
        what = f"{task_id}: {status.state}"
        if status.attempt > 1:
            what += f" (attempt {status.attempt})"
        if status.state is State.SCHEDULED and status.message:
            what += f", for: {status.message}"  # why the attempt before it failed
        detail = f"{time.monotonic() - began:.0f} s"
        if status.state is State.PULLING:
            detail = f"{status.image or image}: {how_far(status)}, {detail}"
        if status.state is State.RUNNING and follow:
            line.clear()  # its own output is what there is to see now
        else:
            line.show(what, detail)
        await anyio.sleep(LOOK_SECONDS)
