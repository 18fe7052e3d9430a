"""`medreasoner key`: makes the keys of a service's clients."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import examples

keys_app = typer.Typer()


@keys_app.command(epilog=examples("medreasoner key viewer", "medreasoner key viewer --file keys.yaml"))
def key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is: a client or a person.")],
    file: Annotated[
        Path | None,
        typer.Option(dir_okay=False, metavar="FILE", help="YAML file of keys that it is added to; made where missing."),
    ] = None,
) -> None:
    """Make a key for a client of the service, and print it; it is shown this once.

    Standard output is the key alone. The service knows its digest: the entry goes into the file, or is shown."""
    from serving.keys import add_key, entry, new_key

    secret, digest = new_key()
    line = entry(name, digest)
    if file is None:
        typer.echo(f"under `keys` of the service's configuration:\n\n{line}", err=True)
    else:
        add_key(file, line)
        typer.echo(f"added {name} to {file}; set `keys_file` to it, or build the application again", err=True)
    typer.echo(f"{name} sends it as `Authorization: Bearer KEY`:", err=True)
    typer.echo(secret)
