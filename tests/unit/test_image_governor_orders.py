"""The governor of pulls, whatever happens to it in whatever order."""

from __future__ import annotations

import asyncio

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.errors import (
    BackendError,
    BackendUnreachable,
    ImageNotFound,
    ImagePullFailed,
    RegistryThrottled,
)
from tests.unit.pulling import Governed, Waiters, a_task, governed, no_pauses, settled

A, B, C = (f"one.test/{name}:1" for name in "abc")
X, Y = "two.test/x:1", "two.test/y:1"

IMAGES = st.sampled_from([A, B, C, X, Y])
ERRORS: st.SearchStrategy[BackendError | None] = st.sampled_from(
    [
        None,
        ImagePullFailed("reset"),
        RegistryThrottled("429"),
        RegistryThrottled("429", retry_after=0.0),
        ImageNotFound("404"),
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
)


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
            if n % 2:
                await settled()
        await _drained(told)
        assert not tasks.open, "a waiter was forgotten"
        left = {name for name, scope in tasks.scopes.items() if scope.cancel_called}
        assert {name for name, end in tasks.ends.items() if end == "cancelled"} <= left
        assert told.governor.pulls == []
        assert told.governor._line.order == []

    await governed(scenario, at_once=at_once, per_registry=per_registry)


async def _drained(told: Governed) -> None:
    """Let every pull that there is come through."""
    with anyio.fail_after(30):
        while True:
            await settled()
            if not told.governor.pulls:
                return
            for image in list(told.backend.under_way):
                told.backend.end(image)


def _nth(scopes: dict[str, anyio.CancelScope], n: int) -> anyio.CancelScope:
    return list(scopes.values())[n % len(scopes)]


@given(st.lists(STEPS, max_size=40), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_never_too_many_never_two_of_one_and_nobody_forgotten(
    steps: list[tuple[object, ...]], at_once: int, per_registry: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        no_pauses(patch.setattr)
        asyncio.run(_run(steps, at_once, per_registry))
