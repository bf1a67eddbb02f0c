"""What the operator allows, and what a task gets that asks for nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dispatcher.errors import RejectedTask
from dispatcher.settings import Settings
from dispatcher.task import Task


@dataclass(frozen=True, slots=True)
class Grant:
    """What a task runs with, after the operator's defaults. Seconds, bytes, processors."""

    timeout: float
    network: str
    cpus: float | None
    memory: int | None
    pids: int | None


@dataclass(frozen=True, slots=True)
class Policy:
    """Ceilings, networks and defaults."""

    default_timeout: float = 3_600.0
    max_timeout: float = 86_400.0
    default_network: str = "bridge"
    allowed_networks: frozenset[str] = frozenset({"none", "bridge"})
    max_cpus: float | None = None
    max_memory: int | None = None
    default_memory: int | None = None
    security_profile: Literal["baseline", "restricted"] = "baseline"

    @classmethod
    def of(cls, settings: Settings) -> Policy:
        """The policy that the settings describe."""
        return cls(
            default_timeout=settings.task_default_timeout,
            max_timeout=settings.task_max_timeout,
            default_network=settings.default_network,
            allowed_networks=frozenset(settings.allowed_networks),
            max_cpus=settings.task_max_cpus,
            max_memory=settings.task_max_memory,
            default_memory=settings.task_default_memory,
            security_profile=settings.security_profile,
        )

    def grant(self, task: Task, *, checked: bool = True) -> Grant:
        """What ``task`` runs with.

        Raises RejectedTask, if it is to be checked, naming the field that asks for more than is
        allowed, and what is.
        """
        if checked:
            self._check(task)
        asked = task.resources
        return Grant(
            timeout=task.timeout or min(self.default_timeout, self.max_timeout),
            network=task.network or self.default_network,
            # A ceiling binds a task that asks for nothing as well.
            cpus=asked.cpus or self.max_cpus,
            memory=asked.memory or self.default_memory or self.max_memory,
            pids=asked.pids,
        )

    def _check(self, task: Task) -> None:
        if task.timeout is not None and task.timeout > self.max_timeout:
            raise RejectedTask(
                f"at most {self.max_timeout:g} s are allowed (TASK_MAX_TIMEOUT)", field="timeout"
            )
        # The operator's own default needs no entry in the list of what tasks may ask for.
        if task.network not in {None, self.default_network, "none", *self.allowed_networks}:
            allowed = ", ".join(sorted({"none", self.default_network, *self.allowed_networks}))
            raise RejectedTask(
                f"{task.network!r} is not allowed; allowed: {allowed} (ALLOWED_NETWORKS)", field="network"
            )
        asked = task.resources
        if self.max_cpus is not None and (asked.cpus or 0) > self.max_cpus:
            raise RejectedTask(
                f"at most {self.max_cpus:g} are allowed (TASK_MAX_CPUS)", field="resources.cpus"
            )
        if self.max_memory is not None and (asked.memory or 0) > self.max_memory:
            raise RejectedTask(
                f"at most {self.max_memory} bytes are allowed (TASK_MAX_MEMORY)", field="resources.memory"
            )
