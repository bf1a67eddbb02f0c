"""Where the world's tasks run, and how it is seen from outside what was started and what is left."""

from __future__ import annotations

import contextlib
import itertools
import random
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import Any

import docker.errors

from dispatcher.backends.process_directory import REMOVED
from dispatcher.client import Task
from dispatcher.failpoints import POINTS
from tests.chaos.truth import Launch, Ledger, launches_of
from tests.cli.conftest import end_tasks_in
from tests.support.engine import EngineUnderTest


class Ground(contextlib.ExitStack, ABC):
    """A backend, as one world uses it; a context that ends all that its tasks still run."""

    name: str
    #: Failpoints that a task of this backend comes by. A stop is come by only now and then.
    points: tuple[str, ...]

    @abstractmethod
    def environment(self) -> dict[str, str]:
        """Settings of an instance."""

    @abstractmethod
    def task(self, script: str, **fields: Any) -> Task:
        """A task that runs a shell script."""

    @abstractmethod
    def starts(self, namespace: str) -> Counter[Launch]:
        """How often each (task, attempt) was started."""

    @abstractmethod
    def left(self, namespace: str) -> list[str]:
        """What is still there of attempts: containers, directories."""


class ProcessGround(Ground):
    """The process backend: one directory, which makes it one daemon for all instances."""

    name = "process"
    points = tuple(point for point in POINTS if point not in {"during_pull", "before_stop"})

    def __init__(self, home: Path) -> None:
        super().__init__()
        self.directory = home / "process"
        self.ledger = Ledger(home / "ledger")
        self.callback(end_tasks_in, home)

    def environment(self) -> dict[str, str]:
        """See ``Ground.environment``."""
        return {
            "BACKEND": "process",
            "ALLOW_PROCESS_BACKEND": "true",
            "PROCESS_DIRECTORY": str(self.directory),
        }

    def task(self, script: str, **fields: Any) -> Task:
        """See ``Ground.task``."""
        return Task(image="busybox", command=["/bin/sh", "-c", self.ledger.script(script)], **fields)

    def starts(self, namespace: str) -> Counter[Launch]:
        """See ``Ground.starts``: by the programs' own word, so of one namespace or another."""
        return self.ledger.starts()

    def left(self, namespace: str) -> list[str]:
        """See ``Ground.left``. One that is marked as removed counts as absent (process_directory):
        its remover was killed half-way, and the next start of any instance clears it away."""
        attempts = self.directory.glob("attempts/*/*")
        return [path.name for path in attempts if not (path / REMOVED).exists()]


class DockerGround(Ground):
    """A real engine. Other tests may use it at the same time: only one namespace is looked at."""

    name = "docker"
    points = tuple(point for point in POINTS if point != "before_stop")

    def __init__(self, engine: EngineUnderTest) -> None:
        super().__init__()
        self.engine = engine
        self._containers = self.enter_context(engine.counting_starts("dispatcher-"))
        self._namespaces: set[str] = set()
        self._references: list[str] = []
        self._numbers = itertools.count(random.SystemRandom().randrange(10**9))
        self.callback(self._clear)

    def environment(self) -> dict[str, str]:
        """See ``Ground.environment``."""
        return {
            "BACKEND": "docker",
            "DOCKER_HOST": self.engine.base_url,
            "DEFAULT_NETWORK": self.engine.network,
        }

    def task(self, script: str, **fields: Any) -> Task:
        """See ``Ground.task``."""
        given = {"image": self.engine.image, **fields}
        return Task(command=["sh", "-c", script], **given)

    def starts(self, namespace: str) -> Counter[Launch]:
        """See ``Ground.starts``: by the engine's events as they came."""
        self._namespaces.add(namespace)
        return launches_of(self._containers, namespace)

    def left(self, namespace: str) -> list[str]:
        """See ``Ground.left``."""
        self._namespaces.add(namespace)
        return [container["Names"][0].lstrip("/") for container in self._present(namespace)]

    def absent_image(self) -> str:
        """The reference of an image that is not here, and that nobody can pull yet."""
        reference = f"127.0.0.1:9/chaos-{next(self._numbers)}:1"
        self._references.append(reference)
        return reference

    def provide(self, reference: str) -> None:
        """Let the image be here."""
        repository, _, tag = reference.rpartition(":")
        self.engine.client.tag(self.engine.image, repository, tag)

    def _present(self, namespace: str) -> Any:
        return self.engine.client.containers(all=True, filters={"label": f"dispatcher.namespace={namespace}"})

    def _clear(self) -> None:
        for namespace in filter(None, self._namespaces):
            for container in self._present(namespace):
                with contextlib.suppress(docker.errors.APIError):  # it is being removed already
                    self.engine.client.remove_container(container["Id"], force=True, v=True)
        for reference in self._references:
            with contextlib.suppress(docker.errors.APIError):  # it was never provided
                self.engine.client.remove_image(reference)
