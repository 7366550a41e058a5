"""What the log looks like and what it may hold: figures and names, never an activation, never any text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import structlog

LONGEST_VALUE = 300
_OURS = frozenset({"exc_info", "stack_info"})


def log_to_stderr(*, as_json: bool = False) -> None:
    """Lines for people, or one JSON object a line; never on stdout, which belongs to the command's result."""
    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            keep_out_content,
            *_renderers(as_json),
        ],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def keep_out_content(logger: Any, method: str, entry: Any) -> Any:
    """A value that could hold what a client sent is replaced by the name of its type."""
    return {name: value if name in _OURS else _shown(value) for name, value in entry.items()}


def _shown(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str) and len(value) <= LONGEST_VALUE:
        return value
    return f"<{type(value).__name__}>"


def _renderers(as_json: bool) -> Sequence[Callable[..., Any]]:
    # The library's own way to show exceptions prints local variables, and those are activations.
    if as_json:
        return (structlog.processors.format_exc_info, structlog.processors.JSONRenderer())
    return (
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        ),
    )
