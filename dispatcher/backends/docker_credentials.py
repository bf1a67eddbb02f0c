"""The operator's credentials of a registry, read anew for each pull so that rotated ones count.

They are where Docker's own tools keep them: in ``config.json`` of DOCKER_CONFIG or ``~/.docker``,
written down there (``auths``) or with a helper program (``credHelpers``, ``credsStore``):
https://docs.docker.com/reference/cli/docker/login/#credential-stores
The client library could do the same, but waits for a helper without any limit, reads the file for
every call it makes, and fails in all of them when the file is malformed.

No message of an error here holds anything that a helper said or that is secret in the file.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
from anyio import CapacityLimiter, to_thread

from dispatcher.errors import ImagePullFailed
from dispatcher.reference import DEFAULT_REGISTRY

#: Seconds that a helper may take; some ask a cloud.
HELPER_TIMEOUT = 30.0
#: Under what Docker keeps the credentials of docker.io.
_HUB = "https://index.docker.io/v1/"
_HUB_NAMES = frozenset({DEFAULT_REGISTRY, "index.docker.io", "registry-1.docker.io"})
#: What helpers answer, with an exit code other than 0, when they have none.
_NONE_FOUND = b"credentials not found"
#: The user name that says that the secret is an identity token.
_TOKEN = "<token>"  # noqa: S105 - what helpers say, no secret


class Credentials:
    """What the operator has for each registry. Safe to use from any task of one event loop."""

    def __init__(self, *, at_once: int, helper_timeout: float = HELPER_TIMEOUT) -> None:
        """``at_once``: registries asked about at the same time; ``helper_timeout`` in seconds."""
        self._limiter = CapacityLimiter(at_once)
        self._helper_timeout = helper_timeout

    async def of(self, registry: str) -> dict[str, str]:
        """What an engine is to show ``registry``, as its API names it; {} if there is nothing.

        Cancelling ends a helper that runs. Raises ImagePullFailed if the file or a helper is broken.
        """
        search = _Search(registry, self._helper_timeout)
        try:
            return await to_thread.run_sync(search.run, limiter=self._limiter, abandon_on_cancel=True)
        except anyio.get_cancelled_exc_class():
            search.leave()
            raise


class _Search:
    """One search, in a thread; ``leave`` is called from another."""

    def __init__(self, registry: str, helper_timeout: float) -> None:
        self._registry = registry
        self._helper_timeout = helper_timeout
        self._left = threading.Event()
        self._helper: subprocess.Popen[bytes] | None = None

    def run(self) -> dict[str, str]:
        path = _config_path()
        config = _read(path)
        helpers, auths = _section(config, "credHelpers", path), _section(config, "auths", path)
        helper = _of_registry(helpers, self._registry) or config.get("credsStore")
        if helper and (found := self._ask(f"docker-credential-{helper}")):
            return found
        return _written_down(_of_registry(auths, self._registry), self._registry, path)

    def leave(self) -> None:
        """End the helper, now or as soon as it has started."""
        self._left.set()
        if self._helper is not None:
            _kill(self._helper)

    def _ask(self, program: str) -> dict[str, str] | None:
        server = _HUB if self._registry in _HUB_NAMES else self._registry
        executable = shutil.which(program)
        if executable is None:
            raise _helper_failed(program, "is not on PATH")
        try:
            with subprocess.Popen(  # noqa: S603 - the operator's own program
                [executable, "get"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # So that what it has started ends with it.
                start_new_session=True,
            ) as self._helper:
                output = self._output(self._helper, server)
                code = self._helper.returncode
        except subprocess.TimeoutExpired:
            raise _helper_failed(program, f"took longer than {self._helper_timeout:g} s") from None
        except OSError as error:
            raise _helper_failed(program, error.strerror or type(error).__name__) from None
        if code != 0 and _NONE_FOUND in output:
            return None
        if code != 0:
            raise _helper_failed(program, f"ended with exit code {code}")
        return _told_by_helper(program, server, output)

    def _output(self, helper: subprocess.Popen[bytes], server: str) -> bytes:
        try:
            if self._left.is_set():
                _kill(helper)
            return helper.communicate(server.encode(), self._helper_timeout)[0]
        except BaseException:
            _kill(helper)
            raise


def _kill(helper: subprocess.Popen[bytes]) -> None:
    if helper.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(helper.pid, signal.SIGKILL)


def _helper_failed(program: str, what: str) -> ImagePullFailed:
    return ImagePullFailed(f"the credential helper failed: {program} {what}")


def _told_by_helper(program: str, server: str, output: bytes) -> dict[str, str] | None:
    try:
        told = json.loads(output)
        user, secret = told["Username"], told["Secret"]
    except (ValueError, KeyError, TypeError):
        user = secret = None
    if not isinstance(user, str) or not isinstance(secret, str):
        raise _helper_failed(program, "gave no Username and Secret in JSON")
    if not user and not secret:
        return None
    if user == _TOKEN:
        return {"identitytoken": secret, "serveraddress": server}
    return {"username": user, "password": secret, "serveraddress": server}


def _config_path() -> Path:
    directory = os.environ.get("DOCKER_CONFIG")
    return (Path(directory) if directory else Path("~/.docker").expanduser()) / "config.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ImagePullFailed(f"{path} can't be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ImagePullFailed(
            f"{path} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}"
        ) from None
    except ValueError:
        raise ImagePullFailed(f"{path} is not JSON: it is not UTF-8") from None
    if not isinstance(config, dict):
        raise ImagePullFailed(f"{path} is not a JSON object")
    return config


def _section(config: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    section = config.get(name) or {}
    if not isinstance(section, dict):
        raise ImagePullFailed(f"{path}: {name} is not a JSON object")
    return section


def _of_registry(section: Mapping[str, Any], registry: str) -> Any:
    """The value for ``registry``, whose key may be an address: "https://registry.example/v1/"."""
    names = _HUB_NAMES if registry in _HUB_NAMES else {registry}
    keys = [registry, *(key for key in section if _host(key) in names)]
    return next((section[key] for key in keys if key in section), None)


def _host(key: str) -> str:
    return key.removeprefix("https://").removeprefix("http://").partition("/")[0]


def _written_down(entry: Any, registry: str, path: Path) -> dict[str, str]:
    """What an entry of ``auths`` says; an empty one only tells that somebody has logged in."""
    if not entry:
        return {}
    try:
        if entry.get("identitytoken"):
            return {"identitytoken": str(entry["identitytoken"]), "serveraddress": registry}
        user, password = entry.get("username"), entry.get("password")
        if entry.get("auth"):
            user, colon, password = base64.b64decode(entry["auth"], validate=True).decode().partition(":")
            if not colon:
                raise ValueError
        if not user:
            return {}
        if not password:
            raise ValueError
        return {"username": str(user), "password": str(password).strip("\0"), "serveraddress": registry}
    except (ValueError, TypeError, AttributeError):
        # Without its cause, which would show the value.
        raise ImagePullFailed(
            f"{path}: the entry of {registry} in auths is not what `docker login` writes"
        ) from None
