"""What an attempt's end means."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.dispatch.outcome import (
    INFRA_BACKOFF,
    judge,
    judge_error,
    judge_mistake,
    of_error,
    of_exit,
    pause,
)
from dispatcher.errors import (
    BackendError,
    BackendUnreachable,
    ContainerGone,
    ImageInvalid,
    ImageNotFound,
    ImagePullFailed,
    ImageUnauthorized,
    LaunchRejected,
    NoCapacity,
    RegistryThrottled,
    StartFailed,
)
from dispatcher.model import Delivery, Exit, Outcome, Reason, State
from dispatcher.task import Backoff, Task

DELIVERY = Delivery("one", "default", "a/1/1", 1, 1, b"")
STEADY = Backoff(initial=4.0, jitter=False)


@pytest.mark.parametrize(
    ("exit_code", "oom", "cause", "seconds", "state", "reason"),
    [
        (0, False, "", 1, State.SUCCEEDED, None),
        (3, False, "", 1, State.FAILED, Reason.EXIT),
        (137, False, "", 1, State.FAILED, Reason.EXIT),
        (137, True, "", 1, State.FAILED, Reason.OOM),
        (0, True, "", 1, State.SUCCEEDED, None),
        (143, False, "timeout", 60, State.FAILED, Reason.TIMEOUT),
        (0, False, "timeout", 60, State.FAILED, Reason.TIMEOUT),
        (0, False, "timeout", 59, State.SUCCEEDED, None),
        (143, False, "timeout", 59, State.FAILED, Reason.TIMEOUT),
        (137, True, "timeout", 59, State.FAILED, Reason.TIMEOUT),
        (1, False, "timeout", -5, State.FAILED, Reason.TIMEOUT),
        (0, False, "timeout", -5, State.SUCCEEDED, None),
        (143, False, "cancel", 1, State.CANCELLED, None),
        (0, False, "cancel", 1, State.CANCELLED, None),
    ],
)
def test_an_exit_is_told_by_its_cause_and_code(
    *, exit_code: int, oom: bool, cause: str, seconds: float, state: State, reason: Reason | None
) -> None:
    outcome = of_exit(Exit(exit_code, 100.0, 100.0 + seconds, oom), cause, timeout=60)
    assert (outcome.state, outcome.reason, outcome.exit_code) == (state, reason, exit_code)
    assert (outcome.started_at, outcome.finished_at) == (100.0, 100.0 + seconds)
    assert bool(outcome.message) == (state is not State.SUCCEEDED)


@pytest.mark.parametrize("state", [State.SUCCEEDED, State.CANCELLED])
def test_what_did_not_fail_has_ended(state: State) -> None:
    verdict = judge(Outcome(state), Task(image="busybox", max_attempts=9), DELIVERY, infra_max_attempts=9)
    assert (verdict.action, verdict.budget) == ("final", "none")


@pytest.mark.parametrize("reason", [Reason.EXIT, Reason.OOM, Reason.TIMEOUT])
@pytest.mark.parametrize(("failures", "action"), [(0, "retry"), (1, "retry"), (2, "final")])
def test_application_failures_spend_the_tasks_attempts(reason: Reason, failures: int, action: str) -> None:
    task = Task(image="busybox", max_attempts=3, backoff=STEADY)
    delivery = replace(DELIVERY, app_failures=failures, infra_failures=99)
    verdict = judge(Outcome(State.FAILED, reason), task, delivery, infra_max_attempts=2)
    assert verdict.action == action
    if action == "retry":
        assert (verdict.budget, verdict.delay) == ("app", 4.0 * 2**failures)


def test_only_what_the_task_names_is_tried_again() -> None:
    task = Task(image="busybox", max_attempts=3, retry_on=["oom"])
    actions = {
        reason: judge(Outcome(State.FAILED, reason), task, DELIVERY, infra_max_attempts=1).action
        for reason in Reason
    }
    assert {reason for reason, action in actions.items() if action == "retry"} == {Reason.OOM}


@pytest.mark.parametrize("reason", [Reason.BACKEND_ERROR, Reason.LOST, Reason.IMAGE_PULL_FAILED])
def test_infrastructure_failures_have_a_budget_of_their_own(reason: Reason) -> None:
    task = Task(image="busybox", max_attempts=1)
    outcome = Outcome(State.FAILED, reason)
    delivery = replace(DELIVERY, app_failures=5)
    for failures in range(4):
        verdict = judge(outcome, task, replace(delivery, infra_failures=failures), infra_max_attempts=3)
        assert verdict.action == ("retry" if failures < 2 else "final")
        if verdict.action == "retry":
            full = INFRA_BACKOFF.initial * 2**failures
            assert verdict.budget == "infra"
            assert full / 2 <= verdict.delay <= full


@pytest.mark.parametrize("container", [False, True])
@pytest.mark.parametrize(
    ("error", "reason", "action"),
    [
        (BackendError(), Reason.BACKEND_ERROR, "retry"),
        (ContainerGone(), Reason.LOST, "retry"),
        (ImagePullFailed(), Reason.IMAGE_PULL_FAILED, "retry"),
        (RegistryThrottled(), Reason.IMAGE_PULL_FAILED, "retry"),
        (ImageInvalid(), Reason.IMAGE_PULL_FAILED, "final"),
        (BackendUnreachable(), Reason.BACKEND_ERROR, "detach"),
        (NoCapacity(), Reason.BACKEND_ERROR, "release"),
        (StartFailed(), Reason.START_FAILED, "final"),
        (LaunchRejected(), Reason.REJECTED, "final"),
        (ImageNotFound(), Reason.IMAGE_NOT_FOUND, "final"),
        (ImageUnauthorized(), Reason.IMAGE_UNAUTHORIZED, "final"),
    ],
)
def test_an_error_of_the_backend_is_judged_by_its_type(
    error: BackendError, reason: Reason, action: str, *, container: bool
) -> None:
    assert of_error(error).reason is reason
    verdict = judge_error(error, Task(image="busybox"), DELIVERY, infra_max_attempts=3, container=container)
    # Of a generic error alone nobody knows whether there is a container after it.
    assert verdict.action == ("detach" if container and type(error) is BackendError else action)
    assert verdict.budget == ("infra" if action == "retry" else "none")
    assert verdict.outcome.message == str(error)


@pytest.mark.parametrize(("error", "action"), [(NoCapacity(), "release"), (BackendUnreachable(), "detach")])
def test_an_engine_without_room_or_answer_is_no_failure_however_often(
    error: BackendError, action: str
) -> None:
    spent = replace(DELIVERY, infra_failures=99, app_failures=99)
    for container in (False, True):
        verdict = judge_error(error, Task(image="x"), spent, infra_max_attempts=3, container=container)
        assert (verdict.action, verdict.budget) == (action, "none")
        assert verdict.delay > 0


@pytest.mark.parametrize("container", [False, True])
def test_an_attempt_that_may_have_a_container_is_looked_for_within_the_budget(*, container: bool) -> None:
    for failures in range(4):
        spent = replace(DELIVERY, infra_failures=failures)
        verdict = judge_error(
            BackendError(), Task(image="x"), spent, infra_max_attempts=3, container=container
        )
        assert verdict.outcome.reason is Reason.BACKEND_ERROR
        if failures < 2:
            assert (verdict.action, verdict.budget) == ("detach" if container else "retry", "infra")
            full = INFRA_BACKOFF.initial * 2**failures
            assert full / 2 <= verdict.delay <= full
        else:
            assert (verdict.action, verdict.budget) == ("final", "none")


@pytest.mark.parametrize(("failures", "action"), [(0, "detach"), (1, "detach"), (2, "final")])
def test_a_mistake_of_ours_is_tried_again_within_the_budget(failures: int, action: str) -> None:
    spent = replace(DELIVERY, infra_failures=failures)
    verdict = judge_mistake(KeyError("secret"), spent, infra_max_attempts=3)
    assert (verdict.action, verdict.outcome.reason) == (action, Reason.BACKEND_ERROR)
    assert "KeyError" in verdict.outcome.message
    assert "secret" not in verdict.outcome.message


@given(
    st.builds(
        Backoff,
        initial=st.floats(0, 86_400),
        factor=st.floats(1, 100),
        max=st.floats(0, 604_800),
        jitter=st.booleans(),
    ),
    st.integers(1, 100_000),
)
def test_a_pause_is_never_longer_than_its_limit(backoff: Backoff, failures: int) -> None:
    assert 0 <= pause(backoff, failures) <= backoff.max


def test_pauses_grow_to_their_limit() -> None:
    backoff = Backoff(initial=1.0, factor=3.0, max=20.0, jitter=False)
    assert [pause(backoff, n) for n in range(1, 6)] == [1, 3, 9, 20, 20]
