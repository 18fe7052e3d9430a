"""`medreasoner submit`: a run as a job on a Ray cluster, followed until it ends."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.commands.options import ConfigFile, DryRun, Overrides, console, examples

if TYPE_CHECKING:
    from cluster.jobs import Client

submit_app = typer.Typer()

Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The cluster's dashboard, such as http://127.0.0.1:8265; by default RAY_API_SERVER_ADDRESS or "
        "RAY_ADDRESS.",
    ),
]

_STEP = re.compile(r"(?:step |: )(\d+)(?:/| of )(\d+)\b")
"""`step 3/50` of a training, `evaluating: 12 of 100 rows` of all others."""


@submit_app.command(
    epilog=examples(
        "medreasoner submit configs/demo.yaml runs=/shared/runs --address http://head:8265",
        "medreasoner submit configs/lingshu_7b_soft.yaml runs=/shared/runs model=/shared/Lingshu-7B "
        "segmenter.checkpoint=/shared/medsam2.safetensors data.train=/shared/train.parquet "
        "data.eval=/shared/test.parquet --detach",
        "medreasoner submit configs/demo.yaml runs=/shared/runs --dry-run",
    )
)
def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Address = None,
    detach: Annotated[bool, typer.Option("--detach", "--no-wait", help="Return as soon as it is sent.")] = False,
    python: Annotated[str, typer.Option(help="Interpreter, as the cluster's head node finds it.")] = "python",
    dry_run: DryRun = False,
) -> None:
    """Run a configuration as a job on a Ray cluster, and show what it prints; Ctrl-C leaves it running there.

    CONFIG may be of train, sft or evaluate. The checkout's text files are sent, and small files that CONFIG names;
    runs, data, weights and environments are not. Exit code 1 if the job fails."""
    from cluster import submission
    from cluster.jobs import Client

    prepared = submission.prepare(config, overrides or (), python=python)
    if dry_run:
        from cluster.dry_run import dry_run as show

        typer.echo(f"to be sent {prepared.summary()}")
        show(prepared.config, console(), elsewhere=True)
        return
    client = Client(address)
    typer.echo(f"sending    {prepared.summary()}")
    job = submission.submit(prepared, client, typer.echo)
    typer.echo(f"submitted  {job} to {client.get_address()}; its run folder is {prepared.metadata.folder}")
    if detach:
        typer.echo(ways_back(client, job))
    else:
        raise typer.Exit(follow(client, job))


def ways_back(client: "Client", job: str) -> str:
    """The commands that watch a job, end it, and show it."""
    where = f"--address {client.get_address()}"
    return "\n".join(
        (
            f"watch it   medreasoner runs logs -f {job} {where}",
            f"stop it    medreasoner runs stop {job} {where}",
            f"see it     medreasoner runs show {job} {where}",
        )
    )


def follow(client: "Client", job: str) -> int:
    """Show a job's output until it ends, or until Ctrl-C. Returns the exit code: 0 if it succeeded, 1 if not, 130 if it
    goes on without being watched."""
    from ray.job_submission import JobStatus

    from cluster.jobs import Following, Unreachable, ended_because

    try:
        with passing_on(Console()) as show:
            status = Following(client, job, show).until_end()
    except KeyboardInterrupt:
        typer.echo(f"\nnot watched any more; {job} goes on\n{ways_back(client, job)}")
        return 130
    except Unreachable:
        typer.echo(f"the connection is lost; {job} goes on, as far as is known\n{ways_back(client, job)}", err=True)
        raise
    if status == JobStatus.SUCCEEDED:
        typer.echo(f"succeeded  {job}")
        return 0
    typer.echo(f"{status.value.lower():<11}{job}: {ended_because(client.get_job_info(job))}", err=True)
    return 1


@contextmanager
def passing_on(console: Console) -> Iterator[Callable[[str], None]]:
    """What passes a job's output on: above a bar of its steps on a terminal, elsewhere just as it is."""
    if not console.is_terminal:
        yield _pass_on
        return
    columns = TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task, rest = bar.add_task("waiting for its first step", total=None), ""
        tell = partial(console.print, soft_wrap=True, highlight=False, markup=False)

        def show(text: str) -> None:
            nonlocal rest
            *lines, rest = (rest + text).split("\n")
            for line in lines:
                tell(line)
                if found := _STEP.search(line):
                    bar.update(task, description="on the cluster", completed=int(found[1]), total=int(found[2]))

        try:
            yield show
        finally:
            if rest:
                tell(rest)


def _pass_on(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
