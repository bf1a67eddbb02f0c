"""A flood of entries that are no tasks: each becomes a dead letter that says why, and good tasks go on."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.ground import ProcessGround
from tests.chaos.truth import BASE, STREAM
from tests.chaos.world import World

TIMEOUT = 240.0
#: Entries in one round trip, and how many of them are very large.
BATCH = 250
LARGE = 1_000_000
#: Good tasks at rest, to compare with.
CALM = 10
_GOOD = b'{"image": "busybox", "command": ["true"]}'


def malformed() -> Iterator[list[bytes]]:
    """Entries that are wrong in different ways, as names and values; for ever."""

    def task(**fields: Any) -> list[bytes]:
        return [b"task", json.dumps({"image": "busybox", **fields}).encode()]

    small: list[list[bytes]] = [
        [b"task", b"not JSON"],
        [b"task", b""],
        [b"task", b"null"],
        [b"task", b"[]"],
        [b"task", b"{}"],
        [b"task", b"\xff\xfe\x00{"],
        [b"task", b'{"image": "\xc3\x28"}'],
        [b"task", b'{"image": "\\ud800"}'],
        [b"task", b"[" * 5_000],
        [b"task", b'{"image": "busybox", "env": ' + b'{"a": ' * 5_000],
        [b"task", b'{"image": "busybox", "timeout": 1e999}'],
        [b"task", b'{"image": "busybox", "timeout": NaN}'],
        task(image=7),
        task(image=""),
        task(image="../../etc/passwd"),
        task(command="echo"),
        task(command=[1, 2]),
        task(env={"A": {"B": 1}}),
        task(env={"": "x"}),
        task(timeout=-1),
        task(max_attempts="many"),
        task(queue="no-such-queue"),
        task(queue="NOT A NAME"),
        task(id="a b"),
        task(nonsense=True),
        [b"tusk", _GOOD],
        [b"task", _GOOD, b"more", b"x"],
        [b"task", _GOOD, b"task", _GOOD],
        [b"\xff\xfe", b"x"],
        [b"", b""],
        [b"ref", b"no-such-task"],
    ]
    for number in itertools.count():
        yield small[number % len(small)]


def flood(world: World, count: int, large: int) -> list[str]:
    """XADD so many, large ones and good ones among them; the ids of the tasks they become."""
    entries = itertools.islice(malformed(), count - large)
    big = itertools.cycle([[b"task", b"x" * LARGE], [b"task", _GOOD, b"more", b"\xff" * LARGE]])
    ids: list[str] = []
    with world.server.client() as client:
        while batch := list(itertools.islice(entries, BATCH)):
            if large > 0:
                batch.append(next(big))
                large -= 1
            pipe: Any = client.pipeline(transaction=False)
            for fields in batch:
                pipe.execute_command("XADD", STREAM, "*", *fields)
            ids += [f"default.{entry.decode()}" for entry in pipe.execute()]
            world.xadd("exit 0")
    return ids


def seconds_of_good_task(world: World) -> float:
    """From its submission to its end; it does not wait in the line of those that are wrong."""
    began = time.monotonic()
    world.client.wait(world.submit("exit 0", queue="high"), timeout=TIMEOUT)
    return time.monotonic() - began


def withstands(home: Path, count: int, large: int) -> None:
    with World(home, ProcessGround(home)) as world:
        world.member("a")
        calm = [seconds_of_good_task(world) for _ in range(CALM)]
        wrong = world.order("", endings={"failed:invalid"})
        for task_id in flood(world, count, large):
            world.book.accept(task_id, wrong)

        def dead() -> int:
            with world.server.client() as client:
                length: Any = client.xlen(f"{BASE}dead")
            return int(length)

        began, busy = time.monotonic(), []
        while dead() < count:
            busy.append(seconds_of_good_task(world))
            assert time.monotonic() - began < TIMEOUT
        print(
            f"{count} entries in {time.monotonic() - began:.1f} s; seconds of a good task: calm"
            f" {statistics.median(calm):.2f} (most {max(calm):.2f}), meanwhile"
            f" {statistics.median(busy):.2f} (most {max(busy):.2f}) of {len(busy)}"
        )
        assert busy
        with world.server.client() as client:
            letters: Any = client.xrange(f"{BASE}dead")
        assert len(letters) == count
        assert {fields[b"reason"] for _, fields in letters} == {b"invalid"}
        assert all(len(fields[b"message"]) > 10 for _, fields in letters)
        assert all(len(fields.get(b"task", b"")) < LARGE for _, fields in letters)
        findings = world.judged()
        assert not findings.broken(), findings


@pytest.mark.timeout(300)
def test_a_thousand_malformed_entries_delay_good_tasks_and_lose_none(tmp_path: Path) -> None:
    withstands(tmp_path, 1_000, 4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nor_do_ten_thousand(tmp_path: Path) -> None:
    withstands(tmp_path, 10_000, 40)
