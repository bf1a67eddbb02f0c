"""Where containers run. Each backend is the only module that imports its client library."""

from __future__ import annotations

from dispatcher.backends.base import Backend
from dispatcher.errors import ConfigurationError
from dispatcher.settings import Settings


def load_backend(settings: Settings, *, allow_process: bool) -> Backend:
    """The backend that ``settings`` name. Contacts nothing yet; imports only what that one needs.

    Raises ConfigurationError for one that may not be used here.
    """
    if settings.backend == "docker":
        from dispatcher.backends.docker import DockerBackend

        return DockerBackend(
            base_url=settings.docker_host,
            max_pulls=settings.max_concurrent_pulls,
            platform=settings.docker_default_platform,
            control_threads=min(settings.num_consumers + 2, 32),
        )
    if not (allow_process or settings.allow_process_backend):
        raise ConfigurationError(
            ["BACKEND: 'process' isolates nothing; it needs ALLOW_PROCESS_BACKEND=true here"]
        )
    from dispatcher.backends.process import ProcessBackend

    return ProcessBackend(settings.process_directory)
