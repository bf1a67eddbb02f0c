"""The Dockerfile and the compose files: what they promise, and that they build and run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compose_spec
import pytest
import yaml

from tests.support.base_image import python_archive
from tests.support.engine import EngineUnderTest

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"


#: A reference to a variable of the environment, with the value it has without one.
_VARIABLE = re.compile(r"\$\{\w+:-([^}]*)\}")
BASE = "dispatcher-test/python:1"
IMAGE = "dispatcher-test/dispatcher:1"


class _Loader(yaml.SafeLoader):
    """Reads compose's ``!reset`` as the value it resets to."""


def _reset(loader: _Loader, node: yaml.SequenceNode) -> list[Any]:
    return loader.construct_sequence(node)


_Loader.add_constructor("!reset", _reset)


def _read(name: str) -> dict[str, Any]:
    content = yaml.load(_VARIABLE.sub(r"\1", (DOCKER / name).read_text()), _Loader)
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
    assert dispatcher["group_add"] == ["999"]
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
        "IMAGES", "INFO", "PING", "POST", "SYSTEM", "VERSION",
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


# --- built and run ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image(engine: EngineUnderTest) -> Iterator[str]:
    """The image, built from the Dockerfile as it stands on a base made of this machine's Python."""
    client = engine.client
    repository, _, tag = BASE.partition(":")
    client.import_image_from_data(python_archive(), repository=repository, tag=tag)
    steps = client.build(
        path=str(ROOT),
        dockerfile="docker/Dockerfile",
        tag=IMAGE,
        buildargs={"BASE_IMAGE": BASE},
        network_mode="host",
        rm=True,
        forcerm=True,
        decode=True,
    )
    output = list(steps)
    assert not [step for step in output if "error" in step], output[-20:]
    yield IMAGE
    client.remove_image(IMAGE, force=True)
    client.remove_image(BASE, force=True)


def _run(engine: EngineUnderTest, image: str, **options: Any) -> tuple[int, str]:
    """Run a container of ``image``, hardened as compose.yaml has it; its exit code and output."""
    client = engine.client
    hardened = client.create_host_config(
        read_only=True, cap_drop=["ALL"], security_opt=["no-new-privileges"], network_mode=engine.network
    )
    container = client.create_container(image, host_config=hardened, **options)["Id"]
    try:
        client.start(container)
        code = client.wait(container, timeout=50)["StatusCode"]
        return code, client.logs(container).decode()
    finally:
        client.remove_container(container, force=True)


# Two stages, and pip downloads what the package needs.
@pytest.mark.timeout(300)
class TestImage:
    """The image that the Dockerfile makes."""

    def test_metadata(self, engine: EngineUnderTest, image: str) -> None:
        config = engine.client.inspect_image(image)["Config"]
        assert config["Entrypoint"] == ["dispatcher"]
        assert config["Cmd"] == ["serve"]
        assert config["StopSignal"] == "SIGTERM"
        assert config["User"] == "65532:65532"
        assert config["Healthcheck"]["Test"][0] == "CMD"

    def test_command_line_answers(self, engine: EngineUnderTest, image: str) -> None:
        code, output = _run(engine, image, command=["--help"])
        assert code == 0, output
        assert "serve" in output

    def test_package_is_whole_and_its_user_is_nobody(
        self,
        engine: EngineUnderTest,
        image: str,
    ) -> None:
        program = "import os, dispatcher.service, dispatcher.backends.docker; print(os.getuid(), os.getgid())"
        code, output = _run(engine, image, entrypoint=["python3", "-c", program])
        assert (code, output) == (0, "65532 65532\n")

    def test_one_that_does_not_answer_is_unhealthy(
        self,
        engine: EngineUnderTest,
        image: str,
    ) -> None:
        check = engine.client.inspect_image(image)["Config"]["Healthcheck"]["Test"][1:]
        code, output = _run(engine, image, entrypoint=check)
        assert code != 0
        assert "ConnectionRefusedError" in output
