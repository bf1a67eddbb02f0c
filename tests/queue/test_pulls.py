"""What a task that waits for its image is told of the pull."""

from __future__ import annotations

from typing import Any

import pytest

from dispatcher.model import State
from dispatcher.queue.pulls import PullStatus, pulls_of
from dispatcher.queue.views import Views
from tests.queue.conftest import QueueUnderTest

NUMBERS = {"bytes_done": 12_300_000, "bytes_total": 40_000_000, "layers_done": 3, "layers_total": 5}


def told(image: str, *, active: bool = False, **more: Any) -> dict[str, Any]:
    """A pull in an instance's entry."""
    return {"image": image, "registry": image.split("/", maxsplit=1)[0], "active": active, **more}


@pytest.fixture
def views(queue: QueueUnderTest) -> Views:
    return Views(queue.store)


async def pulling(queue: QueueUnderTest, instance: str, **images: str) -> None:
    """Tasks by id that this instance holds, each with the image it waits for."""
    for task_id, image in images.items():
        await queue.submit(id=task_id)
        await queue.renew(await queue.take_one(instance), state="pulling", image=image)


async def test_a_task_in_state_pulling_names_its_image_and_its_place(
    queue: QueueUnderTest, views: Views
) -> None:
    await pulling(queue, "b", first="r/one:1", second="r/two:1", third="r/three:1")
    assert (await views.task("first")).pull is None, "its instance has told nothing yet"
    pulls = [told("r/one:1", active=True, **NUMBERS), told("r/two:1"), told("r/three:1")]
    await queue.tick("b", info={"pulls": pulls, "cooling": {}})
    found = {status.id: status for status in await views.tasks(state=State.PULLING)}
    assert {task_id: status.image for task_id, status in found.items()} == {
        "first": "r/one:1", "second": "r/two:1", "third": "r/three:1",
    }  # fmt: skip
    assert found["first"].pull == PullStatus("r", True, 0, 12_300_000, 40_000_000, 3, 5)
    assert found["second"].pull == PullStatus("r", False, 1)
    assert found["third"].pull == PullStatus("r", False, 2)
    assert await views.task("second") == found["second"]


async def test_a_listing_asks_once_for_all_pulls(queue: QueueUnderTest, views: Views) -> None:
    await pulling(queue, "a", one="r/one:1", two="r/one:1")
    await pulling(queue, "b", three="r/one:1")
    await queue.tick("a", info={"pulls": [told("r/one:1", active=True)]})
    await queue.tick("b", info={"pulls": [told("r/other:1"), told("r/one:1")]})
    records = queue.calls("hmget")
    await views.tasks()
    lookups = queue.calls("hmget") - records
    assert lookups == 3 + 1
    positions = {status.id: status.pull and status.pull.position for status in await views.tasks()}
    assert positions == {"one": 0, "two": 0, "three": 1}


async def test_what_waits_for_no_image_is_told_of_no_pull(queue: QueueUnderTest, views: Views) -> None:
    await pulling(queue, "b", went="r/one:1", waits="r/lost:1")
    await queue.tick("b", info={"pulls": [told("r/one:1", active=True)]})
    assert (await views.task("waits")).pull is None
    owner = queue.record("went")["owner"]
    await queue.store.renew("went", owner, 30.0, {"state": "running"})
    status = await views.task("went")
    assert (status.state, status.image, status.pull) == (State.RUNNING, "r/one:1", None)
    assert [status.pull for status in await views.tasks()] == [None, None]
    before = queue.calls("hmget")
    await views.task("went")
    assert queue.calls("hmget") == before + 1


def test_only_pulls_of_its_own_registry_go_before_one_while_that_is_left_alone() -> None:
    pulls = [told("busy/1", active=True), told("slow/1"), told("slow/2"), told("busy/2"), told("busy/3")]
    found = pulls_of({"pulls": pulls, "cooling": {"slow": 12.5}})
    assert {image: pull.position for image, pull in found.items()} == {
        "busy/1": 0, "slow/1": 1, "slow/2": 2, "busy/2": 1, "busy/3": 2,
    }  # fmt: skip
    assert [found[image].cooling_seconds for image in ("busy/1", "slow/1", "busy/2")] == [None, 12.5, None]


def test_what_is_under_way_waits_for_nothing() -> None:
    """Also if its registry has asked to be left alone since it began."""
    found = pulls_of({"pulls": [told("r/1", active=True), told("r/2", active=True)], "cooling": {"r": 9.0}})
    assert list(found.values()) == [PullStatus("r", True, 0), PullStatus("r", True, 0)]


def test_an_instance_of_an_older_version_tells_less() -> None:
    assert pulls_of({}) == {}
    assert pulls_of({"pulls": [{"image": "r/one:1", "active": True, "bytes_done": 1}]}) == {
        "r/one:1": PullStatus("", True, 0, 1)
    }
