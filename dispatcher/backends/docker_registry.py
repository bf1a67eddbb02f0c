"""How long a registry wants to be left alone, when an engine says only that it was refused.

Engines pass a refusal's words on, and not its ``Retry-After``. Some registries put the time into
the words; others are asked once more, from here, by a HEAD of the same manifest. That is a best
effort: it shows no credentials, follows no redirect, and whatever goes wrong means "not told".
"""

from __future__ import annotations

import ipaddress
import math
import re
import time
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any

import requests

from dispatcher.reference import DEFAULT_REGISTRY, ImageReference

#: Where docker.io keeps its images.
_HUB = "registry-1.docker.io"
_THROTTLED = frozenset({requests.codes.too_many_requests, requests.codes.service_unavailable})
_MANIFESTS = (
    "application/vnd.docker.distribution.manifest.v2+json, "
    "application/vnd.docker.distribution.manifest.list.v2+json, "
    "application/vnd.oci.image.manifest.v1+json, "
    "application/vnd.oci.image.index.v1+json"
)
_NUMBER = r"[0-9]{1,12}(?:\.[0-9]{1,12})?"
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(rf"({_NUMBER})({'|'.join(sorted(_UNITS, key=len, reverse=True))})")
#: As in "toomanyrequests: retry-after: 606.789µs, allowed: 44000/minute".
_IN_WORDS = re.compile(rf"retry[- ]after:?\s*((?:{_PART.pattern}){{1,8}}|{_NUMBER})(?![\w.])", re.IGNORECASE)


def retry_after_in_words(message: str) -> float | None:
    """Seconds that a registry's message asks for, as a number or as Go writes durations ("1m30s")."""
    found = _IN_WORDS.search(message)
    if found is None:
        return None
    parts = _PART.findall(found[1].lower())
    return sum(float(number) * _UNITS[unit] for number, unit in parts) if parts else float(found[1])


def retry_after_in_header(text: str, now: float) -> float | None:
    """Seconds that a ``Retry-After`` header asks for, from ``now`` (Unix seconds) if it is a date.

    None for what is neither a date nor a finite number from 0.
    """
    text = text.strip()
    if re.fullmatch(r"[0-9]+(?:\.[0-9]+)?", text):
        seconds = float(text)
        return seconds if math.isfinite(seconds) else None
    moment = _moment(text)
    return None if moment is None else max(0.0, moment - now)


def _moment(text: str) -> float | None:
    """Unix seconds of an HTTP date."""
    try:
        moment = parsedate_to_datetime(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


def manifest_url(reference: ImageReference, registry_config: Mapping[str, Any]) -> str:
    """Where the image's manifest is asked for; ``registry_config`` is of the engine's ``/info``."""
    host = _HUB if reference.registry == DEFAULT_REGISTRY else reference.registry
    scheme = "http" if _is_insecure(reference.registry, registry_config) else "https"
    wanted = reference.digest or reference.tag or "latest"
    return f"{scheme}://{host}/v2/{reference.repository}/manifests/{wanted}"


def _is_insecure(registry: str, registry_config: Mapping[str, Any]) -> bool:
    """Whether the engine speaks plain HTTP with it: told to, or on its own host."""
    index = (registry_config.get("IndexConfigs") or {}).get(registry)
    if index is not None:
        return not index.get("Secure", True)
    host = re.sub(r":[0-9]+$", "", registry).strip("[]")
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    networks = ["127.0.0.0/8", *(registry_config.get("InsecureRegistryCIDRs") or [])]
    return any(address in ipaddress.ip_network(network, strict=False) for network in networks)


def ask(session: requests.Session, url: str) -> float | None:
    """In a thread: the seconds that the registry asks for now; None if it asks for none."""
    # Without this, requests would show what it finds in ~/.netrc.
    session.auth = lambda request: request
    answer = session.head(url, headers={"Accept": _MANIFESTS}, allow_redirects=False)
    told = answer.headers.get("Retry-After")
    if told is None or answer.status_code not in _THROTTLED:
        return None
    # A date is one of the registry's clock.
    return retry_after_in_header(told, _moment(answer.headers.get("Date", "")) or time.time())
