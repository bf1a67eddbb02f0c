"""URLs of sentinels, and what is shown of any URL."""

from __future__ import annotations

import pytest

from dispatcher.redis_url import SentinelUrl, check, masked, parse_sentinel

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("url", "parsed"),
    [
        ("redis+sentinel://a/m", SentinelUrl((("a", 26_379),), "m")),
        ("redis+sentinel://a/m/", SentinelUrl((("a", 26_379),), "m")),
        (
            "redis+sentinel://a:1,b.example:2,[::1]:3,[fe80::2]/my-master/5",
            SentinelUrl((("a", 1), ("b.example", 2), ("::1", 3), ("fe80::2", 26_379)), "my-master", 5),
        ),
        (
            "redis+sentinel://u%40x:p%2F%3Aq@a/m/0",
            SentinelUrl((("a", 26_379),), "m", 0, username="u@x", password="p/:q"),
        ),
        (
            "redis+sentinel://:p@a/m/0?sentinel_password=s%26t&sentinel_username=v",
            SentinelUrl(
                (("a", 26_379),), "m", 0, password="p", sentinel_username="v", sentinel_password="s&t"
            ),
        ),
    ],
)
def test_a_url_of_sentinels_is_understood(url: str, parsed: SentinelUrl) -> None:
    check(url)
    assert parse_sentinel(url) == parsed


def test_its_passwords_are_not_shown() -> None:
    url = f"redis+sentinel://user:{SECRET}@a:1,b:2/m/0?sentinel_password={SECRET}"
    assert SECRET not in repr(parse_sentinel(url))
    assert masked(url) == "redis+sentinel://user:***@a:1,b:2/m/0?***"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis+sentinel://a:1,b/m/0", "redis+sentinel://a:1,b/m/0"),
        ("redis+sentinel://[::1]:1,[::2]:2/m", None),
        (f"redis+sentinel://:{SECRET}@[::1]:1,b/m", None),
        (f"redis://h/0?%70assword={SECRET}", "redis://h/0?***"),
        (f"redis://:{SECRET}@[::1", "***"),
    ],
)
def test_whatever_the_url_no_password_is_shown(url: str, shown: str | None) -> None:
    assert SECRET not in masked(url)
    assert shown is None or masked(url) == shown
