"""`medreasoner report`, `compare`, `export` and `scale`: the commands on a run's folder."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import RunFolderPath, examples, run_folders

results_app = typer.Typer()


@results_app.command(
    epilog=examples("medreasoner report runs/demo", "medreasoner report runs/demo --out demo.html"),
)
def report(
    run: RunFolderPath,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="HTML file to write, instead of RUN/report/index.html.")
    ] = None,
) -> None:
    """Write the page of a run as it is now: finished, interrupted, or still going on.

    A run's folder that was moved to another machine has its page too, without images where the data are not there."""
    from cluster.commands.report import report as write_report

    written = write_report(run, out)
    typer.echo(f"{written.standing}")
    for remark in written.remarks:
        typer.echo(remark)
    typer.echo(f"saved      {written.path}")


@results_app.command(
    epilog=examples(
        "medreasoner compare runs/evaluate-tiny-reasoner-rows runs/evaluate-demo-rows",
        "medreasoner compare runs/warm_start runs/evaluate_demo --out gain.html",
    ),
)
def compare(
    first: Annotated[
        Path, typer.Argument(metavar="RUN_A", help="Folder of an evaluation.", autocompletion=run_folders)
    ],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="Folder of another.", autocompletion=run_folders)],
    out: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="HTML file to write, instead of RUN_B/report/compared-with-RUN_A.html."),
    ] = None,
) -> None:
    """Compare two evaluations row by row: differences with intervals, and a page of the rows that changed most."""
    from cluster.comparison import compare as run_compare

    typer.echo(f"saved      {run_compare(first, second, out)}")


@results_app.command(
    epilog=examples(
        "medreasoner export runs/demo --out demo-model", "medreasoner export runs/demo --step 40 --out demo-40"
    ),
)
def export(
    run: RunFolderPath,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder to write, which must not exist yet.")],
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint; the newest by default.")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="Write the adapter alone, in peft's format.")] = False,
) -> None:
    """Export the model of a run's checkpoint as an ordinary Hugging Face folder."""
    from cluster.checkpoints import export_run

    typer.echo(f"saved      {out}, of step {export_run(run, step, out, adapter=adapter).state.step}")


@results_app.command(
    epilog=examples("medreasoner scale runs/demo rollout=2", "medreasoner scale runs/demo rollout=8 segmenter=4"),
)
def scale(
    run: RunFolderPath,
    wishes: Annotated[list[str], typer.Argument(metavar="ROLE=N...", help="rollout=2 segmenter=4, one or both.")],
) -> None:
    """Change how many rollouts and segmenters a running run has."""
    from cluster.scaling import ask

    wanted = ask(run, wishes)
    typer.echo(f"asked for {' and '.join(f'{count} {role}s' for role, count in wanted.items())}")
