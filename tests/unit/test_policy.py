"""What an operator allows, and what a task gets that asks for nothing."""

from __future__ import annotations

from typing import Any

import pytest

from dispatcher.errors import RejectedTask
from dispatcher.model import Reason
from dispatcher.policy import Grant, Policy
from dispatcher.settings import Settings
from dispatcher.task import Resources, Task

OPEN = Policy()
TIGHT = Policy(
    default_timeout=60,
    max_timeout=100,
    default_network="inner",
    allowed_networks=frozenset({"bridge"}),
    max_cpus=2,
    max_memory=1_000,
    default_memory=500,
)


def grant(policy: Policy, **fields: Any) -> Grant:
    resources = {name: fields.pop(name) for name in ("cpus", "memory", "pids") if name in fields}
    return policy.grant(Task(image="busybox", resources=Resources(**resources), **fields))


def test_a_task_that_asks_for_nothing_gets_the_defaults() -> None:
    assert grant(OPEN) == Grant(3_600, "bridge", None, None, None)
    assert grant(TIGHT) == Grant(60, "inner", 2, 500, None)


def test_a_task_gets_what_it_asks_for_within_the_ceilings() -> None:
    asked = grant(TIGHT, timeout=100.0, network="bridge", cpus=2.0, memory=1_000, pids=9)
    assert asked == Grant(100, "bridge", 2, 1_000, 9)


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"timeout": 100.1}, "timeout", "100 s are allowed (TASK_MAX_TIMEOUT)"),
        ({"network": "host"}, "network", "allowed: bridge, inner, none (ALLOWED_NETWORKS)"),
        ({"cpus": 2.5}, "resources.cpus", "2 are allowed (TASK_MAX_CPUS)"),
        ({"memory": 1_001}, "resources.memory", "1000 bytes are allowed (TASK_MAX_MEMORY)"),
    ],
)
def test_more_than_that_is_rejected_with_the_field_and_the_ceiling(
    fields: dict[str, Any], field: str, says: str
) -> None:
    with pytest.raises(RejectedTask) as rejected:
        grant(TIGHT, **fields)
    assert rejected.value.field == field
    assert says in str(rejected.value)
    assert rejected.value.reason is Reason.REJECTED
    assert not rejected.value.recoverable


def test_what_runs_already_is_not_checked_again() -> None:
    asked = Resources(cpus=2.5, memory=1_001, pids=9)
    task = Task(image="busybox", timeout=100.1, network="host", resources=asked)
    with pytest.raises(RejectedTask):
        TIGHT.grant(task)
    assert TIGHT.grant(task, checked=False) == Grant(100.1, "host", 2.5, 1_001, 9)
    assert TIGHT.grant(Task(image="busybox"), checked=False) == grant(TIGHT)


@pytest.mark.parametrize("network", ["none", "inner", "bridge"])
def test_no_network_and_the_default_may_always_be_asked_for(network: str) -> None:
    assert grant(TIGHT, network=network).network == network


def test_a_ceiling_binds_a_task_that_asks_for_nothing() -> None:
    policy = Policy(default_timeout=50, max_timeout=20, max_cpus=1.5, max_memory=100)
    assert grant(policy) == Grant(20, "bridge", 1.5, 100, None)


def test_the_policy_is_what_the_settings_say() -> None:
    settings = Settings(
        task_default_timeout=60,
        task_max_timeout=100,
        default_network="inner",
        allowed_networks=("bridge",),
        task_max_cpus=2,
        task_max_memory=1_000,
        task_default_memory=500,
        security_profile="restricted",
    )
    policy = Policy.of(settings)
    assert policy.security_profile == "restricted"
    assert grant(policy) == grant(TIGHT)
