"""What commands write to stdout: JSON, tables, lines and containers' bytes.

Strings that come from tasks, images and other hosts are data: on a terminal no control
character of theirs is ever sent, and nothing in them is read as markup.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console


class OutputClosed(Exception):
    """Whoever read our stdout has gone."""


#: C0 but tab and line end, DEL, C1, and the marks that reorder or break lines of text.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_UNSAFE_OR_BREAK = re.compile(f"[\t\n]|{_UNSAFE.pattern}")


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code in {9, 10, 13}:
        return {9: r"\t", 10: r"\n", 13: r"\r"}[code]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def harmless(text: str) -> str:
    """``text`` with control characters shown instead of sent; tabs and line ends stay."""
    return _UNSAFE.sub(_escape, text)


def one_line(text: str) -> str:
    """``harmless`` with tabs and line ends shown as well."""
    return _UNSAFE_OR_BREAK.sub(_escape, text)


def is_terminal(stream: TextIO) -> bool:
    """Whether a person looks at ``stream``, with a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def colours_wanted() -> bool:
    """https://no-color.org: any value but the empty one says no."""
    return not os.environ.get("NO_COLOR")


def console(stream: TextIO) -> Console:
    """A rich console that reads no markup and honours NO_COLOR."""
    from rich.console import Console

    return Console(
        file=stream,
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=False,
        color_system="auto" if colours_wanted() else None,
    )


def write(data: bytes) -> None:
    """Bytes to stdout, at once. Raises OutputClosed."""
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError as error:
        raise OutputClosed from error


def line(text: str) -> None:
    """One line to stdout. Raises OutputClosed."""
    write(one_line(text).encode("utf-8", "backslashreplace") + b"\n")


def text(lines: str) -> None:
    """Several lines to stdout. Raises OutputClosed."""
    write(harmless(lines).encode("utf-8", "backslashreplace"))


class ContainerOutput:
    """A container's bytes to stdout: as they are, or made harmless if that is a terminal."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace") if sys.stdout.isatty() else None

    def write(self, data: bytes) -> None:
        """Write the next piece. Raises OutputClosed."""
        if self._decoder is not None:
            data = harmless(self._decoder.decode(data).replace("\r\n", "\n")).encode()
        if data:
            write(data)


# --- JSON -------------------------------------------------------------------------------


def json_document(value: Any) -> None:
    """``value`` as one JSON document: dataclasses are objects, times RFC 3339 in UTC.

    Raises OutputClosed.
    """
    document = json.dumps(value, default=_plain, ensure_ascii=False, indent=2)
    # json escapes C0 only; the rest means the same escaped, and does no harm to a terminal.
    document = _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", document)
    write(document.encode() + b"\n")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, datetime):
        return rfc3339(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def rfc3339(time: datetime) -> str:
    """A time in UTC, to the millisecond."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# --- tables -----------------------------------------------------------------------------


def cell(value: object) -> str:
    """A value as people read it; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M:%S") if sys.stdout.isatty() else rfc3339(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return one_line(str(value))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Aligned columns with a header; the last may wrap on a terminal. Raises OutputClosed."""
    cells = [[cell(value) for value in row] for row in rows]
    if is_terminal(sys.stdout):
        try:
            console(sys.stdout).print(rich_table(columns, cells))
        except BrokenPipeError as error:
            raise OutputClosed from error
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in ([*columns], *cells))
    text("".join(f"{row}\n" for row in lines))


def rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    """The same as a rich table, for a live view too; states are coloured."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for index, column in enumerate(columns):
        last = index == len(columns) - 1
        grid.add_column(Text(column), no_wrap=not last, overflow="fold" if last else "ellipsis")
    for row in rows:
        grid.add_row(*(Text(one_line(value), style=_STYLES.get(value, "")) for value in row))
    return grid


_STYLES = {
    "succeeded": "green",
    "ok": "green",
    "running": "cyan",
    "starting": "cyan",
    "pulling": "cyan",
    "failed": "red",
    "not as expected": "bold red",
    "cancelled": "yellow",
    "draining": "yellow",
}
