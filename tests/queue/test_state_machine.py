"""The scripts against a plain model, in any order that hypothesis can think of.

``HYPOTHESIS_PROFILE=slow`` looks for much longer.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Coroutine
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from dispatcher.errors import InvalidTask, QueueFull, TaskConflict, TaskNotFound
from dispatcher.model import Delivery
from dispatcher.queue.exchange import Action, Limits, SourceKind
from dispatcher.queue.scripts import SOURCES
from dispatcher.queue.wire import parse_delivery
from dispatcher.task import Task
from tests.queue.conftest import FAILURE, LEASE, SUCCESS, WEIGHTS, QueueUnderTest
from tests.queue.model import (
    DAEMONS,
    FAR_FUTURE,
    KEYS,
    OFFERS,
    TRACE,
    Arrival,
    Expected,
    Model,
    arrivals,
    by_acceptance,
    picks,
    places,
    unnamed,
)
from tests.support.redis_server import RedisUnderTest

T = TypeVar("T")
EFFORT = {"default": (60, 30), "slow": (2_000, 80)}
#: Preferences last until a rule ends them, and not until Redis' clock does.
PREFER_MS = "local PREFER_MS = 2000 "


class Scripts(RuleBasedStateMachine):
    """One Redis, three instances on two daemons, and whoever submits and cancels."""

    server: ClassVar[RedisUnderTest]
    source: ClassVar[SourceKind]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.model = Model()
        self.stale: list[Delivery] = []
        self.future = FAR_FUTURE
        self.pushed = 0
        self.queue = QueueUnderTest(self.server, self.source)
        self.queue.redis.flushall()
        self.run(self.queue.tick())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def teardown(self) -> None:
        try:
            self.run(self.queue.end_all())
            self.queue.check_keys()
            ended = Counter(entry["id"].decode() for entry in self.queue.entries("results"))
            named = {task_id for task_id in self.model.tasks if not unnamed(task_id)}
            assert named <= ended.keys(), "something was lost"
            assert len(ended) == ended.total() == len(self.model.tasks), "something was lost, or ended twice"
        finally:
            self.run(self.queue.aclose())
            self.runner.close()

    # --- producers ------------------------------------------------------------------------

    @initialize(arriving=st.lists(arrivals, min_size=2, max_size=6))
    def begin_with_work(self, arriving: list[Arrival]) -> None:
        for arrival in arriving:
            self._arrive(arrival)
        self._take(4, "a", DAEMONS[0], OFFERS[0])

    @rule(arrival=arrivals)
    def arrive(self, arrival: Arrival) -> None:
        self._arrive(arrival)

    def _arrive(self, arrival: Arrival) -> None:
        stream, fields, traceparent, future = arrival
        if stream and self.source == "redis-list":
            self._lpush(json.dumps(fields), stream)
        elif stream:
            self._xadd({"task": json.dumps(fields), "traceparent": traceparent}, stream, future=future)
        else:
            self._submit(fields)

    def _submit(self, fields: dict[str, Any]) -> None:
        task = Task(**fields)
        standing = self.model.standing(task, task.id)
        try:
            task_id = self.run(self.queue.submit(**fields))
        except TaskConflict:
            assert standing is not None
            assert standing[0] == "conflict"
            return
        except QueueFull:
            assert standing is None
            assert self.model.full(task.queue)
            return
        if standing is not None:
            assert standing == ("known", task_id)
            return
        assert not self.model.full(task.queue)
        assert task.id in {None, task_id}
        place = f"due:{task.queue}" if task.delay else f"stream:{task.queue}"
        self.model.tasks[task_id] = Expected(place, task.queue, task.digest())
        if task.idempotency_key:
            self.model.keys[task.idempotency_key] = task_id

    def _xadd(self, fields: dict[str, str], stream: str, *, future: bool = False) -> None:
        self.future += future
        entry = f"{self.future}-1" if future else "*"
        task_id = self.queue.xadd(fields, stream, entry)
        traceparent = fields.get("traceparent", "")
        self.model.tasks[task_id] = Expected(
            f"stream:{stream}",
            stream,
            entry=task_id.split(".")[1],
            traceparent=traceparent if len(traceparent) == len(TRACE) else "",
            forged="ref" in fields,
        )

    def _lpush(self, element: str, stream: str, *, forged: bool = False) -> None:
        self.pushed += 1
        self.queue.push(element, queue=stream)
        self.model.tasks[f"?{self.pushed}"] = Expected(
            f"stream:{stream}", stream, entry=element, forged=forged
        )

    @rule(pick=picks, stream=st.sampled_from(list(WEIGHTS)))
    def refer(self, pick: int, stream: str) -> None:
        """Somebody else's entry looks like one of ours, whatever became of the task it names."""
        names = [*self.model.tasks, *self.model.aliases, "nobody"]
        name = names[pick % len(names)]
        if self.source == "redis-list":
            self._lpush(f"\1{pick}-{pick} {name}", stream, forged=True)
        else:
            self._xadd({"ref": name}, stream)

    # --- instances --------------------------------------------------------------------------

    @rule(
        n=st.sampled_from([1, 2, 3, 10]),
        instance=st.sampled_from("abc"),
        daemon=st.sampled_from(DAEMONS),
        weights=st.sampled_from(OFFERS),
    )
    def take(self, n: int, instance: str, daemon: str, weights: dict[str, int]) -> None:
        self._take(n, instance, daemon, weights)

    def _take(self, n: int, instance: str, daemon: str, weights: dict[str, int]) -> None:
        model = self.model
        served = [name for name in weights if name not in model.paused]
        inbox = by_acceptance(self.queue, self.model, f"inbox:{daemon}")
        # In its own queue what came back goes first, but for what is kept for another daemon.
        waiting = {
            name: [
                task_id
                for task_id in by_acceptance(self.queue, self.model, f"ready:{name}")
                if model.tasks[task_id].prefers in {"", daemon}
            ]
            + model.at(f"stream:{name}")
            for name in served
        }
        there = len(inbox) + sum(map(len, waiting.values()))
        taken = self.run(self.queue.take(n, instance, queues=weights, daemon=daemon))
        assert len(taken) == min(n, there)
        assert [d.task_id for d in taken[: len(inbox)]] == inbox[:n]
        for delivery in taken[len(inbox) :]:
            first = waiting[delivery.queue].pop(0)
            if unnamed(first):
                model.name(first, delivery)
                continue
            assert delivery.task_id == first, "a queue is taken from its beginning"
        if any(weights[name] for name in served if waiting[name]):
            idle = {d.queue for d in taken[len(inbox) :] if not weights[d.queue]}
            assert not idle, "a queue of weight 0 came before another"
        now = self.queue.now_ms()
        for delivery in taken:
            assert delivery.fence > model.fence
            model.fence = delivery.fence
            task = model.tasks[delivery.task_id]
            assert delivery.accepted_ms <= now, "it was accepted in the future"
            assert delivery.traceparent == task.traceparent
            assert (delivery.attempt, delivery.daemon) == (task.attempt, task.daemon)
            assert delivery.cancelled == task.cancelled
            task.place, task.delivery, task.prefers = "lease", delivery, ""
            assert not self.queue.record(delivery.task_id).keys() & {"prefers", "prefers_until"}
        for delivery in taken:
            if delivery.fields is not None:
                self._place(delivery)

    def _place(self, delivery: Delivery) -> None:
        if self.model.tasks[delivery.task_id].forged:
            with pytest.raises(InvalidTask):
                parse_delivery(delivery, max_bytes=65_536)
            return
        task = parse_delivery(delivery, max_bytes=65_536)
        if "queue" not in task.model_fields_set:
            task = task.model_copy(update={"queue": delivery.queue})
        if not (task.id or task.idempotency_key or task.delay or task.queue != delivery.queue):
            return
        model = self.model
        standing = model.standing(task, task.id, held=delivery.task_id)
        verdict, task_id = self.run(self.queue.store.place(delivery, task))
        if standing is not None:
            assert (verdict, task_id) == standing
            if verdict == "known":
                model.aliases[delivery.task_id] = task_id
                del model.tasks[delivery.task_id]
                self.stale.append(delivery)
            return
        placed = model.tasks.pop(delivery.task_id)
        assert task_id == (task.id or delivery.task_id)
        placed.queue, placed.digest = task.queue, task.digest()
        model.tasks[task_id] = placed
        if task.idempotency_key:
            model.keys[task.idempotency_key] = task_id
        if task.delay or task.queue != delivery.queue:
            assert verdict == "moved"
            waits = f"due:{task.queue}" if task.delay else f"stream:{task.queue}"
            placed.place = "ended" if placed.cancelled else waits
            placed.delivery = None
            self.stale.append(delivery)
        else:
            assert verdict == "held"
            placed.delivery = Delivery(
                task_id, task.queue, delivery.owner, delivery.fence, delivery.attempt, delivery.document
            )

    @rule(
        pick=picks,
        container=st.sampled_from(["", *DAEMONS]),
        action=st.sampled_from([None, "final", "retry", "release", "detach"]),
        delay=st.sampled_from([0.0, 0.0, 30.0]),
        prefer=st.sampled_from(["", *DAEMONS]),
        repeated=st.booleans(),
    )
    def work(
        self, *, pick: int, container: str, action: Action | None, delay: float, prefer: str, repeated: bool
    ) -> None:
        if not self.model.held:
            return
        task = self.model.held[pick % len(self.model.held)]
        self._renew(task, container)
        if action:
            self._finish(task, action, delay, prefer, repeated=repeated)

    def _renew(self, task: Expected, container: str) -> None:
        assert task.delivery
        fields = {"state": "running", "daemon": container} if container and not task.daemon else {}
        answer = self.run(self.queue.renew(task.delivery, **fields))
        assert answer == ("cancel" if task.cancelled else "ok")
        task.daemon = fields.get("daemon", task.daemon)

    def _finish(self, task: Expected, action: Action, delay: float, prefer: str, *, repeated: bool) -> None:
        delivery = task.delivery
        assert delivery
        outcome = SUCCESS if action == "final" else FAILURE
        for _ in range(1 + repeated):
            answer = self.run(self.queue.finish(delivery, action, outcome, delay=delay, prefer=prefer))
            assert answer == "ok"
        self.stale.append(delivery)
        if action == "final" or (task.cancelled and action in {"retry", "release"}):
            task.place, task.delivery = "ended", None
            state = "succeeded" if action == "final" else "cancelled"
            assert self.queue.record(delivery.task_id)["state"] == state
            return
        task.attempt += action == "retry"
        if action != "detach":
            task.daemon = ""
        if delay:
            task.place, task.delivery = f"due:{task.queue}", None
        else:
            self.model.put_back(task)
            task.prefers = prefer if action == "release" else ""

    @rule()
    def preferences_pass(self) -> None:
        self.queue.preferences_pass()
        for task in self.model.tasks.values():
            task.prefers = ""

    @rule(pick=picks, action=st.sampled_from(["final", "retry", "release", "detach"]))
    def write_of_a_former_owner(self, pick: int, action: Action) -> None:
        if not self.stale:
            return
        delivery = self.stale[pick % len(self.stale)]
        before = self.queue.record(delivery.task_id)
        assert self.run(self.queue.renew(delivery, state="running", attempt="99")) == "lost"
        answer = self.run(self.queue.finish(delivery, action))
        assert answer == ("ok" if before.get("settled") == delivery.owner else "lost")
        assert self.queue.record(delivery.task_id) == before

    # --- everybody --------------------------------------------------------------------------

    @rule(pick=picks, lapse=st.booleans(), fall_due=st.booleans())
    def tick(self, pick: int, lapse: bool, fall_due: bool) -> None:
        lapsed = [t for i, t in enumerate(self.model.held) if lapse and pick >> i % 7 & 1]
        self.queue.lapse(*[t.delivery for t in lapsed if t.delivery])
        due = [task for task in self.model.tasks.values() if fall_due and task.place.startswith("due:")]
        if fall_due:
            self.queue.fall_due()
        self.queue.forget_gaps()
        tick = self.run(self.queue.tick(limits=Limits(max_length=self.model.max_length)))
        assert (tick.taken_over, tick.promoted) == (len(lapsed), len(due))
        self.stale += [t.delivery for t in lapsed if t.delivery]
        for task in lapsed:
            if task.cancelled and not task.daemon:  # nothing of it runs any more
                task.place, task.delivery = "ended", None
            else:
                self.model.put_back(task)
        for task in due:
            self.model.put_back(task)

    @rule(pick=picks)
    def somebody_deletes_a_key(self, pick: int) -> None:
        """Whatever waited there and has a record comes back by an audit."""
        places = [f"{kind}:{name}" for kind in ("stream", "ready", "due") for name in WEIGHTS]
        places += [f"inbox:{daemon}" for daemon in DAEMONS]
        place = places[pick % len(places)]
        kind, _, name = place.partition(":")
        queue, model = self.queue, self.model
        queue.redis.delete(queue.stream(name) if kind == "stream" else queue.key(KEYS.get(kind, "") + place))
        gone = self.model.at(place)
        unknown = [i for i in gone if kind == "stream" and model.tasks[i].entry and not model.tasks[i].digest]
        for task_id in unknown:
            del model.tasks[task_id]
        while not (audited := self.run(queue.store.audit(LEASE))).done:
            pass
        assert (audited.put_back, audited.vanished) == (len(gone) - len(unknown), ())
        for task_id in set(gone) - set(unknown):
            if kind == "stream":
                model.put_back(model.tasks[task_id])
        self.tick(0, lapse=False, fall_due=False)  # which makes the group again

    @rule(pick=picks)
    def cancel(self, pick: int) -> None:
        names = [*self.model.tasks, *self.model.aliases]
        if not names:
            return
        name = names[pick % len(names)]
        task = self.model.tasks[self.model.aliases.get(name, name)]
        if unnamed(name) or (task.forged and task.place.startswith("stream:")):
            with pytest.raises(TaskNotFound):
                self.run(self.queue.store.cancel(name))
            return
        verdict, _ = self.run(self.queue.store.cancel(name))
        if task.place == "ended":
            assert verdict == "ended"
        elif task.place == "lease" or task.daemon:
            assert verdict == "requested"
            task.cancelled = True
        else:
            assert verdict == "cancelled"
            task.place = "ended"

    @rule(name=st.sampled_from(list(WEIGHTS)), paused=st.booleans())
    def pause(self, name: str, paused: bool) -> None:
        self.run(self.queue.store.pause(name, paused=paused))
        (self.model.paused.add if paused else self.model.paused.discard)(name)

    @rule(max_length=st.sampled_from([0, 3]))
    def limit(self, max_length: int) -> None:
        self.model.max_length = max_length
        self.tick(0, lapse=False, fall_due=False)

    # --- what always holds --------------------------------------------------------------------

    @invariant()
    def every_task_has_exactly_one_place(self) -> None:
        expected = Counter((i, t.place) for i, t in self.model.tasks.items())
        assert Counter(places(self.queue, self.model)) == expected
        assert self.queue.members("index:open").keys() == self.model.opened

    @invariant()
    def nothing_is_pending_in_a_group(self) -> None:
        for name in WEIGHTS if self.source == "redis-stream" else ():
            assert self.queue.ask("XPENDING", self.queue.stream(name), self.queue.store.group)["pending"] == 0


@pytest.mark.timeout(900)  # what is found is made small before it is told
@pytest.mark.parametrize("kind", ["redis-stream", "redis-list"])
def test_every_task_has_one_place_and_one_end_whatever_happens(
    redis_server: RedisUnderTest, kind: SourceKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("finish", "take"):
        assert PREFER_MS in SOURCES[name]
        lasting = SOURCES[name].replace(PREFER_MS, "local PREFER_MS = 3600000 ")
        monkeypatch.setitem(SOURCES, name, lasting)
    examples, steps = EFFORT.get(os.environ.get("HYPOTHESIS_PROFILE", ""), EFFORT["default"])

    class Here(Scripts):
        server = redis_server
        source = kind

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
