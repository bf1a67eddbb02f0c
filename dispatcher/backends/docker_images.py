"""The images of a Docker engine: looked for, pulled, measured, removed."""

from __future__ import annotations

from functools import partial
from typing import Any

import anyio
import structlog
from anyio import CapacityLimiter
from docker import APIClient
from docker.errors import APIError, NotFound
from docker.utils import version_lt

from dispatcher.backends.base import OnProgress
from dispatcher.backends.docker_client import CuttableSession, Engine, in_cuttable_thread
from dispatcher.backends.docker_credentials import Credentials
from dispatcher.backends.docker_errors import explanation, is_conflict, sort_pull, unanswered
from dispatcher.backends.docker_registry import ask, manifest_url
from dispatcher.backends.docker_spec import engine_name, fits_platform, layers_size
from dispatcher.backends.docker_streams import pull
from dispatcher.errors import BackendError, ImageNotFound, ImagePullFailed, RegistryThrottled
from dispatcher.reference import ImageReference

log = structlog.get_logger(__name__)

#: Seconds in which a registry must say whether it has an image.
OBTAINABLE_TIMEOUT = 15.0
#: Seconds for an engine to add up its images; it may have to look at each file of each layer.
SIZE_TIMEOUT = 60.0
#: Seconds to find out how long a registry wants to be left alone, and registries asked at a time.
ASK_TIMEOUT = 5.0
ASKED_AT_ONCE = 2
#: Seconds for such a question to end when it is given up; the thread of one that does not is left.
ASK_PATIENCE = 0.5
#: The API of Docker 23, since which the sizes of images alone can be asked for.
_SIZES_APART = "1.42"


class Images:
    """The images of one engine."""

    def __init__(self, engine: Engine, *, platform: str | None, max_pulls: int) -> None:
        """``platform``: the one wanted, as ``os/arch[/variant]``; None for the engine's own."""
        self._engine = engine
        self._platform = platform
        self._credentials = Credentials(at_once=max_pulls)
        self._asking = CapacityLimiter(ASKED_AT_ONCE)

    async def image_id(self, image: str) -> str:
        """See ``Backend.image_id``."""
        found = await self._inspect(image)
        return str(found["Id"]) if found and fits_platform(found, self._platform) else ""

    async def _inspect(self, image: str) -> dict[str, Any] | None:
        try:
            inspect = partial(APIClient.inspect_image, image=engine_name(image))
            return dict(await self._engine.call(inspect))
        except ImageNotFound:
            return None

    async def obtainable(self, image: str) -> bool:
        """See ``Backend.image_obtainable``."""
        with anyio.move_on_after(OBTAINABLE_TIMEOUT):
            try:
                credentials = await self._credentials.of(ImageReference.parse(image).registry)
                inspect = partial(
                    APIClient.inspect_distribution, image=engine_name(image), auth_config=credentials
                )
                await self._engine.call(inspect, within=OBTAINABLE_TIMEOUT, sort=sort_pull)
            except BackendError as error:
                log.debug("docker.image_unobtainable", image=image, error=str(error))
                return False
            return True
        return False

    async def prepare(self, image: str, on_progress: OnProgress) -> bool:
        """See ``Backend.prepare``."""
        reference = ImageReference.parse(image)
        credentials = await self._credentials.of(reference.registry)
        work = partial(
            pull, image=image, credentials=credentials, platform=self._platform, on_progress=on_progress
        )
        there = set(await self._engine.call(partial(APIClient.images, quiet=True)))
        try:
            await self._engine.stream(work, limiter=self._engine.pulls, sort=sort_pull)
        except RegistryThrottled as error:
            if error.retry_after is None:
                error.retry_after = await self._retry_after(reference)
            raise
        found = await self._inspect(image)
        if found is None:
            # A stream that broke off between two lines looks like one that ended.
            raise ImagePullFailed("the engine ended the pull without the image")
        if not fits_platform(found, self._platform):
            raise ImageNotFound(f"the registry has {image} only for another platform than {self._platform}")
        return found["Id"] not in there

    async def _retry_after(self, reference: ImageReference) -> float | None:
        """Seconds that the registry says it wants to be left alone; None if it can't be found out."""
        told: float | None = None
        with anyio.move_on_after(ASK_TIMEOUT):
            try:
                info = await self._engine.call(APIClient.info, within=ASK_TIMEOUT)
                url = manifest_url(reference, info.get("RegistryConfig") or {})
                told = await in_cuttable_thread(
                    partial(CuttableSession, silence=ASK_TIMEOUT),
                    partial(ask, url=url),
                    limiter=self._asking,
                    sort=unanswered,
                    patience=ASK_PATIENCE,
                )
            except BackendError as error:
                log.debug("docker.registry_silent", registry=reference.registry, error=str(error))
        return told

    async def size(self) -> int:
        """See ``Backend.images_size``."""

        def sizes(client: Any) -> dict[str, Any]:
            if version_lt(client.api_version, _SIZES_APART):
                return dict(client.df())
            # The library knows the call without its parameter only.
            address = f"{client.base_url}/v{client.api_version}/system/df?type=image"
            answer = client.get(address, timeout=SIZE_TIMEOUT)
            if not answer.ok:
                raise APIError(answer.text, response=answer, explanation=answer.text)
            return dict(answer.json())

        return layers_size(await self._engine.call(sizes, within=SIZE_TIMEOUT))

    async def remove(self, image: str, image_id: str) -> bool:
        """See ``Backend.remove_image``.

        An engine refuses to remove an image's last name while containers are made of it, but takes
        one of several without a look at them: hence ours. A container that is created in between
        keeps the image; it only loses the name.
        """
        found = await self._inspect(image)
        if found is None or found["Id"] != image_id:
            return found is None
        filters = {"ancestor": image_id}
        if await self._engine.call(partial(APIClient.containers, all=True, filters=filters)):
            return False

        def remove(client: APIClient) -> bool:
            try:
                client.remove_image(engine_name(image))
            except NotFound:
                return True
            except APIError as error:
                if not is_conflict(error):
                    raise
                log.debug("docker.image_in_use", image=image, answer=explanation(error))
                return False
            return True

        return await self._engine.call(remove, within=SIZE_TIMEOUT)
