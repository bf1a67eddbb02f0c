"""What engines and registries say, and what it is taken for; no engine needed."""

from __future__ import annotations

import pytest
import requests
from docker.errors import APIError

from dispatcher.backends.docker_errors import (
    MESSAGE_LIMIT,
    one_line,
    sort_create,
    sort_pull_message,
    sort_start,
)
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

HEX_ID = "0123456789abcdef" * 4


def answer(status: int, message: str) -> APIError:
    """The library's error for such an answer."""
    response = requests.Response()
    response.status_code = status
    return APIError(message, response=response, explanation=message)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("manifest for busybox:nope not found: manifest unknown: manifest unknown", ImageNotFound),
        (
            (
                "pull access denied for nope, repository does not exist or may require 'docker login': "
                "denied: requested access to the resource is denied"
            ),
            ImageNotFound,
        ),
        ("docker.io/library/nope:1: not found", ImageNotFound),
        ("no matching manifest for linux/arm64/v8 in the manifest list entries", ImageNotFound),
        (
            (
                "pull access denied for registry.example/app, repository does not exist or may require "
                "'docker login': denied: Your authorization token has expired. Reauthenticate and try again."
            ),
            ImageUnauthorized,
        ),
        (
            'Head "https://r.example/v2/app/manifests/1": unauthorized: authentication required',
            ImageUnauthorized,
        ),
        ('Head "https://r.example/v2/app/manifests/1": no basic auth credentials', ImageUnauthorized),
        ('Head "https://r.example/v2/app/manifests/1": denied', ImageUnauthorized),
        ("unexpected status from HEAD request to https://r.example/v2/: 403 Forbidden", ImageUnauthorized),
        (
            (
                "toomanyrequests: You have reached your pull rate limit. You may increase the limit by "
                "authenticating and upgrading"
            ),
            RegistryThrottled,
        ),
        ("error parsing HTTP 429 response body: invalid character", RegistryThrottled),
        ("received unexpected HTTP status: 503 Service Unavailable", RegistryThrottled),
        ("unexpected status from GET request to https://r.example/v2/: 502 Bad Gateway", RegistryThrottled),
        (
            'Get "https://r.example:5000/v2/": dial tcp 10.0.0.1:5000: connect: connection refused',
            ImagePullFailed,
        ),
        ('Get "https://r.example/v2/": dial tcp: lookup r.example: no such host', ImagePullFailed),
        ("write /var/lib/docker/tmp/x: no space left on device", NoCapacity),
        ("unauthorized: authentication required", ImageUnauthorized),
        ("manifest for 127.0.0.1:5000/app:1 not found: manifest unknown: gone", ImageNotFound),
        ("name unknown", ImageNotFound),
        ("error parsing HTTP 404 response body: invalid character '<' looking for beginning", ImageNotFound),
        ("error parsing HTTP 403 response body: unexpected end of JSON input", ImageUnauthorized),
        ("error parsing HTTP 401 response body: unexpected end of JSON input", ImageUnauthorized),
        ('error parsing HTTP 429 response body: unexpected end of JSON input: ""', RegistryThrottled),
        ("received unexpected HTTP status: 500 Internal Server Error", RegistryThrottled),
        ("received unexpected HTTP status: 502 Bad Gateway", RegistryThrottled),
        ("received unexpected HTTP status: 504 Gateway Timeout", RegistryThrottled),
        (
            (
                "error pulling image configuration: download failed after attempts=6: received unexpected "
                "HTTP status: 503 Service Unavailable"
            ),
            RegistryThrottled,
        ),
        (
            "error pulling image configuration: download failed after attempts=1: denied: no",
            ImageUnauthorized,
        ),
        ("denied: User: arn:x is not authorized to perform: ecr:BatchGetImage", ImageUnauthorized),
        ("unexpected end of JSON input", ImageInvalid),
        ("invalid character 'n' looking for beginning of object key string", ImageInvalid),
        ("missing signature key", ImageInvalid),
        (
            'Encountered remote "application/vnd.cncf.helm.config.v1+json"(unknown) when fetching',
            ImageInvalid,
        ),
        (f"manifest verification failed for digest sha256:{HEX_ID}", ImageInvalid),
        (
            f'failed commit on ref "manifest-sha256:{HEX_ID}": unexpected commit digest sha256:{HEX_ID}',
            ImageInvalid,
        ),
        ("error pulling image configuration: download failed after attempts=1: unknown blob", ImageInvalid),
        (f"filesystem layer verification failed for digest sha256:{HEX_ID}", ImagePullFailed),
        (
            f'failed commit on ref "layer-sha256:{HEX_ID}": unexpected commit digest sha256:{HEX_ID}',
            ImagePullFailed,
        ),
        ("read tcp 127.0.0.1:56774->127.0.0.1:44095: read: connection reset by peer", ImagePullFailed),
        ('Head "http://127.0.0.1:36283/v2/app/manifests/1": EOF', ImagePullFailed),
        ("unexpected EOF", ImagePullFailed),
        ("unable to decode token response: invalid character '<' looking for beginning", ImagePullFailed),
        ("unknown: told to fail", ImagePullFailed),
        # What is asked for may have any name.
        ('Head "https://r.example/v2/denied/unauthorized/manifests/1": EOF', ImagePullFailed),
        (
            "unexpected status from GET request to https://r.example/v2/forbidden: 502 Bad Gateway",
            RegistryThrottled,
        ),
    ],
)
def test_failed_pull(message: str, kind: type[BackendError]) -> None:
    assert type(sort_pull_message(message)) is kind


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (404, "No such image: nope:1", ImageNotFound),
        (404, "network nope not found", LaunchRejected),
        (
            404,
            (
                "image with reference app:1 was found but does not match the specified platform: wanted "
                "linux/amd64, actual: linux/arm64"
            ),
            ImageNotFound,
        ),
        (400, "invalid environment variable: =x", LaunchRejected),
        (400, "No command specified", StartFailed),
        (500, "Cannot mkdir: /bin/sh is not a directory", StartFailed),
        (500, "mkdir /var/lib/docker/overlay2/x: no space left on device", NoCapacity),
        (500, "something is broken", BackendError),
        (503, "not now", BackendUnreachable),
    ],
)
def test_failed_create(status: int, message: str, kind: type[BackendError]) -> None:
    assert type(sort_create(answer(status, message))) is kind


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (404, f"No such container: {HEX_ID}", ContainerGone),
        (404, "network nope not found", StartFailed),
        (
            400,
            (
                "failed to create shim task: OCI runtime create failed: runc create failed: unable to start "
                'container process: exec: "nope": executable file not found in $PATH: unknown'
            ),
            StartFailed,
        ),
        (409, "container is marked for removal and cannot be started", BackendError),
        (500, "failed to create shim task: context deadline exceeded: unknown", BackendError),
        (
            500,
            (
                "OCI runtime create failed: starting container process caused: fork: resource temporarily "
                "unavailable: unknown"
            ),
            NoCapacity,
        ),
    ],
)
def test_failed_start(status: int, message: str, kind: type[BackendError]) -> None:
    assert type(sort_start(answer(status, message))) is kind


def test_start_failure_tells_what_the_runtime_found() -> None:
    message = (
        "failed to create shim task: OCI runtime create failed: container_linux.go:380: starting container "
        'process caused: exec: "nope": executable file not found in $PATH: unknown'
    )
    assert str(sort_start(answer(400, message))) == 'exec: "nope": executable file not found in $PATH'


def test_no_answer_at_all() -> None:
    for sort in (sort_create, sort_start):
        assert type(sort(requests.exceptions.ConnectionError("refused"))) is BackendUnreachable


def test_messages_fit_a_line() -> None:
    assert one_line(f"container\n  {HEX_ID}\tis gone") == "container 0123456789ab is gone"
    assert len(one_line("x" * 10_000)) == MESSAGE_LIMIT
