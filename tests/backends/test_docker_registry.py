"""How long a registry wants to be left alone: read from words and headers, and asked for."""

from __future__ import annotations

import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from dispatcher.backends.docker_client import CuttableSession
from dispatcher.backends.docker_registry import (
    ask,
    manifest_url,
    retry_after_in_header,
    retry_after_in_words,
)
from dispatcher.reference import ImageReference
from tests.support.faulty_registry import Fault, FaultyRegistry

DIGEST = "sha256:" + "0123456789abcdef" * 4
NOW = 1_700_000_000.0


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        ("toomanyrequests: retry-after: 606.789µs, allowed: 44000/minute", 606.789e-6),
        ("toomanyrequests: retry-after: 606.789us", 606.789e-6),
        ("toomanyrequests: Retry-After: 1m30s, allowed: 5/minute", 90),
        ("retry-after: 1h2m3.5s", 3723.5),
        ("retry-after: 1.2ms", 0.0012),
        ("retry after 250ns", 250e-9),
        ("retry-after: 7", 7),
        ("retry-after: 0s", 0),
        ("toomanyrequests: You have reached your pull rate limit", None),
        ("retry-after: soon", None),
        ("retry-after: -3s", None),
        ("retry-after: 1m30", None),
        ("retry-after: 1" + "0" * 400, None),
        ("retry-after: NaN", None),
    ],
)
def test_words(words: str, seconds: float | None) -> None:
    assert retry_after_in_words(words) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("120", 120),
        (" 0 ", 0),
        ("1.5", 1.5),
        (formatdate(NOW + 90, usegmt=True), 90),
        (formatdate(NOW - 90, usegmt=True), 0),
        ("Fri, 14 Nov 2023 22:14:50 -0000", 90),
        ("-5", None),
        ("nan", None),
        ("inf", None),
        ("9" * 400, None),
        ("", None),
        ("soon", None),
        ("Fri, 99 Nov 2023 22:14:50 GMT", None),
    ],
)
def test_header(header: str, seconds: float | None) -> None:
    assert retry_after_in_header(header, NOW) == seconds


@pytest.mark.parametrize(
    ("image", "config", "url"),
    [
        ("busybox", {}, "https://registry-1.docker.io/v2/library/busybox/manifests/latest"),
        ("r.example/a/b:2", {}, "https://r.example/v2/a/b/manifests/2"),
        (f"r.example/a:2@{DIGEST}", {}, f"https://r.example/v2/a/manifests/{DIGEST}"),
        ("localhost:5000/a", {}, "http://localhost:5000/v2/a/manifests/latest"),
        ("127.3.0.1:5000/a", {}, "http://127.3.0.1:5000/v2/a/manifests/latest"),
        ("10.1.2.3:5000/a", {}, "https://10.1.2.3:5000/v2/a/manifests/latest"),
        (
            "10.1.2.3:5000/a",
            {"InsecureRegistryCIDRs": ["10.0.0.0/8"]},
            "http://10.1.2.3:5000/v2/a/manifests/latest",
        ),
        ("r.example/a", {"IndexConfigs": {"r.example": {"Secure": False}}}, "http://r.example/v2/a/manifests/latest"),
        ("r.example/a", {"IndexConfigs": {"r.example": {"Secure": True}}}, "https://r.example/v2/a/manifests/latest"),
        ("r.example/a", {"IndexConfigs": None, "InsecureRegistryCIDRs": None}, "https://r.example/v2/a/manifests/latest"),
    ],
)  # fmt: skip
def test_address(image: str, config: dict[str, Any], url: str) -> None:
    assert manifest_url(ImageReference.parse(image), config) == url


def asked(image: str) -> float | None:
    with CuttableSession(silence=5) as session:
        return ask(session, manifest_url(ImageReference.parse(image), {}))


@pytest.mark.parametrize(
    ("fault", "seconds"),
    [
        (Fault(status=429, retry_after="7"), 7),
        (Fault(status=503, retry_after="7"), 7),
        (Fault(status=429), None),
        (Fault(status=429, retry_after="later"), None),
        (Fault(status=500, retry_after="7"), None),
        (Fault(status=307, retry_after="7"), None),
        (Fault(), None),
    ],
)
def test_asked(faulty_registry: FaultyRegistry, fault: Fault, seconds: float | None) -> None:
    image = faulty_registry.add("app")
    faulty_registry.fault("app", fault)
    assert asked(image) == seconds
    assert faulty_registry.requests("app") == {"HEAD manifests": 1}


def test_a_date_is_of_the_registrys_clock(faulty_registry: FaultyRegistry) -> None:
    image = faulty_registry.add("app")
    faulty_registry.fault("app", Fault(status=429, retry_after=formatdate(time.time() + 60, usegmt=True)))
    seconds = asked(image)
    assert seconds is not None
    # Both are told in whole seconds.
    assert 58 <= seconds <= 61


def test_no_credentials_of_the_netrc_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login user password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with FaultyRegistry(credentials=("user", "secret")) as registry:
        image = registry.add("app")
        registry.fault("app", Fault(status=429, retry_after="7"))
        # It would be told, had it shown them.
        assert asked(image) is None
