"""The docs: complete where they promise to be, and true where that can be seen."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from dispatcher.cli.app import app
from dispatcher.model import Reason, State
from dispatcher.queue.wire import parse_document
from dispatcher.settings import Settings
from dispatcher.task import Backoff, Resources, Task

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
#: | `NAME` | `default` | meaning |
_SETTING = re.compile(r"^\| `([A-Z_]+)` \| ([^|]+) \|", re.MULTILINE)
_METRIC = re.compile(r'"(dispatcher_[a-z_]+)"')


def page(name: str) -> str:
    return (DOCS / name).read_text("utf-8")


def blocks(path: Path, language: str) -> list[str]:
    return [code for name, code in _BLOCK.findall(path.read_text("utf-8")) if name == language]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(path: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    text = _BLOCK.sub("", path.read_text("utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in _HEADING.findall(text)}


def commands() -> Iterator[str]:
    """Every command that can be called, with the group it is in."""
    root = typer.main.get_command(app)
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        below = getattr(command, "commands", {})
        if not below or command.invoke_without_command:
            yield name
        yield from (f"{name} {part}" for part in below)


def enqueued(text: str) -> list[bytes]:
    """The documents that redis-cli's lines in ``text`` put into a stream."""
    words = [
        shlex.split(line) for line in text.splitlines() if line.startswith("redis-cli ") and "XADD" in line
    ]
    return [line[line.index("task") + 1].encode() for line in words]


# --- complete ---------------------------------------------------------------------------


def test_every_setting_is_described_with_its_default() -> None:
    told = dict(_SETTING.findall(page("settings.md")))
    assert set(told) == {name.upper() for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        default = told[name.upper()].strip()
        if field.default_factory is not None:
            continue
        assert (default == "none") is (field.default is None), name
        if default != "none":
            assert getattr(Settings(**{name: default.strip("`")}), name) == field.default, name


def test_every_command_is_described() -> None:
    told = page("commands.md")
    assert [command for command in commands() if not re.search(rf"`dispatcher {command}[` ]", told)] == []


def test_every_field_of_a_task_is_described() -> None:
    fields = [*Task.model_fields]
    fields += [f"resources.{name}" for name in Resources.model_fields]
    fields += [f"backoff.{name}" for name in Backoff.model_fields]
    assert [name for name in fields if f"| `{name}` |" not in page("tasks.md")] == []


def test_every_state_and_reason_is_described() -> None:
    assert [name for name in [*State, *Reason] if f"| `{name}` |" not in page("tasks.md")] == []


def test_every_metric_is_described() -> None:
    names = {
        name for file in (ROOT / "dispatcher").rglob("*.py") for name in _METRIC.findall(file.read_text())
    }
    assert names
    assert sorted(name for name in names if f"| `{name}` |" not in page("operations.md")) == []


def test_every_page_is_in_the_index() -> None:
    assert [
        p.name for p in DOCS.glob("*.md") if p.name != "index.md" and f"({p.name})" not in page("index.md")
    ] == []


# --- true -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_links_lead_somewhere(path: Path) -> None:
    for link in _LINK.findall(_CODE.sub("", path.read_text("utf-8"))):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert target.resolve().is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_code_can_be_read(path: Path) -> None:
    for code in blocks(path, "python"):
        compile(code, relative(path), "exec")
    for code in blocks(path, "json"):
        json.loads(code)


def test_tasks_in_the_docs_are_tasks() -> None:
    documents = [document for path in PAGES for code in blocks(path, "sh") for document in enqueued(code)]
    documents += [code.encode() for code in blocks(DOCS / "tasks.md", "json")]
    assert enqueued(page("queue.md"))
    assert enqueued((ROOT / "README.md").read_text("utf-8"))
    for document in documents:
        parse_document(document)
