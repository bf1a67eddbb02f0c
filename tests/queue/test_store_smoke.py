from __future__ import annotations

from dispatcher.model import Task
from dispatcher.queue.store import Store, Submission
from tests.support.redis_server import RedisUnderTest


async def test_a_submitted_task_lies_in_its_stream(redis_server: RedisUnderTest) -> None:
    store = Store(redis_server.url, "dispatcher:tasks")
    task_id = await store.enqueue(Submission.of(Task(image="busybox")))
    with redis_server.client() as client:
        assert client.xlen("dispatcher:tasks") == 1
        assert client.exists(f"{{dispatcher:tasks}}:task:{task_id}")
    await store.aclose()
