"""Image references, parsed and normalised as Docker does.

Grammar: https://github.com/distribution/reference (the ``reference`` package's doc comment).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

DEFAULT_REGISTRY = "docker.io"
#: The grammar's own limit for a repository name, registry included.
MAX_NAME_LENGTH = 255
MAX_PORT = 65_535

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]{{1,5}})?", re.ASCII)
_PORT = re.compile(r":([0-9]+)$", re.ASCII)
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*", re.ASCII)
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"sha256:[a-f0-9]{64}|sha512:[a-f0-9]{128}", re.ASCII)
_HEX_ID = re.compile(r"[a-f0-9]{64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ImageReference:
    """A normalised reference: ``busybox`` is ``docker.io/library/busybox:latest``."""

    #: Host and optional port, e.g. ``docker.io`` or ``127.0.0.1:5000``.
    registry: str
    #: Path within the registry, e.g. ``library/busybox``.
    repository: str
    tag: str | None
    digest: str | None

    @classmethod
    def parse(cls, text: str) -> ImageReference:
        """Parse what a user wrote.

        Raises ValueError saying which part is wrong.
        """
        rest, at, digest = text.partition("@")
        if at and not _DIGEST.fullmatch(digest):
            raise ValueError("the digest must be sha256:<64 hex digits> or sha512:<128 hex digits>")
        name, tag = _split_tag(rest)
        if tag is not None and not _TAG.fullmatch(tag):
            raise ValueError("the tag must match [A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
        registry, repository = _split_domain(name)
        if not _DOMAIN.fullmatch(registry):
            raise ValueError("the part before the first / is not a registry's host name")
        port = _PORT.search(registry)
        if port and not 1 <= int(port[1]) <= MAX_PORT:
            raise ValueError(f"the registry's port must be from 1 to {MAX_PORT}")
        if not repository or not _PATH.fullmatch(repository):
            raise ValueError("the name must be lower-case letters, digits and . _ - / separators")
        if len(registry) + 1 + len(repository) > MAX_NAME_LENGTH:
            raise ValueError(f"the name is longer than {MAX_NAME_LENGTH} characters")
        if _HEX_ID.fullmatch(name):
            raise ValueError("64 hex digits are an image id, not a name")
        if tag is None and not digest:
            tag = "latest"
        return cls(registry, repository, tag, digest or None)

    def __str__(self) -> str:
        text = f"{self.registry}/{self.repository}"
        if self.tag:
            text += f":{self.tag}"
        if self.digest:
            text += f"@{self.digest}"
        return text


def _split_tag(text: str) -> tuple[str, str | None]:
    """Split at the last colon, unless it belongs to a registry's port."""
    head, colon, tail = text.rpartition(":")
    if not colon or "/" in tail:
        return text, None
    return head, tail


def _split_domain(name: str) -> tuple[str, str]:
    """Docker's rule: the first part is a registry if it has a dot, a port, upper case or is localhost."""
    first, slash, rest = name.partition("/")
    if slash and (any(c in first for c in ".:[") or first == "localhost" or first != first.lower()):
        registry, repository = first, rest
    else:
        registry, repository = DEFAULT_REGISTRY, name
    if registry == "index.docker.io":
        registry = DEFAULT_REGISTRY
    if registry == DEFAULT_REGISTRY and "/" not in repository:
        repository = f"library/{repository}"
    return registry, repository
