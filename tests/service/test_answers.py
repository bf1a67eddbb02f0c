"""An instance bears what Redis answers in trouble: it waits without a busy loop, and goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from dispatcher.client import AsyncClient, State
from tests.support.system import ProcessSystem
from tests.support.troubles import ANSWERS, TroubledServer
from tests.support.waiting import wait_until

TIMEOUT = 30.0
#: Seconds of trouble over which commands are counted.
SPAN = 3.0
#: A second. In trouble each call is tried three times with pauses between, on a connection that
#: says hello in three commands, and what a script does is counted too: some forty. A busy loop makes
#: thousands.
MOST_COMMANDS = 100
MOST_CONNECTIONS = 30


@pytest.fixture
def troubled(tmp_path: Path) -> Iterator[TroubledServer]:
    server = TroubledServer(tmp_path)
    yield server
    server.close()


@pytest.mark.parametrize("answer", ["READONLY", "MASTERDOWN", "MISCONF", "BUSY", "LOADING"])
async def test_an_instance_waits_quietly_and_goes_on(
    troubled: TroubledServer, tmp_path: Path, answer: str
) -> None:
    system = ProcessSystem(troubled.server, tmp_path)
    go = tmp_path / "go"
    async with (
        AsyncClient(troubled.server.url) as client,
        system.instance(lease_seconds=30, num_consumers=1) as instance,
    ):
        first = await client.submit(system.task(f"until [ -e {go} ]; do sleep 0.05; done"))
        second = await client.submit(system.task("exit 3"))
        await wait_until(lambda: first.id in instance.keeper.held, TIMEOUT)
        # A server that is started again counts from zero.
        before = (0, 0) if answer == "LOADING" else (troubled.commands(), troubled.connections())
        began = time.monotonic()
        with ANSWERS[answer](troubled):
            await wait_until(lambda: "redis" in instance.ready, TIMEOUT)
            go.touch()  # a task that ends now is held until it can be told
            await anyio.sleep(SPAN)  # a rate needs a span
        span = time.monotonic() - began
        assert (troubled.commands() - before[0]) / span < MOST_COMMANDS
        assert (troubled.connections() - before[1]) / span < MOST_CONNECTIONS
        assert (await first.wait(TIMEOUT)).state is State.SUCCEEDED
        assert (await second.wait(TIMEOUT)).exit_code == 3
        await wait_until(lambda: not instance.ready, TIMEOUT)
        assert troubled.client.xlen("{dispatcher:tasks}:results") == 2
