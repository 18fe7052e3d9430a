"""How every command of the project ends: a user's mistake is one line on stderr and exit code 2."""

import errno
import os
import signal
from collections.abc import Callable

import typer
from pydantic import ValidationError

_REFUSALS = {
    errno.EACCES: "get the right to it, or give another path",
    errno.EPERM: "get the right to it, or give another path",
    errno.EROFS: "give a path that can be written to",
    errno.ENOSPC: "make room there, or give a path on another disk",
    errno.EDQUOT: "make room there, or give a path on another disk",
    errno.EFBIG: "give a path on another disk",
    errno.ENOENT: "give a path that is there or, to write, one that can be made",
    errno.ENOTDIR: "a part of it is a file; give another path",
    errno.EISDIR: "a folder is in the way of the file; give another path, or remove it",
    errno.EEXIST: "something is in the way; give another path, or remove it",
    errno.ENOTEMPTY: "something is in the way; give another path, or remove it",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "its links lead in a circle; give another path",
}
"""What the file system refuses and a user can mend, and how."""


def one_line(error: ValueError) -> str:
    """The error as one line; of a ValidationError each fault as `place: message`."""
    if isinstance(error, ValidationError):
        faults = (
            (".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")) for fault in error.errors()
        )
        return "; ".join(f"{place}: {message}" if place else message for place, message in faults)
    return " ".join(str(error).split())


def refusal(error: OSError) -> str | None:
    """What the file system refused, as one line: the path, the reason, what to do. None where it is no such error."""
    if error.filename is None or error.errno not in _REFUSALS:
        return None
    return " ".join(f"{error.filename}: {os.strerror(error.errno)}; {_REFUSALS[error.errno]}".split())


def run_command(command: Callable[[], object]) -> None:
    """Run `command`; a ValueError, or a file that the file system refuses, becomes the line `error: …` on stderr, and
    SystemExit(2).

    With MEDREASONER_TRACEBACK=1 in the environment it is raised as it is. Ctrl-C and SIGTERM end it alike, with
    SystemExit(130) once everything is cleaned up. Everything else is a fault of ours and passes through.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        command()
    except KeyboardInterrupt:
        typer.secho("interrupted", fg=typer.colors.YELLOW, err=True)
        raise SystemExit(130) from None
    except (ValueError, OSError) as error:
        line = one_line(error) if isinstance(error, ValueError) else refusal(error)
        if line is None or os.environ.get("MEDREASONER_TRACEBACK") == "1":
            raise
        typer.secho(f"error: {line}", fg=typer.colors.RED, err=True)
        raise SystemExit(2) from None
