"""`medreasoner doctor`, `memory` and `config`: the commands before a run."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import ConfigFile, Overrides, config_files, console, examples

planning_app = typer.Typer()


@planning_app.command(epilog=examples("medreasoner doctor", "medreasoner doctor configs/demo_gpu.yaml --json"))
def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CONFIG]", help="YAML file of a run that is to be made here.", autocompletion=config_files
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Check versions, libraries and this machine, and say how to fix what is wrong.

    With CONFIG, check also what that run needs. Exit code 1 where something is wrong."""
    from cluster.commands.doctor import run_doctor
    from cluster.config import load_config, schema_of

    run = None if config is None else load_config(schema_of(config), config, overrides or ())
    raise typer.Exit(run_doctor(run, as_json=as_json))


@planning_app.command(
    epilog=examples("medreasoner memory configs/lingshu_7b_soft.yaml learner.ranks=8 --gpu 79.1"),
)
def memory(
    config: ConfigFile,
    gpu: Annotated[float, typer.Option(help="Memory of each GPU, in GiB.")],
    overrides: Overrides = None,
) -> None:
    """Estimate what each role of a run needs of its GPU.

    Exit code 1 where it cannot fit."""
    from cluster.commands.memory import print_memory

    raise typer.Exit(print_memory(config, overrides or (), gpu, console()))


def _all_keys(incomplete: str) -> list[str]:
    from cluster.commands.config import all_keys

    return [key for key in all_keys() if key.startswith(incomplete)]


@planning_app.command(name="config", epilog=examples("medreasoner config learner.lr", "medreasoner config"))
def config_command(
    key: Annotated[
        str | None, typer.Argument(metavar="[KEY]", help="Dotted, such as learner.lr.", autocompletion=_all_keys)
    ] = None,
) -> None:
    """Explain a configuration key: what it is, its default, and where it is used. Without KEY, list all."""
    from cluster.commands.config import print_key, print_keys

    print_keys(console()) if key is None else print_key(key, console())
