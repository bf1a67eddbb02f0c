"""What other services import: submit, wait, status, cancel, logs.

    async with AsyncClient("redis://localhost:6379/0") as client:
        handle = await client.submit(Task(image="busybox", command=["echo", "hi"]))
        result = await handle.wait(timeout=60)

``Client`` has the same verbs without ``await``.
"""

from __future__ import annotations

from dispatcher.client.asynchronous import AsyncClient, AsyncHandle
from dispatcher.client.blocking import Client, Handle
from dispatcher.errors import DispatcherError
from dispatcher.model import Reason, State
from dispatcher.queue.pulls import PullStatus
from dispatcher.queue.views import TaskStatus
from dispatcher.task import Backoff, Resources, Task

__all__ = [
    "AsyncClient",
    "AsyncHandle",
    "Backoff",
    "Client",
    "DispatcherError",
    "Handle",
    "PullStatus",
    "Reason",
    "Resources",
    "State",
    "Task",
    "TaskStatus",
]
