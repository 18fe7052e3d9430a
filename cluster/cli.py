"""The command line: `medreasoner …`, which is `python -m cluster.cli …`.

A command imports what it runs inside its body: torch, Ray and vLLM take seconds, and `--help` should not.
How a user's mistake is shown stands in `cluster.cli_frame`.
"""

from typing import Annotated

import typer

from cluster.cli_frame import run_command
from cluster.data_commands import data_app

app = typer.Typer(
    help="Train, evaluate and serve models that reason about a medical image and ground the answer in it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check versions, libraries and this machine; say how to mend what is not right."""
    from cluster.doctor import run_doctor

    raise typer.Exit(run_doctor(as_json=as_json))


def main() -> None:
    """Run the command line."""
    run_command(app)


if __name__ == "__main__":
    main()
