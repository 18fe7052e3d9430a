"""`medreasoner runs`: the jobs that `medreasoner submit` sent to a cluster, seen and ended from anywhere."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cluster.commands.options import console, examples
from cluster.commands.submit import Address, follow

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

    from cluster.jobs import Client

runs_app = typer.Typer(help="Runs that were submitted to a cluster: list, logs, stop, show.", no_args_is_help=True)

Job = Annotated[
    str | None, typer.Argument(metavar="[RUN]", help="Job ID, or a run's name: its newest job; the newest of all.")
]


@runs_app.callback()
def _runs() -> None:
    """Runs that were submitted to a cluster."""


@runs_app.command("list", epilog=examples("medreasoner runs list --address http://head:8265"))
def list_(address: Address = None) -> None:
    """List the runs that were submitted, the newest first."""
    from cluster.jobs import Client, our_jobs, times

    table = Table("job", "kind", "run", "status", "since", "run folder", box=None)
    for job, metadata in our_jobs(Client(address)):
        status = job.status.value
        table.add_row(job.submission_id, metadata.kind, metadata.name, status, times(job), metadata.folder)
    if not table.row_count:
        typer.echo("no run was submitted to this cluster")
        return
    console(240).print(table)


@runs_app.command(epilog=examples("medreasoner runs logs -f demo"))
def logs(
    run: Job = None,
    following: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job ends, or Ctrl-C.")] = False,
    address: Address = None,
) -> None:
    """Print what a run has printed."""
    from cluster.jobs import Client, find_job

    client = Client(address)
    job = find_job(client, run).submission_id
    if following:
        raise typer.Exit(follow(client, job))
    typer.echo(client.get_job_logs(job), nl=False)


@runs_app.command(epilog=examples("medreasoner runs stop demo"))
def stop(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Job ID, or a run's name: its newest job.")],
    address: Address = None,
) -> None:
    """End a run and wait until nothing of it is left. Exit code 1 if something is."""
    from cluster.jobs import Client, find_job
    from cluster.jobs import stop as stop_job

    client = Client(address)
    try:
        left = stop_job(client, find_job(client, run), typer.echo)
    except TimeoutError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"left behind: {', '.join(left)}" if left else "nothing is left behind")
    raise typer.Exit(1 if left else 0)


@runs_app.command(epilog=examples("medreasoner runs show demo"))
def show(run: Job = None, address: Address = None) -> None:
    """Show a run's status, configuration, folder and last metrics."""
    from cluster.jobs import Client, Metadata, ended_because, find_job, times

    client = Client(address)
    job = find_job(client, run)
    metadata = Metadata.of(job)
    failed = job.status.value == "FAILED"
    facts = {"job": job.submission_id, "status": f"{job.status.value}, {times(job)}"}
    facts |= {"failed": ended_because(job)} if failed else {}
    if metadata:
        facts |= {"kind": metadata.kind, "run": metadata.name}
        facts |= {"config": " ".join((metadata.config, *metadata.overrides)), "run folder": metadata.folder}
    facts |= {"command": job.entrypoint, "last": last_told(client, job)}
    for name, fact in facts.items():
        typer.echo(f"{name:<11}{fact}")


def last_told(client: "Client", job: "JobDetails") -> str:
    """The newest line of the run's metrics, if its folder can be read from here; else of its log."""
    from cluster.jobs import run_folder
    from cluster.run_folder import RunFolder

    folder = run_folder(job)
    if folder and folder.is_dir() and (lines := RunFolder(folder).metrics()):
        chosen = {name: value for name, value in lines[-1].items() if not name.startswith(("seconds/", "busy/"))}
        return "  ".join(f"{name} {value:.4g}" for name, value in chosen.items())
    lines_of_log = client.get_job_logs(job.submission_id).splitlines()
    steps = [line for line in lines_of_log if "step " in line]
    return next(iter(reversed(steps or lines_of_log)), "nothing yet")
