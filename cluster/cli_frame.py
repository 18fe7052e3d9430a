"""How every command of the project ends: a user's mistake is one line on stderr and exit code 2."""

import os
import signal
from collections.abc import Callable

import typer
from pydantic import ValidationError


def one_line(error: ValueError) -> str:
    """The error as one line; of a ValidationError each fault as `place: message`."""
    if isinstance(error, ValidationError):
        faults = (
            (".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")) for fault in error.errors()
        )
        return "; ".join(f"{place}: {message}" if place else message for place, message in faults)
    return " ".join(str(error).split())


def run_command(command: Callable[[], object]) -> None:
    """Run `command`; a ValueError becomes the line `error: …` on stderr, and SystemExit(2).

    With MEDREASONER_TRACEBACK=1 in the environment it is raised as it is. Ctrl-C and SIGTERM end it alike, with
    SystemExit(130) once everything is cleaned up. Everything else is a fault of ours and passes through.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        command()
    except KeyboardInterrupt:
        typer.secho("interrupted", fg=typer.colors.YELLOW, err=True)
        raise SystemExit(130) from None
    except ValueError as error:
        if os.environ.get("MEDREASONER_TRACEBACK") == "1":
            raise
        typer.secho(f"error: {one_line(error)}", fg=typer.colors.RED, err=True)
        raise SystemExit(2) from None
