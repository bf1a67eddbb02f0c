"""The checker finds what is planted: by data of its own, and in a world that was tampered with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.checker import Account, Findings, check
from tests.chaos.ground import ProcessGround
from tests.chaos.truth import BASE, Result, launches_of
from tests.chaos.world import World

GOOD = Account(
    accepted={"a", "b"},
    maybe={"m"},
    endings={"a": {"succeeded"}, "b": {"failed:exit:3"}},
    results=[Result("a", "succeeded", "", "0", 1), Result("b", "failed", "exit", "3", 2)],
    starts={("a", 1): 1, ("b", 1): 1, ("b", 2): 1},
)
EXTRA = Result("a", "succeeded", "", "0", 1)


def test_all_is_well() -> None:
    assert check(GOOD) == Findings()
    assert check(GOOD).broken(strict_leftovers=True) == {}


@pytest.mark.parametrize(
    ("changes", "name", "found"),
    [
        ({"accepted": {"a", "b", "c"}}, "lost", ("c",)),
        ({"results": GOOD.results[1:]}, "lost", ("a",)),
        ({"starts": {**GOOD.starts, ("m", 1): 1}}, "lost", ("m",)),
        ({"starts": {**GOOD.starts, ("a", 1): 2}}, "duplicated", (("a", 1),)),
        ({"results": [*GOOD.results, EXTRA]}, "doubled", ("a",)),
        ({"results": [*GOOD.results, replace(EXTRA, task_id="z")]}, "unknown", ("z",)),
        ({"starts": {**GOOD.starts, ("a", 2): 1}}, "outlived", (("a", 2),)),
        ({"endings": {"b": {"failed:exit:4"}}}, "wrong", ("b: failed:exit:3",)),
        ({"results": [replace(EXTRA, state="cancelled"), GOOD.results[1]]}, "wrong", ("a: cancelled",)),
        ({"waiting": {"index:open": 1}}, "waiting", ("index:open: 1",)),
        ({"left": ["a.1"]}, "left", ("a.1",)),
        ({"lies": ["two of one key"]}, "lies", ("two of one key",)),
    ],
)
def test_what_is_planted_is_found(changes: dict[str, object], name: str, found: tuple[object, ...]) -> None:
    findings = check(replace(GOOD, **changes))  # type: ignore[arg-type]
    assert findings.broken(strict_leftovers=True) == {name: found}


def test_a_lost_reply_allows_one_result_and_asks_for_none() -> None:
    assert not check(replace(GOOD, results=[*GOOD.results, replace(EXTRA, task_id="m")])).broken()
    assert not check(
        replace(GOOD, results=[*GOOD.results, replace(EXTRA, task_id="default.1-0")], anonymous=1)
    ).broken()


def test_what_was_cancelled_may_also_have_ended() -> None:
    results = [replace(EXTRA, state="cancelled"), GOOD.results[1]]
    assert not check(replace(GOOD, results=results, cancelled={"a", "b"})).broken()


def test_an_engines_names_are_read_back() -> None:
    names = {"dispatcher-01234567-my-task-12": 2, "dispatcher-76543210-other-1": 1}
    assert launches_of(names, "0123456789") == {("my-task", 12): 2}


@pytest.mark.timeout(120)
def test_a_world_that_was_tampered_with_is_found_out(tmp_path: Path) -> None:
    with World(tmp_path, ground := ProcessGround(tmp_path)) as world:
        member = world.member("a")
        fine = [world.submit("exit 0"), world.xadd("exit 3", endings={"failed:exit:3"})]
        twice, unanswered, wrong = world.submit("exit 0"), world.submit("exit 0"), world.submit("exit 1")
        assert not world.settled()
        honest = world.truth()
        assert set(check(honest).broken(strict_leftovers=False)) == {"wrong"}
        assert set(honest.starts) == {(task_id, 1) for task_id in (*fine, twice, unanswered, wrong)}
        # What is in nobody's hands yet and deleted from Redis is gone for good.
        member.stop()
        gone = world.submit("exit 0", delay=0.1)
        world.server.command("ZREM", f"{BASE}index:due:default", gone)
        world.server.command("DEL", f"{BASE}task:{gone}")
        world.heal()
        assert gone in world.settled(timeout=1)
        world.drain()
        with world.server.client() as client:
            entries = client.xrange(f"{BASE}results")
            by_id = {fields[b"id"].decode(): (entry, fields) for entry, fields in entries}
            client.xdel(f"{BASE}results", by_id[unanswered][0])
            client.xadd(f"{BASE}results", by_id[twice][1])
            client.zadd(f"{BASE}index:leases", {fine[0]: 1})
        ground.ledger.plant((fine[0], 1))
        (ground.directory / "attempts" / "namespace" / "stale.1").mkdir(parents=True)
        findings = check(world.truth())
    assert set(findings.lost) == {gone, unanswered}
    assert findings.duplicated == ((fine[0], 1),)
    assert findings.doubled == (twice,)
    assert findings.wrong == (f"{wrong}: failed:exit:1",)
    assert f"{BASE}index:leases: 1" in findings.waiting
    assert findings.left == ("stale.1",)
