"""What others may know of one instance: its entry in ``instances`` and its gauges."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

from dispatcher import __version__
from dispatcher.dispatch.images import ImageGovernor
from dispatcher.dispatch.pull_line import Pull
from dispatcher.dispatch.slots import Slots
from dispatcher.model import Health
from dispatcher.queue.leases import LeaseKeeper
from dispatcher.queue.views import QueueInfo
from dispatcher.settings import Settings
from dispatcher.telemetry import Reading, Telemetry

_STATES = ("queued", "pulling", "starting", "running")
#: Pulls that the entry tells, and tasks that it names for each: what every tick writes is bounded.
MAX_PULLS = 100
MAX_NAMED = 10


class Presence:
    """Collects it from the parts; what changes outside of them is assigned."""

    def __init__(
        self,
        settings: Settings,
        backend: str,
        *,
        slots: Slots,
        keeper: LeaseKeeper,
        images: ImageGovernor,
        telemetry: Telemetry,
    ) -> None:
        """Registers the gauges with ``telemetry``."""
        self._settings = settings
        self._backend = backend
        self._slots = slots
        self._keeper = keeper
        self._images = images
        self._born = time.time()
        self.lifecycle = ""
        self.health = Health(ok=False)
        #: The queues as they were seen last.
        self.queues: Sequence[QueueInfo] = ()
        #: Running containers that no task is known for.
        self.leaked = 0
        #: Tells how many containers are started at the same time at most.
        self.start_limit: Callable[[], int] = lambda: 0
        self._register(telemetry)

    def document(self) -> str:
        """The entry in ``instances``, as JSON."""
        return json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "version": __version__,
                "backend": self._backend,
                "daemon": self.health.daemon,
                "state": self.lifecycle,
                "consumers": self._slots.capacity,
                "busy": self._slots.used,
                "held": len(self._keeper.held),
                "waiting_for_images": self._images.waiting,
                "leaked_containers": self.leaked,
                "pulls": [_told(pull) for pull in self._images.pulls[:MAX_PULLS]],
                "cooling": {
                    name: round(cool, 3) for name, cool in islice(self._images.cooling.items(), MAX_PULLS)
                },
                "queues": self._settings.queues,
                "started_at": self._born,
            }
        )

    def _in_flight(self) -> Iterable[Reading]:
        states = [str(lease.state) for lease in self._keeper.held.values()]
        return [({"state": state}, states.count(state)) for state in _STATES]

    def _oldest(self) -> Iterable[Reading]:
        """0 where nothing waits; nothing where it is not known."""
        known = [q for q in self.queues if q.oldest_seconds is not None or not q.depth]
        return [({"queue": q.name}, q.oldest_seconds or 0.0) for q in known]

    def _register(self, telemetry: Telemetry) -> None:
        gauge, images = telemetry.gauge, self._images
        gauge("dispatcher_tasks_in_flight", "Tasks in this instance's hands, by state.", self._in_flight)
        gauge("dispatcher_consumers", "Consumers of this instance.", lambda: [({}, self._slots.capacity)])
        gauge("dispatcher_consumers_busy", "Consumers that hold a task.", lambda: [({}, self._slots.used)])
        gauge(
            "dispatcher_queue_depth",
            "Tasks that wait, as this instance saw it last.",
            lambda: [({"queue": q.name}, q.depth) for q in self.queues],
        )
        gauge(
            "dispatcher_queue_oldest_seconds",
            "Age of the task that waits longest.",
            self._oldest,
        )
        gauge(
            "dispatcher_image_pulls_in_flight",
            "Image pulls under way.",
            lambda: [({}, sum(pull.active for pull in images.pulls))],
        )
        gauge(
            "dispatcher_image_pull_waiters", "Tasks that wait for an image.", lambda: [({}, images.waiting)]
        )
        gauge(
            "dispatcher_registries_cooling",
            "Registries that are left alone for now.",
            lambda: [({}, len(images.cooling))],
        )
        gauge(
            "dispatcher_start_gate",
            "Containers started at the same time at most; tunes itself.",
            lambda: [({}, self.start_limit())],
        )
        gauge(
            "dispatcher_containers_leaked",
            "Running containers of this system on this daemon that no task is known for.",
            lambda: [({}, self.leaked)],
        )


def _told(pull: Pull) -> dict[str, Any]:
    """A pull in the entry; ``queue.pulls`` reads it for the tasks that wait for it."""
    return {
        "image": pull.image,
        "registry": pull.registry,
        "active": pull.active,
        "ahead": pull.ahead,
        "waiters": pull.waiters,
        "waiting": pull.waiting_tasks[:MAX_NAMED],
        "bytes_done": pull.progress.bytes_done,
        "bytes_total": pull.progress.bytes_total,
        "layers_done": pull.progress.layers_done,
        "layers_total": pull.progress.layers_total,
        "tries": pull.tries,
    }
