"""Which images are removed and which stay, on a backend that has images alone."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from dispatcher.dispatch import image_disk
from dispatcher.dispatch.image_disk import IMAGE_MIN_AGE
from dispatcher.errors import QueueUnavailable
from dispatcher.queue import images as images_module
from dispatcher.queue.images import TooManyTasks
from tests.queue.conftest import LONG, QueueUnderTest
from tests.queue.shelf import DAEMON, DIGEST, DiskUnderTest, name, running
from tests.support.waiting import wait_until

# What is open is read of both sources in test_images_ledger.py.
pytestmark = pytest.mark.source("redis-stream")


@pytest.fixture
def it(queue: QueueUnderTest) -> DiskUnderTest:
    return DiskUnderTest(queue)


# --- what goes --------------------------------------------------------------------------------


async def test_the_least_recently_used_go_until_low(it: DiskUnderTest) -> None:
    it.of(high=49, low=29)
    await it.pulled_before("a", "b", "c", "d", "e")
    it.disk.used(name("a"))
    it.now += IMAGE_MIN_AGE
    await it.disk.look()
    assert it.removed == [name("b"), name("c"), name("d")]
    assert it.left == {"a", "e"}
    assert (await it.ledger.pulled(DAEMON)).keys() == {name("a"), name("e")}
    assert it.events[0] == ("image.removed", {"image": name("b"), "bytes": 10, "unused_seconds": 124})


async def test_nothing_goes_and_nobody_is_asked_up_to_high(it: DiskUnderTest) -> None:
    it.of(high=30, low=0)
    await it.pulled_before("a", "b", "c")
    scans = it.queue.calls("zscan")
    await it.disk.look()
    assert (it.removed, it.queue.calls("zscan")) == ([], scans)
    it.pull("d")
    await it.disk.look()
    assert it.removed == [name("a"), name("b"), name("c")]


async def test_account_is_kept_without_a_limit(it: DiskUnderTest) -> None:
    it.of(high=None)
    await it.pulled_before("a")
    it.disk.used(name("a"))
    await it.disk.look()
    assert it.removed == []
    assert (await it.ledger.pulled(DAEMON))[name("a")].used == it.now


async def test_open_tasks_are_looked_at_again_after_some_removals(
    it: DiskUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_disk, "REMOVALS", 2)
    await it.pulled_before("a", "b", "c", "d", "e")
    scans = it.queue.calls("zscan")
    await it.disk.look()
    assert it.left == set()
    assert it.queue.calls("zscan") - scans == 3


# --- what stays -------------------------------------------------------------------------------


async def test_what_was_not_pulled_by_us_stays(it: DiskUnderTest) -> None:
    it.shelf.images[name("imported")] = "theirs"
    it.shelf.images[name("renewed")] = "theirs, too"
    await it.pulled_before("ours", "renewed")
    it.disk.used(name("imported"))
    it.now += IMAGE_MIN_AGE
    await it.disk.look()
    assert it.left == {"imported", "renewed"}


async def test_what_we_pulled_again_is_still_ours(it: DiskUnderTest) -> None:
    await it.pulled_before("a")
    it.pull("a", "newer")
    it.pull("a", "newest")
    await it.disk.look()
    assert it.left == {"a"}
    it.now += IMAGE_MIN_AGE
    await it.disk.look()
    assert it.left == set()


async def test_a_tag_that_somebody_moved_stays_and_is_theirs(it: DiskUnderTest) -> None:
    await it.pulled_before("a", "b", "c")
    it.shelf.images[name("a")] = it.shelf.images[name("c")] = "theirs"
    del it.shelf.images[name("b")]
    it.pull("c", "theirs, renewed by us")
    it.now += IMAGE_MIN_AGE
    await it.disk.look()
    assert it.left == {"a", "c"}
    assert await it.ledger.pulled(DAEMON) == {}
    it.pull("a", "theirs, renewed by us")
    it.now += IMAGE_MIN_AGE
    await it.disk.look()
    assert it.left == {"a", "c"}


async def test_what_was_there_by_another_name_stays(it: DiskUnderTest) -> None:
    """By its digest, say: an engine that removes the last tag removes that name as well."""
    it.shelf.images["docker.io/library/theirs@sha256:1"] = "pulled by them"
    it.pull("a", "pulled by them")
    it.pull("b", "ours")
    it.pull("c", "ours")
    it.now += IMAGE_MIN_AGE
    await it.disk.look()
    await it.disk.look()
    assert it.shelf.images.keys() == {"docker.io/library/theirs@sha256:1", name("a")}


async def test_what_an_open_task_names_stays(it: DiskUnderTest) -> None:
    await it.pulled_before("later", "far", "plain", "held", "short", "done", "nobody")
    await it.queue.submit(image="library/held:1")
    await it.queue.take_one()
    await it.queue.submit(image="done:1")
    await it.queue.finish(await it.queue.take_one())
    await it.queue.submit(image="later:1", delay=60.0)
    for _ in range(450):
        await it.queue.submit(image="other", queue="low")
    await it.queue.submit(image="far:1", queue="low")
    await it.queue.submit(image="index.docker.io/short:1")
    it.queue.push(json.dumps({"image": "plain:1", "unknown": [None]}))
    await it.disk.look()
    assert it.left == {"later", "far", "plain", "held", "short"}


async def test_what_an_open_task_names_by_its_digest_stays(it: DiskUnderTest) -> None:
    await it.pulled_before("a", "b")
    for one in ("a", "b"):
        it.shelf.images[f"docker.io/library/{one}@{DIGEST}"] = f"id of {one}"
    await it.queue.submit(image=f"a@{DIGEST}")
    await it.disk.look()
    assert name("a") in it.shelf.images
    assert name("b") not in it.shelf.images


@pytest.mark.parametrize(
    "junk", ["junk", "[]", '{"image": 1}', '{"image": "Not A Reference"}', "[" * 60_000, "{}", b"\xff", "1"]
)
async def test_what_is_no_task_keeps_nothing_and_stops_nothing(it: DiskUnderTest, junk: str | bytes) -> None:
    await it.pulled_before("a")
    it.queue.push(junk)
    await it.disk.look()
    assert it.left == set()


async def test_what_is_being_pulled_stays(it: DiskUnderTest) -> None:
    await it.pulled_before("a", "b")
    it.in_use = {name("a")}
    await it.disk.look()
    assert it.left == {"a"}


async def test_what_was_used_a_moment_ago_stays(it: DiskUnderTest) -> None:
    await it.pulled_before("a", "b")
    it.disk.used(name("a"))
    it.now += IMAGE_MIN_AGE - 1
    await it.disk.look()
    assert it.left == {"a"}
    it.now += 1
    await it.disk.look()
    assert it.left == set()


async def test_what_is_used_while_it_is_looked_at_stays(it: DiskUnderTest) -> None:
    await it.pulled_before("a", "b")
    it.shelf.on_look = lambda image: it.disk.used(image) if image == name("a") else None
    await it.disk.look()
    assert it.left == {"a"}


async def test_what_a_container_uses_stays_until_it_does_not(it: DiskUnderTest) -> None:
    await it.pulled_before("a", "b")
    it.shelf.used = {"id of a"}
    await it.disk.look()
    assert it.left == {"a"}
    it.shelf.used = set()
    await it.disk.look()
    assert it.left == set()


# --- what goes wrong --------------------------------------------------------------------------


async def test_nothing_goes_when_more_tasks_are_open_than_are_looked_through(
    it: DiskUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    await it.pulled_before("a")
    await it.queue.submit(image="other")
    monkeypatch.setattr(images_module, "MAX_SCANNED", 1)
    with pytest.raises(TooManyTasks):
        await it.disk.look()
    assert it.left == {"a"}


async def test_after_a_flush_nothing_is_known_to_be_ours(it: DiskUnderTest) -> None:
    await it.pulled_before("a")
    it.queue.redis.flushall()
    await it.disk.look()
    assert it.left == {"a"}


async def test_a_backend_that_is_away_puts_it_off(it: DiskUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_disk, "FIRST_PAUSE", 0.01)
    it.of(high=0, interval=LONG)
    await it.pulled_before("a")
    it.shelf.away = 3
    async with running(it.disk):
        await wait_until(lambda: it.left == set())
    assert it.shelf.looks >= 4


async def test_what_could_not_be_written_is_written_by_the_next_look(
    it: DiskUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    it.of(high=None)
    it.pull("a")
    it.disk.used(name("a"))
    with monkeypatch.context() as patch:

        async def away(*_: object) -> None:
            raise QueueUnavailable

        patch.setattr(it.ledger, "note", away)
        with pytest.raises(QueueUnavailable):
            await it.disk.look()
        patch.undo()
        patch.setattr(it.ledger, "used", away)
        it.now += 5
        it.disk.used(name("a"))
        with pytest.raises(QueueUnavailable):
            await it.disk.look()
    await it.disk.look()
    assert (await it.ledger.pulled(DAEMON))[name("a")].used == it.now


async def test_what_waits_to_be_written_is_bounded(
    it: DiskUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_disk, "MAX_NOTED", 2)
    it.of(high=None)
    await it.ledger.note(DAEMON, name("c"), "id of c", 1.0)
    for of in ("a", "b", "c", "d"):
        it.pull(of)
        it.disk.used(name(of))
    it.now += 1
    it.disk.used(name("b"))
    await it.disk.look()
    pulled = await it.ledger.pulled(DAEMON)
    assert {reference: image.used for reference, image in pulled.items()} == {
        name("a"): it.now - 1,
        name("b"): it.now,
        name("c"): 1.0,
    }


async def test_a_use_that_comes_while_others_are_written_is_written_next(
    it: DiskUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    it.of(high=None)
    await it.pulled_before("a")
    it.disk.used(name("a"))
    write = it.ledger.used

    async def slow(daemon: str, uses: Mapping[str, float]) -> None:
        await write(daemon, uses)
        it.now += 1
        it.disk.used(name("a"))

    with monkeypatch.context() as patch:
        patch.setattr(it.ledger, "used", slow)
        await it.disk.look()
    await it.disk.look()
    assert (await it.ledger.pulled(DAEMON))[name("a")].used == it.now


# --- when -------------------------------------------------------------------------------------


async def test_a_pull_calls_for_a_look(it: DiskUnderTest) -> None:
    it.of(high=5, interval=LONG, settle=0.01)
    await it.pulled_before("a")
    async with running(it.disk):
        await wait_until(lambda: it.left == set())
        it.shelf.images[name("imported")] = "theirs"
        looks = it.shelf.looks
        it.pull("b")
        await wait_until(lambda: it.shelf.looks > looks)


async def test_the_last_uses_are_written_at_the_end(it: DiskUnderTest) -> None:
    it.of(high=1_000, interval=LONG, settle=LONG)
    async with running(it.disk):
        await wait_until(lambda: it.shelf.looks)
        it.pull("a")
        it.now += 7
        it.disk.used(name("a"))
    assert (await it.ledger.pulled(DAEMON))[name("a")].used == it.now
