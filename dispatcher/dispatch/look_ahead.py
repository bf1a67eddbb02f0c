"""Images that will be wanted soon, pulled before their tasks are taken.

While every consumer is busy, tasks wait in the queue, and the images of the next of them may be
missing here. They are looked at without being taken, as many as are told, and what is missing is
pulled as long as there are places for pulls that nobody else wants. Whoever waits for an image
goes first, always (see ``pull_line``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import uniform

import anyio
import structlog
from anyio.abc import TaskGroup
from pydantic import ValidationError

from dispatcher.dispatch.admission import check_expiry
from dispatcher.dispatch.images import ImageGovernor
from dispatcher.dispatch.pull_line import Pull
from dispatcher.dispatch.recent import Recent
from dispatcher.errors import BackendError, QueueError, TaskRefused
from dispatcher.policy import Policy
from dispatcher.queue.images import ImageLedger
from dispatcher.task import Task

log = structlog.get_logger(__name__)

#: Seconds between looks.
LOOK_SECONDS = 1.0
#: Seconds for which an image that could not be pulled ahead is left to those who will want it.
SPURN_SECONDS = 60.0
#: Images remembered to have failed.
MAX_SPURNED = 1_000


class LookAhead:
    """Looks at what waits, and has its images pulled."""

    def __init__(
        self,
        governor: ImageGovernor,
        ledger: ImageLedger,
        policy: Policy,
        *,
        queues: Mapping[str, int],
        limit: int,
        is_wanted: Callable[[], bool],
    ) -> None:
        """``limit``: waiting tasks of each queue that are looked at; ``is_wanted`` tells whether
        what waits has to wait on, while this instance goes on taking."""
        self._governor = governor
        self._ledger = ledger
        self._policy = policy
        # By weight: the one that is served most first, and those of weight 0 last.
        self._queues = sorted(queues, key=lambda name: -queues[name])
        self._limit = limit
        self._is_wanted = is_wanted
        #: Images that could not be pulled ahead.
        self._spurned = Recent(MAX_SPURNED)

    async def run(self) -> None:
        """Look until cancelled, whatever Redis and the backend do meanwhile."""
        async with anyio.create_task_group() as watchers:
            while True:
                await anyio.sleep(uniform(LOOK_SECONDS / 2, LOOK_SECONDS))  # noqa: S311 - jitter
                if not self._is_wanted():
                    continue
                try:
                    await self._look(watchers)
                except (BackendError, QueueError) as error:
                    log.debug("look_ahead.put_off", error=str(error))

    async def _look(self, watchers: TaskGroup) -> None:
        """Begin what there is room for. Raises BackendUnreachable, QueueError."""
        if self._governor.busy:
            return
        for task in await self._waiting():
            pull = await self._governor.ahead(task.reference)
            if pull is not None:
                watchers.start_soon(self._watch, pull, name=f"ahead {pull.image}")

    async def _waiting(self) -> list[Task]:
        """The next tasks that may want an image pulled, in the order they will be taken."""
        found: dict[str, Task] = {}
        for queue, document in await self._ledger.waiting(self._queues, self._limit):
            try:
                task = Task.model_validate_json(document)
                self._policy.grant(task)
                check_expiry(task)
            except (ValidationError, TaskRefused) as refusal:
                log.debug("look_ahead.passed_over", queue=queue, why=str(refusal).partition("\n")[0])
                continue
            image = str(task.reference)
            if task.pull_policy == "missing" and not self._spurned.has(image, SPURN_SECONDS):
                found.setdefault(image, task)
        return list(found.values())

    async def _watch(self, pull: Pull) -> None:
        await pull.done.wait()
        if pull.outcome == "failed":
            self._spurned.note(pull.image)
