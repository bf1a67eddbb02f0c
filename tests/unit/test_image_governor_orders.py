"""The governor of pulls, whatever happens to it in whatever order, with hours in a moment."""

from __future__ import annotations

import anyio
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.errors import (
    BackendError,
    BackendUnreachable,
    ImageNotFound,
    ImagePullFailed,
    NoCapacity,
    RegistryThrottled,
)
from tests.support import virtual_time
from tests.unit.pulling import Governed, Waiters, a_task, governed, settled

IMAGES = st.sampled_from([f"{registry}.test/{name}:1" for registry in ("one", "two") for name in "abc"])
ERRORS: st.SearchStrategy[BackendError | None] = st.sampled_from(
    [
        None,
        ImagePullFailed("reset"),
        RegistryThrottled("429"),
        RegistryThrottled("429", retry_after=5.0),
        ImageNotFound("404"),
        NoCapacity("disk full"),
        BackendUnreachable("away"),
    ]
)
STEPS = st.one_of(
    st.tuples(st.just("want"), IMAGES),
    st.tuples(st.just("leave"), st.integers(0, 30)),
    st.tuples(st.just("leave and want"), st.integers(0, 30), IMAGES),
    st.tuples(st.just("ahead"), IMAGES),
    st.tuples(st.just("end"), st.integers(0, 5), ERRORS),
    st.tuples(st.just("remove"), IMAGES),
    st.tuples(st.just("sleep"), st.sampled_from([0.01, 1.0, 3.0, 6.0, 100.0])),
)
#: Seconds in which whatever waits must have had its turns: cool-downs and pauses have an end.
PATIENCE = 3_000.0


async def _run(steps: list[tuple[object, ...]], at_once: int, per_registry: int) -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        for n, step in enumerate(steps):
            match step:
                case ("want", str(image)):
                    await tasks.want(f"t{n}", image)
                case ("leave", int(which)) if tasks.scopes:
                    _nth(tasks.scopes, which).cancel()
                case ("leave and want", int(which), str(image)) if tasks.scopes:
                    _nth(tasks.scopes, which).cancel()
                    await tasks.want(f"t{n}", image)
                case ("ahead", str(image)):
                    await told.governor.ahead(a_task(image).reference)
                case ("end", int(which), error) if told.backend.under_way:
                    image = list(told.backend.under_way)[which % len(told.backend.under_way)]
                    told.backend.end(image, error)  # type: ignore[arg-type]
                case ("remove", str(image)):
                    told.backend.present.discard(image)
                    told.governor.forget(image)
                case ("sleep", float(seconds)):
                    await anyio.sleep(seconds)
            if n % 2:
                await settled()
                _nobody_waits_for_nothing(told)
        await _drained(told)
        assert not tasks.open, "a waiter was forgotten"
        left = {name for name, scope in tasks.scopes.items() if scope.cancel_called}
        assert {name for name, end in tasks.ends.items() if end == "cancelled"} <= left
        assert told.governor.pulls == []
        assert told.governor._line.order == []

    await governed(scenario, at_once=at_once, per_registry=per_registry)


def _nobody_waits_for_nothing(told: Governed) -> None:
    """No place is idle that somebody could have, and none is kept by a pull that nobody waits for."""
    line = told.governor._line
    for pull in line.order:
        if pull.active or pull.ahead or line.is_cooling(pull.registry):
            continue
        full = line._registry_full(line._of(pull))
        assert line.full or full, f"a place is idle that {pull.image} could have"
        kept = [p for p in line.under_way if p.ahead and not p.leaving]
        assert not [p for p in kept if p.registry == pull.registry or not full]


async def _drained(told: Governed) -> None:
    """Let every pull that there is come through."""
    with anyio.fail_after(PATIENCE):
        while told.governor.pulls:
            await settled()
            _nobody_waits_for_nothing(told)
            for image in list(told.backend.under_way):
                told.backend.end(image)
            await anyio.sleep(1.0)


def _nth(scopes: dict[str, anyio.CancelScope], n: int) -> anyio.CancelScope:
    return list(scopes.values())[n % len(scopes)]


@given(st.lists(STEPS, max_size=40), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_never_too_many_never_two_of_one_and_nobody_forgotten(
    steps: list[tuple[object, ...]], at_once: int, per_registry: int
) -> None:
    virtual_time.run(_run(steps, at_once, per_registry))
