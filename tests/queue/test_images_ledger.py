"""Which images tasks want and which were pulled, whatever lies in the queue."""

from __future__ import annotations

import json

import pytest

from dispatcher.queue import images as images_module
from dispatcher.queue.images import ImageLedger, PulledImage, TooManyTasks
from tests.queue.conftest import QueueUnderTest


@pytest.fixture
def ledger(queue: QueueUnderTest) -> ImageLedger:
    return ImageLedger(queue.store)


def plain(image: str) -> str:
    return json.dumps({"image": image})


def images(found: list[tuple[str, bytes]]) -> list[str]:
    return [json.loads(document)["image"] for _, document in found]


# --- what is taken next -----------------------------------------------------------------------


async def test_what_waits_is_seen_in_the_order_in_which_it_is_taken(
    queue: QueueUnderTest, ledger: ImageLedger
) -> None:
    await queue.submit(image="back")
    held = await queue.take_one()
    await queue.submit(image="second")
    queue.push(plain("third"))
    await queue.submit(image="later", delay=60.0)
    await queue.submit(image="fourth")
    await queue.submit(image="urgent", queue="high")
    await queue.finish(held, "release")
    found = await ledger.waiting(["default", "high", "low"], 10)
    assert [name for name, _ in found] == ["default"] * 4 + ["high"]
    assert images(found) == ["back", "second", "third", "fourth", "urgent"]
    taken = [delivery.document for delivery in await queue.take(queues={"default": 1})]
    assert [json.loads(document)["image"] for document in taken if document] == ["back", "second", "fourth"]


async def test_a_look_takes_nothing(queue: QueueUnderTest, ledger: ImageLedger) -> None:
    await queue.submit()
    queue.push(plain("busybox"))
    before = {key: queue.redis.dump(key) for key in queue.redis.keys("*")}
    assert await ledger.waiting(["default"], 10) == await ledger.waiting(["default"], 10) != []
    assert {key: queue.redis.dump(key) for key in queue.redis.keys("*")} == before
    assert len(await queue.take()) == 2


async def test_of_each_queue_no_more_are_seen_than_were_asked_for(
    queue: QueueUnderTest, ledger: ImageLedger
) -> None:
    for i in range(30):
        await queue.submit(image=f"client-{i}")
    queue.push(*(plain(f"plain-{i}") for i in range(30)))
    assert images(await ledger.waiting(["default"], 3)) == ["client-0", "client-1", "client-2"]
    seen = images(await ledger.waiting(["default"], 45))
    assert seen == [f"client-{i}" for i in range(30)] + [f"plain-{i}" for i in range(15)]
    assert len(await ledger.waiting(["default"], 100)) == 60


async def test_of_what_came_back_no_more_are_seen_than_were_asked_for(
    queue: QueueUnderTest, ledger: ImageLedger
) -> None:
    for i in range(5):
        await queue.submit(id=f"task-{i}", image=f"image-{i}")
    for delivery in await queue.take():
        await queue.finish(delivery, "release")
    await queue.submit(image="behind")
    assert images(await ledger.waiting(["default"], 3)) == ["image-0", "image-1", "image-2"]
    assert images(await ledger.waiting(["default"], 6))[5:] == ["behind"]


async def test_paused_and_unusable_queues_have_nothing(queue: QueueUnderTest, ledger: ImageLedger) -> None:
    await queue.submit(image="paused", queue="low")
    await queue.submit(image="seen")
    await queue.store.pause("low", paused=True)
    queue.ask("SET", queue.stream("high"), "not ours")
    assert images(await ledger.waiting(["high", "low", "default"], 10)) == ["seen"]
    queue.redis.delete(queue.stream("high"))


async def test_what_nobody_will_get_is_not_seen(queue: QueueUnderTest, ledger: ImageLedger) -> None:
    await queue.submit_in("ended", "ended")
    await queue.submit_in("held", "held")
    queue.ask("ZADD", queue.key("ready:default"), 1, "ended", 2, "held", 3, "vanished")
    await queue.submit(image="seen")
    assert images(await ledger.waiting(["default"], 10)) == ["seen"]


