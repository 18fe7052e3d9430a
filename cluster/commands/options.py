"""What the commands share: arguments and options of one name and meaning everywhere, examples beneath every help text,
and what a shell completes. Imports nothing that takes long."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from umrg.mistake import Mistake


def examples(*lines: str) -> str:
    """The epilog of a command's help: its examples, one a line."""
    return "\n".join(("[bold]Examples[/bold]", *(escape(f"$ {line}") for line in lines)))


def console(width: int = 160) -> Console:
    """Standard output; where it is piped it is not cut to a terminal's width but has a width of its own."""
    found = Console()
    return found if found.is_terminal else Console(width=width)


def config_files(incomplete: str) -> Iterator[str]:
    """YAML files, and folders that may hold some."""
    for path in _beginning_with(incomplete or "configs/"):
        if path.is_dir():
            yield f"{path}/"
        elif path.suffix in (".yaml", ".yml"):
            yield str(path)


def run_folders(incomplete: str) -> Iterator[str]:
    """Folders of runs, and those that may hold some."""
    for path in _beginning_with(incomplete or "runs/"):
        if path.is_dir():
            yield str(path) if (path / "config.yaml").is_file() else f"{path}/"


def config_keys(ctx: typer.Context, incomplete: str) -> Iterator[tuple[str, str]]:
    """`key=` of the configuration that the command reads, each with its documentation."""
    from cluster.commands.config import SCHEMAS, description
    from cluster.config import schema_of
    from cluster.config_keys import keys

    try:
        schema = SCHEMAS.get(str(ctx.info_name)) or schema_of(Path(str(ctx.params.get("config"))))
    except Mistake:
        return
    for key in keys(schema):
        if key.section is None and key.name.startswith(incomplete):
            yield f"{key.name}=", description(key)


def files_and_keys(ctx: typer.Context, incomplete: str) -> Iterator[str | tuple[str, str]]:
    """Of a command whose configuration file may be left out."""
    yield from config_files(incomplete)
    yield from config_keys(ctx, incomplete)


def _beginning_with(text: str) -> list[Path]:
    """The files and folders whose path begins with a text, hidden ones left out."""
    folder, _, start = text.rpartition("/")
    place = Path(folder or ("/" if text.startswith("/") else "."))
    found = sorted(place.iterdir()) if place.is_dir() else []
    return [path for path in found if path.name.startswith(start) and not path.name.startswith(".")]


ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file; see configs/.", autocompletion=config_files)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value]...", help="Values that replace those of the file.", autocompletion=config_keys),
]
RunFolderPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder of a run, such as runs/demo.", autocompletion=run_folders)
]
Prompt = Annotated[
    str | None, typer.Option(help="full, compact or the file of a template, instead of the model's own prompt.")
]
Expert = Annotated[str, typer.Option(help="Name, folder or converted file of the expert.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Weights of a published expert, as `expert convert` wrote them.")]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Say what would be read, written and started, and find mistakes; start and write nothing."
    ),
]
