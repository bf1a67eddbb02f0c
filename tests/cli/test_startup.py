"""How the program begins: help, versions, settings, and what is wrong with them."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest

from dispatcher import __version__
from dispatcher.cli import main
from dispatcher.redis_url import masked
from dispatcher.settings import Settings, load
from tests.cli.program import Program

REFERENCE = Path(__file__).parents[2] / "config" / "dispatcher.toml"
NOBODY = "redis://127.0.0.1:1/0"
HEAVY = {"anyio", "docker", "opentelemetry", "pydantic", "redis", "rich", "starlette", "structlog", "uvicorn"}


@pytest.fixture
def alone(tmp_path: Path) -> Program:
    """The program without a Redis."""
    return Program(NOBODY, tmp_path)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom dispatcher.cli import main\n"
        "try:\n    main()\nfinally:\n    print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stderr.decode().split()}
    assert loaded & HEAVY == set()
    assert done.stdout


def test_the_console_script_is_there_and_tells_its_version() -> None:
    script = Path(sys.executable).with_name("dispatcher")
    done = subprocess.run([script, "--version"], capture_output=True, check=True)
    assert done.stdout.decode() == f"dispatcher {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["list", "--nonsense"],
        ["status"],
        ["--set", "no-equals-sign", "list"],
        ["submit"],
        ["submit", "busybox", "ls"],
        ["submit", "Not An Image"],
        ["submit", "busybox", "--file", "/no/such/file"],
        ["list", "--state", "happy"],
        ["logs", "x", "-f", "--json"],
        ["--config", "/no/such/file", "list"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2_and_told_on_stderr(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In this process, for they are many; the others show that the program exits with what it says.
    monkeypatch.setattr(sys, "argv", ["dispatcher", "--redis-url", NOBODY, *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert ended.value.code == 2
    assert told.out == ""
    assert told.err
    assert "Traceback" not in told.err


def test_all_wrong_settings_are_told_at_once_a_line_each(alone: Program) -> None:
    done = alone.run("--set", "backend=!", "list", NUM_CONSUMERS="many", HEALTH_PORT="0", exit_code=2)
    lines = done.stderr.decode().splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == ["BACKEND", "HEALTH_PORT", "NUM_CONSUMERS"]


def test_who_cannot_reach_redis_is_4_and_one_line(alone: Program) -> None:
    for arguments in (["list"], ["submit", "busybox"]):
        done = alone.run(*arguments, exit_code=4)
        assert done.stdout == b""
        (line,) = done.stderr.decode().splitlines()
        assert line.startswith("dispatcher: Redis does not answer")


def test_config_tells_values_sources_and_no_secrets(alone: Program, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('lease_seconds = 12.5\nredis_url = "redis://from-file"\n')
    arguments = ["--config", str(file), "--set", "num_consumers=7", "config"]
    shown = alone.json(*arguments, REDIS_URL="redis://me:hunter2@example.com:1234/3")
    found = {row["name"]: (row["value"], row["source"]) for row in shown}
    assert found["NUM_CONSUMERS"] == (7, "flag")
    assert found["REDIS_URL"] == ("redis://me:***@example.com:1234/3", "environment")
    assert found["LEASE_SECONDS"] == (12.5, "config")
    assert found["TASK_MAX_BYTES"] == (65_536, "default")
    table = alone.run(*arguments, REDIS_URL="rediss://h/0?password=hunter2").stdout.decode()
    assert "hunter2" not in table
    assert "QUEUES" in table


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("unix:///run/redis.sock?db=1", "unix:///run/redis.sock?db=1"),
        ("redis://:secret@h:1/0", "redis://:***@h:1/0"),
        ("redis://u:se@cret@h", "redis://u:***@h"),
        ("unix:///run/redis.sock?password=secret", "unix:///run/redis.sock?***"),
        ("redis://u:12/secret@h", "redis://***"),
    ],
)
def test_no_url_shows_its_password(url: str, shown: str) -> None:
    assert masked(url) == shown


def test_the_reference_file_is_what_the_program_prints(alone: Program) -> None:
    assert alone.run("config", "--toml").stdout.decode() == REFERENCE.read_text()


def test_the_reference_file_holds_every_default(tmp_path: Path) -> None:
    lines = [line.removeprefix("#") for line in REFERENCE.read_text().splitlines()]
    given = [line for line in lines if line and not line.startswith(" ") and not line.endswith(" =")]
    file = tmp_path / "all.toml"
    file.write_text("\n".join(given))
    every, none = load(config=file).settings, load().settings
    made_at_start = {"instance_id"}
    assert every.model_dump(exclude=made_at_start) == none.model_dump(exclude=made_at_start)
    named = {line.partition(" =")[0] for line in lines if " =" in line}
    assert named >= set(Settings.model_fields)
    assert tomllib.loads(file.read_text()).keys() <= set(Settings.model_fields)


def test_schema_is_the_tasks_json_schema(alone: Program) -> None:
    schema = json.loads(alone.run("schema").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate({"image": "busybox", "command": ["true"]}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"command": ["true"]}, schema)
