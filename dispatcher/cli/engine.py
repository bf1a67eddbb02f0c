"""Which backend a machine nobody has set up can use."""

from __future__ import annotations

from dataclasses import dataclass

import anyio

from dispatcher.backends import load_backend
from dispatcher.cli.exits import leaves
from dispatcher.errors import BackendError, ConfigurationError
from dispatcher.settings import Settings


@dataclass(frozen=True, slots=True)
class Engine:
    """What was found of Docker."""

    #: Why it can't be used here, as a sentence; '' if it can.
    problem: str = ""
    #: Whether the image that was asked for must be pulled first.
    cold: bool = False


async def survey(settings: Settings, image: str | None = None) -> Engine:
    """Look whether Docker answers, and has ``image`` or can get it."""
    found = Engine()
    try:
        backend = load_backend(settings.model_copy(update={"backend": "docker"}), allow_process=False)
        async with anyio.create_task_group() as group:
            await group.start(backend.run, name="backend")
            if image is not None and not await backend.image_id(image):
                obtainable = await backend.image_obtainable(image)
                problem = f"Docker has no image {image} and no registry gives it" if not obtainable else ""
                found = Engine(problem, cold=obtainable)
            group.cancel_scope.cancel()
    except (ExceptionGroup, BackendError, ConfigurationError) as error:
        cause = next(leaves(error))
        if not isinstance(cause, BackendError | ConfigurationError):
            raise
        return Engine(str(cause))
    return found
