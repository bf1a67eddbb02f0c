"""Docker's grammar of image references, and its normalisation."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.reference import ImageReference

DIGEST = "sha256:" + "0123456789abcdef" * 4
LONG_DIGEST = "sha512:" + "0123456789abcdef" * 8


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("library/busybox", "docker.io/library/busybox:latest"),
        ("acme/app", "docker.io/acme/app:latest"),
        ("a/b/c/d:t", "docker.io/a/b/c/d:t"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
        ("127.0.0.1:5000/a/b:t", "127.0.0.1:5000/a/b:t"),
        ("[::1]:5000/app", "[::1]:5000/app:latest"),
        ("[2001:db8::1]/app:t", "[2001:db8::1]/app:t"),
        ("ghcr.io/acme/app:v1", "ghcr.io/acme/app:v1"),
        ("GHCR.io/acme/app", "GHCR.io/acme/app:latest"),
        ("Registry/app", "Registry/app:latest"),
        (
            "reg-istry.example.com:443/a_b/c__d/e-f/g---h/i.j",
            "reg-istry.example.com:443/a_b/c__d/e-f/g---h/i.j:latest",
        ),
        ("app:_tag", "docker.io/library/app:_tag"),
        ("app:" + "t" * 128, "docker.io/library/app:" + "t" * 128),
        (f"app@{DIGEST}", f"docker.io/library/app@{DIGEST}"),
        (f"app:t@{DIGEST}", f"docker.io/library/app:t@{DIGEST}"),
        (f"localhost:5000/app@{LONG_DIGEST}", f"localhost:5000/app@{LONG_DIGEST}"),
        ("1234", "docker.io/library/1234:latest"),
        ("a" * 63, f"docker.io/library/{'a' * 63}:latest"),
        ("a" * 237, f"docker.io/library/{'a' * 237}:latest"),
    ],
)
def test_a_reference_is_normalised(text: str, normal: str) -> None:
    assert str(ImageReference.parse(text)) == normal
    assert ImageReference.parse(normal) == ImageReference.parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "name"), (" ", "name"), ("UPPER", "name"), ("acme/UPPER", "name"), ("app ", "name"),
        ("busy box", "name"), ("-app", "name"), ("app-", "name"), (".app", "name"), ("a..b", "name"),
        ("a___b", "name"), ("a//b", "name"), ("/app", "name"), ("app/", "name"), ("ghcr.io/", "name"),
        ("büro", "name"), ("app\n", "name"), ("app\0", "name"), ("https://ghcr.io/app", "name"),
        ("app:", "tag"), ("app:-t", "tag"), ("app:.t", "tag"), ("app:t t", "tag"), ("app:tag\n", "tag"),
        ("app:" + "t" * 129, "tag"), ("app:é", "tag"),
        ("app@", "digest"), ("app@sha256:abc", "digest"), (f"app@{DIGEST}0", "digest"),
        (f"app@{DIGEST.upper()}", "digest"), ("app@md5:" + "0" * 32, "digest"), (f"app@{DIGEST}\n", "digest"),
        ("-ghcr.io/app", "host"), ("ghcr..io/app", "host"), ("ghcr.io:port/app", "host"),
        ("ghcr.io:/app", "host"), ("[::1/app", "host"), ("gh_cr.io/app", "host"), ("user:pass/app", "host"),
        ("ghcr.io:123456/app", "host"), ("ghcr.io:65536/app", "port"), ("ghcr.io:0/app", "port"),
        ("a" * 238, "longer"), ("ghcr.io/" + "a" * 248, "longer"),
        ("0123456789abcdef" * 4, "image id"),
    ],
)  # fmt: skip
def test_what_is_no_reference_is_refused_by_its_part(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ImageReference.parse(text)


@given(st.text(max_size=60) | st.text("aA0._-/:@[]", max_size=40))
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        reference = ImageReference.parse(text)
        assert str(reference.parse(str(reference))) == str(reference)
        assert reference.tag or reference.digest


components = st.from_regex(r"[a-z0-9]+([._]|__|-{1,3})?[a-z0-9]+", fullmatch=True).filter(
    lambda c: len(c) < 30
)
hosts = st.sampled_from(
    ["ghcr.io", "localhost", "localhost:5000", "10.0.0.1:80", "[::1]:5000", "Host", "a.b.c"]
)


@given(
    hosts,
    st.lists(components, min_size=1, max_size=4),
    st.none() | st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True),
    st.sampled_from([None, DIGEST, LONG_DIGEST]),
)
def test_every_part_is_found_again(host: str, path: list[str], tag: str | None, digest: str | None) -> None:
    repository = "/".join(path)
    text = f"{host}/{repository}" + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")
    expected = tag or (None if digest else "latest")
    assert ImageReference.parse(text) == ImageReference(host, repository, expected, digest)
