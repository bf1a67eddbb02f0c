"""Logs on stderr: JSON for machines, lines for people, and never a program's locals."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from dispatcher.cli.output import colours_wanted, harmless, is_terminal, one_line


def configure(level: str, style: str) -> None:
    """Send this program's events, and other packages' warnings, to stderr.

    ``level`` and ``style`` are LOG_LEVEL and LOG_FORMAT.
    """
    as_json = style == "json" or (style == "auto" and not sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        # The plain formatter: one that shows locals would show secrets.
        structlog.processors.format_exc_info,
        _made_harmless,
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(
            colors=is_terminal(sys.stderr) and colours_wanted(),
            exception_formatter=structlog.dev.plain_traceback,
        )
    )
    threshold = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    # What uvicorn, docker and urllib3 say below a warning is about their insides.
    logging.basicConfig(handlers=[handler], level=max(threshold, logging.WARNING), force=True)


def _made_harmless(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in event.items():
        if isinstance(value, str):
            # A trace has lines; in anything else a line end would forge an event.
            event[name] = harmless(value) if name == "exception" else one_line(value)
    return event