@pytest.mark.source("redis-list")
async def test_what_only_looks_like_a_reference_is_seen_as_it_is(
    queue: QueueUnderTest, ledger: ImageLedger
) -> None:
    await queue.submit(id="mine")
    queue.push("\x01123-4 mine", "\x01")
    assert [document for _, document in await ledger.waiting(["default"], 10)] == [
        queue.record("mine")["doc"].encode(),
        b"\x01123-4 mine",
        b"\x01",
    ]


async def test_what_is_too_large_is_not_seen_and_hides_nothing(
    queue: QueueUnderTest, ledger: ImageLedger
) -> None:
    queue.push("x" * 70_000, plain("seen"), "junk")
    found = await ledger.waiting(["default"], 2)
    assert [document for _, document in found] == [plain("seen").encode(), b"junk"]


async def test_a_flood_of_large_entries_is_not_looked_through(
    queue: QueueUnderTest, ledger: ImageLedger
) -> None:
    queue.push(*["x" * 200_000] * 60, plain("behind"))
    assert await ledger.waiting(["default"], 100) == []


# --- what is open -----------------------------------------------------------------------------


async def opened(ledger: ImageLedger) -> list[str]:
    """The images of all documents, sorted; what is no task is told as it is."""
    found = [document async for document in ledger.open_documents()]
    return sorted(json.loads(d)["image"] if d.startswith(b"{") else d.decode() for d in found)


async def test_every_open_task_is_seen_wherever_it_is(queue: QueueUnderTest, ledger: ImageLedger) -> None:
    for phase in ("held", "scheduled", "inbox", "ended", "ready"):
        await queue.submit_in(phase, phase)
        document = json.dumps({"image": phase})
        queue.ask("HSET", queue.key(f"task:{phase}"), "doc", document)
    await queue.submit(image="waiting")
    await queue.submit(image="paused", queue="low")
    await queue.store.pause("low", paused=True)
    queue.push(plain("plain"), "junk", "x" * 70_000)
    queue.push(plain("plain-low"), queue="low")
    assert await opened(ledger) == sorted(
        ["held", "scheduled", "ready", "inbox", "waiting", "paused", "plain", "junk", "plain-low"]
    )


async def test_all_pages_are_read(
    queue: QueueUnderTest, ledger: ImageLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_module, "PAGE", 40)
    wanted = [f"client-{i:03}" for i in range(150)] + [f"plain-{i:03}" for i in range(150)]
    for name in wanted[:150]:
        await queue.submit(image=name)
    queue.push(*map(plain, wanted[150:]))
    found = await opened(ledger)
    assert sorted(set(found)) == wanted
    assert [name for name in found if name.startswith("plain")] == wanted[150:]  # each of them once


async def test_large_entries_are_read_in_small_pages(queue: QueueUnderTest, ledger: ImageLedger) -> None:
    queue.push(*["x" * 200_000] * 60, plain("behind"))
    before = queue.calls("evalsha")
    assert await opened(ledger) == ["behind"]
    assert queue.calls("evalsha") - before >= 4


async def test_what_is_taken_meanwhile_is_seen(
    queue: QueueUnderTest, ledger: ImageLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_module, "PAGE", 20)
    queue.push(*(plain(f"image-{i:03}") for i in range(100)))
    documents = ledger.open_documents()
    seen = {await anext(documents)}
    await queue.take(30)
    seen |= {document async for document in documents}
    assert seen == {plain(f"image-{i:03}").encode() for i in range(100)}


