"""What a person sees when a command fails: one message on stderr and an exit status, no traceback."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from heliostat.errors import Refused

DEBUG = "HELIOSTAT_DEBUG"
"""With this variable set, failures show their traceback, too."""
REFUSED, STOPPED = 2, 130
"""Exit statuses: a wish that cannot be granted; Ctrl-C."""


@contextmanager
def plainly() -> Iterator[None]:
    """Turns refusals, errors of the system and Ctrl-C inside the block into a message and an exit status."""
    try:
        yield
    except Refused as error:
        _fail(str(error), REFUSED)
    except BrokenPipeError:
        raise  # whoever read our output has enough; the caller of this block knows how to leave quietly
    except OSError as error:
        _fail(_named(error), REFUSED)
    except MemoryError as error:
        _fail(f"not enough memory: {error}" if str(error) else "not enough memory", REFUSED)
    except KeyboardInterrupt:
        _fail("stopped", STOPPED)


def tell_error(message: str) -> None:
    """One message on stderr."""
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(message.strip("\n"), err=True)


def stop(message: str) -> NoReturn:
    """Leave because of Ctrl-C, saying what was saved and how it goes on."""
    typer.echo(message, err=True)
    raise typer.Exit(STOPPED)


def _fail(message: str, status: int) -> NoReturn:
    if os.environ.get(DEBUG):
        traceback.print_exc(file=sys.stderr)
    if status == STOPPED:
        stop(message)
    tell_error(message)
    raise typer.Exit(status)


def _named(error: OSError) -> str:
    """The system's words, and the file they are about where there is one."""
    what = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {what}" if error.filename else what
