"""The command line: `medreasoner …`, the same as `python -m cluster.cli …`, and `run_command`, which turns the errors
of any command into a line and an exit code.

The commands are in `cluster.commands`, a module with a Typer application for each kind, whose functions are signatures
and help texts. A command imports what it runs inside its body, because torch, Ray and vLLM take seconds to import and
`--help` should be quick.
"""

import errno
import os
import signal
from collections.abc import Callable

import typer
from pydantic import ValidationError

from cluster.commands.answering import answering_app
from cluster.commands.data import data_app
from cluster.commands.expert import expert_app
from cluster.commands.jobs import jobs_app
from cluster.commands.keys import keys_app
from cluster.commands.planning import planning_app
from cluster.commands.results import results_app
from cluster.commands.runs import runs_app
from cluster.commands.submit import submit_app
from umrg.mistake import Mistake

EXIT_CODES = """\
[bold]Exit codes[/bold]
0    done
1    failed; or the answer is no (doctor, memory, data check, ground)
2    a mistake, or a file that cannot be used: one line says what to do
130  interrupted by Ctrl-C or SIGTERM
"""
"""What docs/cli.md says at length."""

app = typer.Typer(
    help="Train, evaluate and serve models that reason about a medical image and ground the answer in it.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for commands in (jobs_app, submit_app, results_app, answering_app, keys_app, planning_app):
    app.add_typer(commands)
app.add_typer(data_app, name="data")
app.add_typer(expert_app, name="expert")
app.add_typer(runs_app, name="runs")


_REFUSALS = {
    errno.EACCES: "get the right to it, or give another path",
    errno.EPERM: "get the right to it, or give another path",
    errno.EROFS: "give a path that can be written to",
    errno.ENOSPC: "make room there, or give a path on another disk",
    errno.EDQUOT: "make room there, or give a path on another disk",
    errno.EFBIG: "give a path on another disk",
    errno.ENOLCK: "give a path on another disk",
    errno.ENOENT: "give a path that is there or, to write, one that can be made",
    errno.ENOTDIR: "a part of it is a file; give another path",
    errno.EISDIR: "a folder is in the way of the file; give another path, or remove it",
    errno.EEXIST: "something is in the way; give another path, or remove it",
    errno.ENOTEMPTY: "something is in the way; give another path, or remove it",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "its links lead in a circle; give another path",
}
"""Errors of the file system that a user can fix, and how."""


def one_line(error: Mistake | ValidationError) -> str:
    """The error as one line; a ValidationError lists each fault as `place: message`."""
    if isinstance(error, ValidationError):
        faults = (
            (".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")) for fault in error.errors()
        )
        return "; ".join(f"{place}: {message}" if place else message for place, message in faults)
    return " ".join(str(error).split())


def refusal(error: OSError) -> str | None:
    """An error of the file system as one line: the path, the reason and what to do; None where a user cannot fix it."""
    if error.filename is None or error.errno not in _REFUSALS:
        return None
    return " ".join(f"{error.filename}: {os.strerror(error.errno)}; {_REFUSALS[error.errno]}".split())


def run_command(command: Callable[[], object]) -> None:
    """Run `command`. A mistake of the user's, or an error of the file system that a user can fix, becomes the line
    `error: …` on stderr and SystemExit(2), unless MEDREASONER_TRACEBACK=1 is in the environment. Ctrl-C and SIGTERM
    both become SystemExit(130), after everything was cleaned up. All other errors are bugs and pass through.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        command()
    except KeyboardInterrupt:
        typer.secho("interrupted", fg=typer.colors.YELLOW, err=True)
        raise SystemExit(130) from None
    except (Mistake, ValidationError, OSError) as error:
        line = refusal(error) if isinstance(error, OSError) else one_line(error)
        if line is None or os.environ.get("MEDREASONER_TRACEBACK") == "1":
            raise
        typer.secho(f"error: {line}", fg=typer.colors.RED, err=True)
        raise SystemExit(2) from None


def main() -> None:
    """Run the command line."""
    run_command(app)


if __name__ == "__main__":
    main()
