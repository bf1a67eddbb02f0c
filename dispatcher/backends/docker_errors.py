"""What goes wrong between us and a Docker engine, sorted into ``dispatcher.errors``.

The engine answers most failures with a status that says little (500 for a mistyped
program, 404 for a private image) and a text that says it all. The texts matched here are
those of Docker 20.10 to 29; they are matched in lower case, in the order written.
"""

from __future__ import annotations

import re

import requests.exceptions
import urllib3.exceptions
from docker.errors import APIError, DockerException, StreamParseError

from dispatcher.backends.docker_registry import retry_after_in_words
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

#: Everything the client library, or what it is built on, raises when a call fails.
LIBRARY_ERRORS = (
    DockerException,
    StreamParseError,
    requests.exceptions.RequestException,
    urllib3.exceptions.HTTPError,
    OSError,
)
#: Characters of an engine's message that are passed on to people.
MESSAGE_LIMIT = 500

#: What is asked for may be named like any of the words below.
_ADDRESS = re.compile(r"https?://\S*?(?=[\"']?[:,;)]?(?:\s|$))")
_THROTTLED = re.compile(
    r"toomanyrequests|too many requests|rate limit|http (?:status: )?(?:429|5\d\d)"
    r"|: 5\d\d (?:internal server error|bad gateway|service unavailable|gateway time-?out)"
)
#: Said only by a registry that knows the asker and refuses, or wants to know it first.
_UNAUTHORIZED = re.compile(
    r"unauthorized|authentication required|no basic auth|token has expired|incorrect username or password"
    r"|http (?:status: )?401"
)
#: What no second pull will mend. A layer that is not what it should be is none of these: it may have
#: been spoilt on its way, whereas a manifest comes in one piece.
_INVALID = re.compile(
    r"^(?:unexpected end of json input|invalid character '|json: cannot unmarshal)"
    r"|manifest verification failed|commit on ref \"manifest-|commit on ref \"index-"
    r"|missing signature key|encountered remote .* when fetching|encountered unknown type"
    r"|unsupported (?:manifest|media)|unsupported schema|image manifest version 2, schema 1"
    r"|unknown blob|blob unknown|mismatched image rootfs|invalid rootfs in image configuration"
)
#: "pull access denied … repository does not exist or may require 'docker login'" can mean
#: either. It is told as "not found", as the engine's own status 404 does: a wrong name is by
#: far the more frequent cause, and the message names the other.
_NOT_FOUND = re.compile(
    r"manifest unknown|name unknown|no such image|repository does not exist|: not found|no matching manifest"
    r"|does not match the specified platform|cannot be used on this platform|invalid reference format"
    r"|http (?:status: )?404"
)
_DENIED = re.compile(r"\bdenied\b|forbidden|not authorized|http (?:status: )?403")
#: There is none, or only one for another platform.
_NO_IMAGE = re.compile(r"no such image|does not match the specified platform")
_NO_CAPACITY = re.compile(
    r"no space left on device|disk quota exceeded|too many open files|cannot allocate memory"
    r"|resource temporarily unavailable|no available ipv4 address|all predefined address pools"
    r"|could not find an available"
)
#: What is found wrong already in the create, with the image at hand.
_NO_PROGRAM = re.compile(r"no command specified|cannot mkdir|is not a directory")
#: The engine's own trouble while starting, which says nothing about the task.
_TRANSIENT_START = re.compile(r"deadline exceeded|timed? ?out|connection refused|transport is closing|ttrpc")
_START_DETAIL = re.compile(r"(?:starting container process caused|unable to start container process): (.+)")
_NO_REFERENCE = "invalid reference format"
_ID_PREFIX = re.compile(r"\b[0-9a-f]{64}\b")
#: What may be secret in an address: a user with a password, and the signature in a query.
_IN_ADDRESS = re.compile(
    r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)(?:[^\s/@\"']+@)?(?P<path>[^\s?#\"']*)(?:[?#][^\s\"']*)?"
)


def one_line(text: str) -> str:
    """An engine's message, fit for a table and a log: one line, no 64-digit ids, and of addresses
    neither users nor queries."""
    line = _IN_ADDRESS.sub(r"\g<scheme>\g<path>", " ".join(text.split()))
    line = _ID_PREFIX.sub(lambda match: match[0][:12], line)
    return line if len(line) <= MESSAGE_LIMIT else line[: MESSAGE_LIMIT - 1] + "…"


def explanation(error: BaseException) -> str:
    """What the engine wrote, or what the library did."""
    if isinstance(error, APIError) and error.explanation:
        return one_line(str(error.explanation))
    return _told_by_the_system(error) or one_line(str(error)) or type(error).__name__


def _told_by_the_system(error: BaseException) -> str:
    """What the system said at the bottom of the libraries' wrappings, such as "Connection refused"."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return ""


def sort_error(error: BaseException) -> BackendError:
    """Any library error of a call about a container or the engine itself."""
    text = explanation(error)
    if not isinstance(error, APIError):
        return BackendUnreachable(f"the Docker engine does not answer: {text}")
    lowered = text.lower()
    if _NO_CAPACITY.search(lowered):
        return NoCapacity(text)
    if error.status_code == requests.codes.bad_request and _NO_REFERENCE in lowered:
        return ImageNotFound(text)  # engines differ in what they take for a name
    if error.status_code == requests.codes.not_found:
        return ImageNotFound(text) if _NO_IMAGE.search(lowered) else ContainerGone(text)
    if error.status_code in (requests.codes.bad_gateway, requests.codes.service_unavailable):
        return BackendUnreachable(text)
    return BackendError(text)


def sort_create(error: BaseException) -> BackendError:
    """A library error of ``create``: what is wrong with the configuration is final."""
    sorted_error = sort_error(error)
    text = str(sorted_error)
    if type(sorted_error) is BackendError and _NO_PROGRAM.search(text.lower()):
        return StartFailed(text)
    refused = isinstance(error, APIError) and error.status_code == requests.codes.bad_request
    # A 404 that is not about the image is about something else the container wants.
    if type(sorted_error) is ContainerGone or (refused and type(sorted_error) is BackendError):
        return LaunchRejected(text)
    return sorted_error


def sort_start(error: BaseException) -> BackendError:
    """A library error of ``start``: mostly the task's own program, user or directory."""
    sorted_error = sort_error(error)
    text = str(sorted_error)
    lowered = text.lower()
    if type(sorted_error) is ContainerGone and "no such container" not in lowered:
        # A 404 about something else the container wants: its network, its program.
        return StartFailed(text)
    if type(sorted_error) is not BackendError or is_conflict(error) or _TRANSIENT_START.search(lowered):
        return sorted_error
    detail = _START_DETAIL.search(text)
    return StartFailed(detail[1].removesuffix(": unknown") if detail else text)


def sort_pull(error: BaseException) -> BackendError:
    """A library error of anything that makes the engine ask a registry."""
    if not isinstance(error, APIError):
        return sort_error(error)
    return sort_pull_message(explanation(error))


def sort_pull_message(message: str) -> BackendError:
    """What an engine says of a pull that failed, in its answer or in the stream."""
    text = one_line(message)
    lowered = _ADDRESS.sub("", text.lower())
    if _NO_CAPACITY.search(lowered):
        return NoCapacity(text)
    if _THROTTLED.search(lowered):
        return RegistryThrottled(text, retry_after=retry_after_in_words(text))
    if _UNAUTHORIZED.search(lowered):
        return ImageUnauthorized(text)
    if _INVALID.search(lowered):
        return ImageInvalid(text)
    if _NOT_FOUND.search(lowered):
        return ImageNotFound(text)
    if _DENIED.search(lowered):
        return ImageUnauthorized(text)
    return ImagePullFailed(text)


def unanswered(error: BaseException) -> BackendError:
    """A library error of a call of ours to a registry."""
    return BackendError(f"the registry does not answer: {explanation(error)}")


def is_conflict(error: BaseException) -> bool:
    """Whether the engine refused because of the state something is in (409)."""
    return isinstance(error, APIError) and error.status_code == requests.codes.conflict
