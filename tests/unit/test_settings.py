"""Every setting: where it may come from, what it may be, and what is said if it may not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dispatcher.errors import ConfigurationError
from dispatcher.settings import Settings, is_secret, load

SECRET = "hunter2"
URL = f"redis://user:{SECRET}@example.com:6379/0"


@pytest.fixture(autouse=True)
def _nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.delenv(f"{name.upper()}_FILE", raising=False)


def problems(config: Path | None = None, **flags: object) -> list[str]:
    with pytest.raises(ConfigurationError) as refused:
        load(flags, config)
    assert SECRET not in str(refused.value)
    return refused.value.problems


def toml(directory: Path, text: str) -> Path:
    file = directory / "dispatcher.toml"
    file.write_text(text)
    return file


def test_the_defaults_are_the_contracts() -> None:
    loaded = load()
    s = loaded.settings
    assert s.queue_redis == s.state_redis == "redis://localhost:6379/0"
    assert (s.queue_source, s.queue_stream_name, s.queue_consumer_group) == (
        "redis-stream", "dispatcher:tasks", "dispatchers",
    )  # fmt: skip
    assert s.queues == {"high": 6, "default": 3, "low": 1}
    assert (s.num_consumers, s.max_concurrent_pulls, s.max_waiting_pulls) == (10, 4, 100)
    assert (s.pull_stall_timeout, s.lease_seconds, s.drain_timeout) == (120, 30, 30)
    assert (s.task_default_timeout, s.task_max_timeout, s.task_retention) == (3_600, 86_400, 86_400)
    assert (s.task_max_bytes, s.queue_max_length) == (65_536, 0)
    assert (s.log_tail_bytes, s.log_tail_total_bytes) == (65_536, 268_435_456)
    assert (s.results_max_length, s.infra_max_attempts) == (100_000, 10)
    assert (s.backend, s.security_profile, s.default_network) == ("docker", "baseline", "bridge")
    assert s.allowed_networks == ("none", "bridge")
    assert (s.log_level, s.log_format, s.health_port) == ("info", "auto", None)
    assert set(loaded.sources.values()) == {"default"}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("linux/amd64", "linux/amd64"),
        ("linux/arm64/v8", "linux/arm64/v8"),
        ("Linux/x86_64", "linux/amd64"),
        ("linux/aarch64", "linux/arm64"),
    ],
)
def test_platforms_are_named_as_engines_do(monkeypatch: pytest.MonkeyPatch, given: str, meant: str) -> None:
    monkeypatch.setenv("DOCKER_DEFAULT_PLATFORM", given)
    assert load().settings.docker_default_platform == meant


BAD = [
    ("DOCKER_DEFAULT_PLATFORM", "amd64", "must be os/arch or os/arch/variant"),
    ("DOCKER_DEFAULT_PLATFORM", "linux/", "must be os/arch or os/arch/variant"),
    ("DOCKER_DEFAULT_PLATFORM", "linux/arm64/v8/x", "must be os/arch or os/arch/variant"),
    ("DOCKER_DEFAULT_PLATFORM", "linux/a b", "must be os/arch or os/arch/variant"),
    ("REDIS_URL", "http://example.com", "redis://"),
    ("REDIS_URL", "redis+sentinel://a:1", "must name the master"),
    ("REDIS_URL", "redis+sentinel://a:1/m/x", "must read redis+sentinel://"),
    ("REDIS_URL", "redis+sentinel://a:0/m/0", "each sentinel must read host[:port]"),
    ("REDIS_URL", "redis+sentinel://a,,b/m/0", "each sentinel must read host[:port]"),
    ("REDIS_URL", "redis+sentinel://a/m?password=x", "sentinel_username and sentinel_password only"),
    ("REDIS_URL", "redis://example.com:99999", "port"),
    ("REDIS_URL", "redis://[::1", "URL"),
    ("STATE_REDIS_URL", "localhost:6379", "redis://"),
    ("QUEUE_SOURCE", "kafka", "'redis-stream'"),
    ("QUEUE_STREAM_NAME", "a{b}", "braces"),
    ("QUEUE_STREAM_NAME", "a b", "white space"),
    ("QUEUE_STREAM_NAME", "x" * 201, "200 characters"),
    ("QUEUE_CONSUMER_GROUP", "a b", "pattern"),
    ("QUEUES", "Default:1", "[a-z0-9-]{1,24}"),
    ("QUEUES", "a:1,a:2", "named twice"),
    ("QUEUES", "a:x", "whole number"),
    ("QUEUES", "a:-1", "whole number"),
    ("QUEUES", "a:1001", "from 0 to 1000"),
    ("QUEUES", "results:1", "reserved"),
    ("QUEUES", ",", "at least one queue"),
    ("NUM_CONSUMERS", "0", "greater than or equal to 1"),
    ("NUM_CONSUMERS", "ten", "whole number"),
    ("MAX_CONCURRENT_PULLS", "0", "greater than or equal to 1"),
    ("MAX_WAITING_PULLS", "-1", "greater than or equal to 1"),
    ("PULL_STALL_TIMEOUT", "0", "greater than 0"),
    ("IMAGE_DISK_HIGH", "much", "256MiB"),
    ("IMAGE_DISK_LOW", "-1", "256MiB"),
    ("BACKEND", "Docker Engine", "'docker' or 'process'"),
    ("ALLOW_PROCESS_BACKEND", "perhaps", "true or false"),
    ("HEALTH_PORT", "70000", "less than or equal to 65535"),
    ("INSTANCE_ID", "a/b", "pattern"),
    ("LEASE_SECONDS", "0.1", "greater than or equal to 0.5"),
    ("LEASE_SECONDS", "nan", ""),
    ("DRAIN_TIMEOUT", "-1", "greater than or equal to 0"),
    ("DRAIN_TIMEOUT", "inf", "less than or equal"),
    ("TASK_DEFAULT_TIMEOUT", "0", "greater than 0"),
    ("TASK_MAX_TIMEOUT", "inf", "finite"),
    ("TASK_RETENTION", "0", "greater than 0"),
    ("TASK_MAX_BYTES", "1", "greater than or equal to 256"),
    ("TASK_MAX_BYTES", "64 potatoes", "256MiB"),
    ("QUEUE_MAX_LENGTH", "-1", "greater than or equal to 0"),
    ("LOG_TAIL_BYTES", "-1", "256MiB"),
    ("LOG_TAIL_TOTAL_BYTES", "x", "256MiB"),
    ("RESULTS_MAX_LENGTH", "0", "greater than or equal to 1"),
    ("INFRA_MAX_ATTEMPTS", "0", "greater than or equal to 1"),
    ("SECURITY_PROFILE", "none", "'baseline' or 'restricted'"),
    ("DEFAULT_NETWORK", "x" * 129, "128 characters"),
    ("TASK_MAX_CPUS", "0", "greater than 0"),
    ("TASK_MAX_CPUS", "nan", ""),
    ("TASK_MAX_CPUS", "inf", ""),
    ("TASK_MAX_MEMORY", "lots", "256MiB"),
    ("TASK_DEFAULT_MEMORY", "1.5g", "256MiB"),
    ("LOG_LEVEL", "loud", "'debug', 'info', 'warning' or 'error'"),
    ("LOG_FORMAT", "xml", "'auto', 'json' or 'console'"),
]


@pytest.mark.parametrize(("name", "value", "says"), BAD)
def test_a_wrong_value_is_told_with_its_name_and_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(name, value)
    (problem,) = problems()
    assert problem.startswith(f"{name}: ")
    assert says in problem
    assert "\n" not in problem


def test_all_wrong_values_are_told_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {name: value for name, value, _ in BAD}.items():
        monkeypatch.setenv(name, value)
    config = toml(tmp_path, "nonsense = 1\n")
    told = problems(config)
    assert {line.split(":")[0] for line in told} == {name for name, _, _ in BAD} | {"nonsense"}


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"TASK_DEFAULT_TIMEOUT": "10", "TASK_MAX_TIMEOUT": "5"}, "TASK_DEFAULT_TIMEOUT"),
        ({"TASK_DEFAULT_MEMORY": "2g", "TASK_MAX_MEMORY": "1g"}, "TASK_DEFAULT_MEMORY"),
        ({"LOG_TAIL_BYTES": "2g", "LOG_TAIL_TOTAL_BYTES": "1g"}, "LOG_TAIL_BYTES"),
        ({"IMAGE_DISK_LOW": "2g", "IMAGE_DISK_HIGH": "1g"}, "IMAGE_DISK_LOW"),
        ({"IMAGE_DISK_LOW": "0"}, "IMAGE_DISK_LOW"),
    ],
)
def test_what_is_wrong_only_together_is_told(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], name: str
) -> None:
    for variable, value in values.items():
        monkeypatch.setenv(variable, value)
    (problem,) = problems()
    assert problem.startswith(f"{name}: ")


def test_images_are_brought_down_to_four_fifths_unless_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load().settings.image_disk_high is None
    monkeypatch.setenv("IMAGE_DISK_HIGH", "50GB")
    assert load().settings.image_disk_goal == 40 * 1024**3
    monkeypatch.setenv("IMAGE_DISK_LOW", "50GB")
    assert load().settings.image_disk_goal == load().settings.image_disk_high
    monkeypatch.setenv("IMAGE_DISK_LOW", "0")
    assert load().settings.image_disk_goal == 0


def test_flags_go_before_environment_before_file_before_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = toml(tmp_path, 'num_consumers = 1\nlease_seconds = 2\nlog_level = "error"\n')
    monkeypatch.setenv("NUM_CONSUMERS", "3")
    monkeypatch.setenv("LEASE_SECONDS", "4")
    loaded = load({"NUM_CONSUMERS": 5, "LEASE_SECONDS": None}, config)
    s = loaded.settings
    assert (s.num_consumers, s.lease_seconds, s.log_level, s.drain_timeout) == (5, 4, "error", 30)
    assert {
        name: loaded.sources[name]
        for name in ("num_consumers", "lease_seconds", "log_level", "drain_timeout")
    } == {
        "num_consumers": "flag",
        "lease_seconds": "environment",
        "log_level": "config",
        "drain_timeout": "default",
    }
    assert load().settings.log_level == "info", "the file of one call is not the next one's"


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUM_CONSUMERS", "")
    loaded = load()
    assert (loaded.settings.num_consumers, loaded.sources["num_consumers"]) == (10, "default")


def test_queues_and_networks_are_lists_in_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUEUES", " high:6 , low,idle:0 ")
    monkeypatch.setenv("ALLOWED_NETWORKS", "none, inner")
    s = load().settings
    assert s.queues == {"high": 6, "low": 1, "idle": 0}
    assert s.allowed_networks == ("none", "inner")


def test_queues_and_networks_may_be_tables_in_a_file(tmp_path: Path) -> None:
    config = toml(tmp_path, 'allowed_networks = ["none"]\ntask_max_memory = "1g"\n[queues]\nhigh = 2\n')
    s = load(config=config).settings
    assert (s.queues, s.allowed_networks, s.task_max_memory) == ({"high": 2}, ("none",), 1024**3)


def test_a_secret_may_come_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text(f"{URL}\n")
    monkeypatch.setenv("REDIS_URL_FILE", str(file))
    loaded = load()
    assert loaded.settings.queue_redis == loaded.settings.state_redis == URL
    assert loaded.sources["redis_url"] == "file"
    assert SECRET not in repr(loaded)
    assert load({"redis_url": "redis://flag"}).settings.queue_redis == "redis://flag"


def test_only_secrets_are_read_from_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUM_CONSUMERS_FILE", str(tmp_path / "nothing"))
    assert load().settings.num_consumers == 10
    assert {name for name in Settings.model_fields if is_secret(name)} == {"redis_url", "state_redis_url"}


def test_a_secret_given_twice_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text(URL)
    monkeypatch.setenv("REDIS_URL", URL)
    monkeypatch.setenv("REDIS_URL_FILE", str(file))
    assert problems() == ["REDIS_URL: REDIS_URL_FILE is set as well; give one of them"]


def test_a_secret_file_that_cannot_be_read_is_told_with_all_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(SECRET.encode() + b"\xff")
    monkeypatch.setenv("REDIS_URL_FILE", str(tmp_path / "nothing"))
    monkeypatch.setenv("STATE_REDIS_URL_FILE", str(binary))
    monkeypatch.setenv("NUM_CONSUMERS", "0")
    told = problems()
    assert {line.split(":")[0] for line in told} == {
        "REDIS_URL_FILE",
        "STATE_REDIS_URL_FILE",
        "NUM_CONSUMERS",
    }


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{SECRET}@example.com",
        f"redis://user:{SECRET}@example.com:port",
        f"redis://user:{SECRET}@[::1",
        f"redis://user:{SECRET}\N{CARE OF}@example.com",
        f"redis+sentinel://:{SECRET}@a:1",
        f"redis+sentinel://:{SECRET}@a:port/m/0",
        f"redis+sentinel://:/{SECRET}@a/m/0",
        f"redis+sentinel://a/m/0?sentinel_pass={SECRET}",
        SECRET,
    ],
)
@pytest.mark.parametrize("name", ["REDIS_URL", "STATE_REDIS_URL"])
def test_a_wrong_secret_is_never_told(monkeypatch: pytest.MonkeyPatch, name: str, url: str) -> None:
    monkeypatch.setenv(name, url)
    (problem,) = problems()
    assert problem.startswith(f"{name}: ")


def test_a_secret_in_a_file_of_settings_is_never_told(tmp_path: Path) -> None:
    config = toml(tmp_path, f'redis_url = "http://:{SECRET}@x"\nnum_consumers = 0\nextra = "{SECRET}"\n')
    assert len(problems(config)) == 3


def test_an_unknown_key_of_the_file_is_an_error(tmp_path: Path) -> None:
    (problem,) = problems(toml(tmp_path, "num_consumer = 1\n"))
    assert problem.startswith("num_consumer: unknown setting in ")


@pytest.mark.parametrize("text", ["num_consumers = ", f'redis_url = "{SECRET}\n'])
def test_a_malformed_file_is_told_without_its_content(tmp_path: Path, text: str) -> None:
    (problem,) = problems(toml(tmp_path, text))
    assert problem.startswith(f"--config: {tmp_path}")
    assert "is not valid TOML" in problem


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    assert problems(tmp_path / "nothing.toml") == [f"--config: {tmp_path / 'nothing.toml'} does not exist"]
    assert problems(tmp_path) == [f"--config: {tmp_path} is a directory"]


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost:6379/prod",
        "redis://:p@ss/hunter2@localhost:6379/0",
        "redis://user:hunter2@local host",
        "redis:///0",
    ],
)
def test_a_redis_url_that_would_lead_elsewhere_is_refused_without_being_shown(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("REDIS_URL", url)
    (problem,) = problems()
    assert problem.startswith("REDIS_URL: must read redis://")
    assert "hunter2" not in problem


def test_every_instance_has_a_name_of_its_own() -> None:
    assert load().settings.instance_id != load().settings.instance_id


def test_unrelated_variables_disturb_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUEUES_OF_SOMEBODY_ELSE", "x")
    load()
    assert os.environ["QUEUES_OF_SOMEBODY_ELSE"] == "x"
