"""The Dockerfile and the compose files: what they promise, and that they build and run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import compose_spec
import pytest
import yaml

DOCKER = Path(__file__).parents[1] / "docker"


class _Loader(yaml.SafeLoader):
    """Reads compose's ``!reset`` as the value it resets to."""


_Loader.add_constructor("!reset", lambda loader, node: loader.construct_sequence(node))


def _read(name: str) -> dict[str, Any]:
    content = yaml.load((DOCKER / name).read_text(), _Loader)
    assert isinstance(content, dict)
    return content


def _seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))


@pytest.fixture
def compose() -> dict[str, Any]:
    return _read("compose.yaml")


@pytest.mark.parametrize("name", ["compose.yaml", "compose.socket-proxy.yaml"])
def test_compose_files_keep_to_the_specification(name: str) -> None:
    compose_spec.PyCompose.from_yaml(yaml.safe_dump(_read(name)))


def test_dispatchers_can_be_scaled(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert "container_name" not in service
        assert "ports" not in service


def test_redis_keeps_what_it_was_given(compose: dict[str, Any]) -> None:
    redis = compose["services"]["redis"]
    options = dict(zip(redis["command"][1::2], redis["command"][2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "noeviction"
    assert redis["volumes"] == ["redis-data:/data"]
    assert "redis-data" in compose["volumes"]


def test_dispatcher_starts_after_redis_and_has_time_to_drain(compose: dict[str, Any]) -> None:
    dispatcher = compose["services"]["dispatcher"]
    assert dispatcher["depends_on"]["redis"]["condition"] == "service_healthy"
    assert "healthcheck" in compose["services"]["redis"]
    assert dispatcher["restart"] == "unless-stopped"
    assert _seconds(dispatcher["stop_grace_period"]) > float(dispatcher["environment"]["DRAIN_TIMEOUT"]) + 10


def test_dispatcher_is_given_no_more_than_the_socket(compose: dict[str, Any]) -> None:
    dispatcher = compose["services"]["dispatcher"]
    assert dispatcher["volumes"] == ["/var/run/docker.sock:/var/run/docker.sock"]
    assert dispatcher["group_add"] == ["${DOCKER_GID:-999}"]
    assert dispatcher["read_only"] is True
    assert dispatcher["cap_drop"] == ["ALL"]
    assert "privileged" not in dispatcher


def test_behind_the_proxy_the_dispatcher_has_no_socket() -> None:
    services = _read("compose.socket-proxy.yaml")["services"]
    assert services["dispatcher"]["volumes"] == []
    assert services["dispatcher"]["group_add"] == []
    assert services["dispatcher"]["environment"]["DOCKER_HOST"] == "tcp://socket-proxy:2375"


def test_proxy_lets_through_what_the_backend_needs_only() -> None:
    content = _read("compose.socket-proxy.yaml")
    switches = content["services"]["socket-proxy"]["environment"]
    allowed = {name for name, switch in switches.items() if switch == 1}
    assert allowed == {
        "ALLOW_START", "ALLOW_STOP", "CONTAINERS", "DISTRIBUTION", "EVENTS",
        "IMAGES", "INFO", "PING", "POST", "VERSION",
    }  # fmt: skip
    assert content["services"]["socket-proxy"]["networks"] == ["engine"]
    assert content["networks"]["engine"]["internal"] is True


def test_image_runs_as_somebody_else_and_can_be_stopped_and_watched() -> None:
    lines = (DOCKER / "Dockerfile").read_text().splitlines()
    instructions = {line.split(maxsplit=1)[0]: line for line in lines if line[:1].isupper()}
    user, group = instructions["USER"].removeprefix("USER ").split(":")
    assert int(user) > 0
    assert int(group) > 0
    assert instructions["STOPSIGNAL"] == "STOPSIGNAL SIGTERM"
    assert instructions["ENTRYPOINT"] == 'ENTRYPOINT ["dispatcher"]'
    assert instructions["CMD"] == 'CMD ["serve"]'
    assert "HEALTHCHECK" in instructions
