"""`medreasoner expert`: commands about segmentation experts."""

from pathlib import Path
from typing import Annotated

import typer

from actors.experts.published import PUBLISHED_EXPERTS
from cluster.commands.options import examples

expert_app = typer.Typer(help="Segmentation experts.", no_args_is_help=True)


@expert_app.callback()
def _expert() -> None:
    """Segmentation experts."""


@expert_app.command(
    epilog=examples("medreasoner expert convert sam_vit_b_01ec64.pth --name sam_vit_b --out sam_vit_b.safetensors")
)
def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint (.pth), as downloaded or as your own training wrote it.")],
    name: Annotated[str, typer.Option(help=f"One of {', '.join(PUBLISHED_EXPERTS)}.")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    key: Annotated[str | None, typer.Option(help="Key of the weights, where the file holds several models.")] = None,
) -> None:
    """Convert a checkpoint to safetensors, which is needed once."""
    # torch takes seconds to import, and `--help` should be quick.
    from actors.experts.convert import convert_checkpoint
    from actors.experts.registry import licence_line

    digest = convert_checkpoint(source, out, name=name, key=key, say=typer.echo)
    typer.echo(f"{out}: {name}, weights sha256 {digest}")
    typer.echo(licence_line(name, out))