async def test_more_tasks_than_are_looked_through_are_told(
    queue: QueueUnderTest, ledger: ImageLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(6):
        await queue.submit(image=f"image-{i}")
    queue.push(plain("plain"))
    monkeypatch.setattr(images_module, "MAX_SCANNED", 13)  # each of the six is an entry, too
    assert len(await opened(ledger)) == 7
    monkeypatch.setattr(images_module, "MAX_SCANNED", 12)
    with pytest.raises(TooManyTasks, match="12"):
        await opened(ledger)


async def test_a_queue_that_is_something_else_stops_no_look(
    queue: QueueUnderTest, ledger: ImageLedger
) -> None:
    await queue.submit(image="seen", queue="low")
    queue.ask("SET", queue.stream("default"), "not ours")
    assert await opened(ledger) == ["seen"]
    queue.redis.delete(queue.stream("default"))


# --- what was pulled --------------------------------------------------------------------------

DAEMON = "engine-1"
NAME = "docker.io/library/busybox:1"


async def test_what_was_pulled_is_remembered_by_daemon(queue: QueueUnderTest, ledger: ImageLedger) -> None:
    assert await ledger.pulled(DAEMON) == {}
    await ledger.note(DAEMON, NAME, "sha256:1", 1000.5)
    await ledger.note("engine-2", NAME, "sha256:2", 2000.0)
    assert await ledger.pulled(DAEMON) == {NAME: PulledImage("sha256:1", 1000.5)}
    await ledger.note(DAEMON, NAME, "sha256:3", 1500.0)
    assert await ledger.pulled(DAEMON) == {NAME: PulledImage("sha256:3", 1500.0)}
    await ledger.forget(DAEMON, NAME)
    assert await ledger.pulled(DAEMON) == {}
    assert await ledger.pulled("engine-2") == {NAME: PulledImage("sha256:2", 2000.0)}


async def test_a_use_is_noted_of_what_was_pulled_alone_and_never_set_back(
    queue: QueueUnderTest, ledger: ImageLedger
) -> None:
    await ledger.note(DAEMON, NAME, "sha256:1", 1000.0)
    await ledger.used(DAEMON, {NAME: 2000.0, "docker.io/library/imported:1": 2000.0})
    await ledger.used(DAEMON, {NAME: 1500.0})
    assert await ledger.pulled(DAEMON) == {NAME: PulledImage("sha256:1", 2000.0)}
    await ledger.note(DAEMON, NAME, "sha256:2", 1700.0)
    assert await ledger.pulled(DAEMON) == {NAME: PulledImage("sha256:2", 2000.0)}
    await ledger.forget(DAEMON, NAME)
    await ledger.used(DAEMON, {NAME: 3000.0})
    assert await ledger.pulled(DAEMON) == {}
    assert queue.members(f"images-used:{DAEMON}") == {}, "nothing is left of what is forgotten or not ours"


async def test_many_uses_are_written_together(queue: QueueUnderTest, ledger: ImageLedger) -> None:
    names = [f"docker.io/library/image:{i}" for i in range(450)]
    for name in names:
        await ledger.note(DAEMON, name, "sha256:1", 1.0)
    before = queue.calls("zadd")
    await ledger.used(DAEMON, dict.fromkeys(names, 2.0))
    assert queue.calls("zadd") - before == 3
    assert {image.used for image in (await ledger.pulled(DAEMON)).values()} == {2.0}
    await ledger.used(DAEMON, {})


async def test_the_images_of_a_daemon_that_is_gone_are_forgotten_in_the_end(
    queue: QueueUnderTest, ledger: ImageLedger
) -> None:
    keys = [f"images:{DAEMON}", f"images-used:{DAEMON}"]
    await ledger.note(DAEMON, NAME, "sha256:1", 1.0)
    assert all(0 < queue.lifetime_ms(key) <= images_module.REMEMBERED * 1000 for key in keys)
    for key in keys:
        queue.ask("PEXPIRE", queue.key(key), 100_000)
    await ledger.used(DAEMON, {NAME: 2.0})
    assert all(queue.lifetime_ms(key) > 100_000 for key in keys)
