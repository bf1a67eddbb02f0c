"""The URLs by which a Redis is named: what they may look like.

Nothing here tells a URL or a part of it: it may be, or hold, a password.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

SENTINEL_SCHEME = "redis+sentinel"
SENTINEL_PORT = 26_379
_SCHEMES = ("redis", "rediss", "unix")
_QUOTING = "'@', ':' and '/' in a password are written %40, %3A and %2F"
_HOST = re.compile(r"[A-Za-z0-9._:-]+")
_SENTINEL_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::([0-9]{1,5}))?")
_SENTINEL_URL = re.compile(
    rf"{re.escape(SENTINEL_SCHEME)}://"
    r"(?:(?P<username>[^:@/?#]*)(?::(?P<password>[^:@/?#]*))?@)?(?P<hosts>[^@/?#]*)"
    r"(?:/(?P<master>[^/?#]*))?(?:/(?P<database>[0-9]{0,5}))?(?:\?(?P<query>[^#]*))?"
)
#: As Sentinel itself takes them.
_MASTER = re.compile(r"[A-Za-z0-9._-]{1,200}")
_QUERY = ("sentinel_username", "sentinel_password")


@dataclass(frozen=True, slots=True)
class SentinelUrl:
    """``redis+sentinel://[user:password@]host[:port],…/master[/database][?sentinel_password=…]``.

    User and password are for the Redis servers; the sentinels' own are in the query.
    """

    sentinels: tuple[tuple[str, int], ...]
    #: What the sentinels call the group of servers.
    master: str
    database: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)


def check(url: str) -> None:
    """Raises ValueError with what is wrong with ``url`` and what is allowed."""
    if url.startswith(f"{SENTINEL_SCHEME}:"):
        parse_sentinel(url)
        return
    try:
        parts = urlsplit(url)
    except ValueError:  # its message may hold the password
        raise ValueError("is not a URL") from None
    if parts.scheme not in _SCHEMES:
        raise ValueError(f"must begin with redis://, rediss://, unix:// or {SENTINEL_SCHEME}://")
    if parts.scheme != "unix":
        try:
            parts.port  # noqa: B018 - raises for a port that is none
        except ValueError as error:
            raise ValueError("the port must be a number from 0 to 65535") from error
        # What follows an unquoted '/' in a password would else be taken for the path.
        if not re.fullmatch(r"/?\d{0,5}", parts.path) or not _HOST.fullmatch(parts.hostname or ""):
            raise ValueError(f"must read redis://[user:password@]host[:port][/number]; {_QUOTING}")


def parse_sentinel(url: str) -> SentinelUrl:
    """Raises ValueError with what is wrong with ``url`` and what is allowed."""
    match = _SENTINEL_URL.fullmatch(url)
    if match is None:
        raise ValueError(
            f"must read {SENTINEL_SCHEME}://[user:password@]host[:port][,host[:port]…]/master[/number];"
            f" {_QUOTING}"
        )
    if not _MASTER.fullmatch(match["master"] or ""):
        raise ValueError(
            "must name the master as the sentinels do, in letters, digits, '.', '_' and '-',"
            f" after their addresses: {SENTINEL_SCHEME}://host:{SENTINEL_PORT}/mymaster/0"
        )
    options = dict(parse_qsl(match["query"] or "", keep_blank_values=True))
    if not options.keys() <= set(_QUERY):
        raise ValueError(f"the query may have {' and '.join(_QUERY)} only")
    return SentinelUrl(
        sentinels=tuple(_sentinel(host) for host in match["hosts"].split(",")),
        master=match["master"],
        database=int(match["database"] or 0),
        username=unquote(match["username"] or "") or None,
        password=unquote(match["password"] or "") or None,
        sentinel_username=options.get("sentinel_username") or None,
        sentinel_password=options.get("sentinel_password") or None,
    )


def _sentinel(text: str) -> tuple[str, int]:
    match = _SENTINEL_HOST.fullmatch(text)
    port = int((match and match[3]) or SENTINEL_PORT)
    if match is None or not 1 <= port <= 65_535:
        raise ValueError(
            "each sentinel must read host[:port], with a port from 1 to 65535, and commas between them"
        )
    return match[1] or match[2], port


def masked(url: str) -> str:
    """The URL as it may be shown: without what is or may be a password."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "***"
    user, at, host = parts.netloc.rpartition("@")
    name, colon, _ = user.partition(":")
    query = "***" if "password" in unquote(parts.query).lower() else parts.query
    # An '@' anywhere else comes from a password with characters that had to be quoted.
    if "@" in f"{parts.path}{query}{parts.fragment}":
        return f"{parts.scheme}://***"
    shown = f"{parts.scheme}://{name}{':***' if colon else ''}{at}{host}{parts.path}"
    return f"{shown}?{query}" if query else shown
