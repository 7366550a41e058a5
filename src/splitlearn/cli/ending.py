"""How a command ends: 0 done, 1 failed, 2 wrong use, and one line on stderr that says what to do."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import typer

from splitlearn.errors import SplitLearnError

FAILED = 1
WRONG_USE = 2
TERMINATED = 143

# The common base of all that is wrong about a command's words; typer gives it no public name.
UsageError = cast(type[Any], typer.BadParameter.__base__)


@contextmanager
def one_line_errors(*, debug: bool) -> Iterator[None]:
    """Whatever is raised within ends the command; `debug` shows where it was raised."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except UsageError as error:
        _say(_usage_line(error))
        raise typer.Exit(WRONG_USE) from None
    except SplitLearnError as error:
        _fail(error.message, debug)
    except Exception as error:
        hint = "" if debug else "; `splitlearn --debug VERB ...` shows where"
        _fail(f"{type(error).__name__}: {error}{hint}", debug)


def _fail(message: str, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    _say(message)
    raise typer.Exit(FAILED) from None


def _say(message: str) -> None:
    print("error:", " ".join(message.split()), file=sys.stderr)


def _usage_line(error: Any) -> str:
    command = error.ctx.command_path if error.ctx else "splitlearn"
    message = " ".join(error.format_message().split()).removesuffix(".").replace("Value error, ", "")
    return f"{message}; see {command} --help"
