"""``config`` and ``schema``."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from dispatcher.cli import output
from dispatcher.cli.session import Session
from dispatcher.cli.tasks import Json

app = typer.Typer()

_TOML_HEAD = """\
# Settings of the dispatcher: `dispatcher --config FILE ...`. Every setting is here with its default,
# commented out; one with nothing behind the sign has none. A flag (--set NAME=VALUE) and an environment
# variable (the name in capitals) win over what stands here. `dispatcher config` shows what is in effect.
"""


@app.command()
def config(
    context: typer.Context,
    json: Json = False,
    toml: Annotated[
        bool, typer.Option("--toml", help="Print the reference file: every setting with its default.")
    ] = False,
) -> None:
    """Show the settings in effect.

    Each with where it comes from; secrets are masked.
    """
    if toml:
        output.text(reference_toml())
        return
    loaded = Session.of(context).load()
    rows = [
        {
            "name": name.upper(),
            "value": _shown(getattr(loaded.settings, name)),
            "source": source,
            "description": type(loaded.settings).model_fields[name].description,
        }
        for name, source in loaded.sources.items()
    ]
    if json:
        output.json_document(rows)
        return
    output.table(
        ("SETTING", "SOURCE", "VALUE"), [(row["name"], row["source"], _told(row["value"])) for row in rows]
    )


@app.command()
def schema(
    json: Annotated[bool, typer.Option("--json", hidden=True, help="It is JSON anyway.")] = True,
) -> None:
    """Print the JSON Schema of a task."""
    from dispatcher.task import Task

    document = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Task.model_json_schema()}
    output.json_document(document)


def reference_toml() -> str:
    """The commented reference file, ``config/dispatcher.toml`` of the sources."""
    from dispatcher.settings import Settings

    parts = [_TOML_HEAD]
    for name, field in Settings.model_fields.items():
        # What is made at the start differs from one start to the next: there is nothing to print.
        default = None if field.is_required() or field.default_factory else _plain(field.default)
        value = "" if default is None else f" {_toml(default)}"
        parts.append(f"# {field.description}\n#{name} ={value}\n")
    return "\n".join(parts)


def _plain(value: Any) -> Any:
    """A setting's value in the types that JSON and TOML have."""
    from pydantic import SecretStr

    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _shown(value: Any) -> Any:
    from pydantic import SecretStr

    from dispatcher.redis_url import masked

    return masked(value.get_secret_value()) if isinstance(value, SecretStr) else _plain(value)


def _told(value: Any) -> str:
    """A value as it is written in an environment variable."""
    if isinstance(value, dict):
        return ",".join(f"{name}:{weight}" for name, weight in value.items())
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(part)}" for name, part in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # Strings, numbers and booleans are written alike in both.
    return json_module.dumps(value)
