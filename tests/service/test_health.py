"""/healthz, /readyz and /metrics of a running instance."""

from __future__ import annotations

import anyio
import httpx
import pytest

from dispatcher.api.health import health_app, serve
from dispatcher.client import State
from dispatcher.errors import ConfigurationError
from tests.support.redis_server import free_port
from tests.support.system import ProcessSystem
from tests.support.waiting import wait_until


async def test_ready_until_it_drains_and_metrics_tell_what_ended(process_system: ProcessSystem) -> None:
    port = free_port()
    async with (
        process_system.client() as client,
        process_system.instance() as dispatcher,
        anyio.create_task_group() as group,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
    ):
        app = health_app(lambda: dispatcher.ready, dispatcher.telemetry.exposition)
        await group.start(
            lambda *, task_status: serve(app, host="127.0.0.1", port=port, task_status=task_status)
        )
        assert (await http.get("/healthz")).status_code == 200
        assert (await http.get("/readyz")).json() == {"status": "ok"}
        handle = await client.submit(process_system.task("exit 3", queue="high"))
        assert (await handle.wait(30)).state is State.FAILED
        text = (await http.get("/metrics")).text
        [line] = [x for x in text.splitlines() if x.startswith("dispatcher_tasks_finished_total{")]
        assert line.endswith(" 1.0")
        for label in ('queue="high"', 'reason="exit"', 'state="failed"'):
            assert label in line
        assert handle.id not in text
        dispatcher.drain()
        await wait_until(lambda: dispatcher.lifecycle == "stopped", 20)
        answer = await http.get("/readyz")
        assert answer.status_code == 503
        assert answer.json()["problems"]["instance"] == "stopped"
        group.cancel_scope.cancel()


async def test_a_port_that_is_taken_is_told() -> None:
    app = health_app(dict, bytes)
    async with anyio.create_task_group() as group:
        port = free_port()
        await group.start(
            lambda *, task_status: serve(app, host="127.0.0.1", port=port, task_status=task_status)
        )
        with pytest.raises(ConfigurationError, match=str(port)):
            await serve(app, host="127.0.0.1", port=port)
        group.cancel_scope.cancel()
