"""The command line: `medreasoner …`, the same as `python -m cluster.cli …`, and `run_command`, which turns the errors
of any command into a line and an exit code.

A command imports what it runs inside its body, because torch, Ray and vLLM take seconds to import and `--help` should
be quick.
"""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console

from cluster.commands.data import data_app
from cluster.commands.expert import expert_app
from cluster.commands.runs import runs_app
from cluster.commands.submit import submit
from umrg.mistake import Mistake

TINY_REASONER = Path(__file__).parents[1] / "models" / "tiny-reasoner"

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; see configs/.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="Values that replace those of the file.")
]
Prompt = Annotated[
    str | None, typer.Option(help="full, compact or the file of a template, instead of the model's own prompt.")
]

app = typer.Typer(
    help="Train, evaluate and serve models that reason about a medical image and ground the answer in it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(expert_app, name="expert")
app.add_typer(runs_app, name="runs")
app.command()(submit)


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file of a run that is to be made here.")
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Check versions, libraries and this machine, and say how to fix what is wrong. With CONFIG, check also what that
    run needs."""
    from cluster.commands.doctor import run_doctor
    from cluster.config import load_config, schema_of

    run = None if config is None else load_config(schema_of(config), config, overrides or ())
    raise typer.Exit(run_doctor(run, as_json=as_json))


@app.command()
def sft(config: ConfigFile, overrides: Overrides = None) -> None:
    """Fine-tune a reasoner on reference answers."""
    from cluster.config import SftConfig, load_config
    from cluster.sft import sft as run_sft

    typer.echo(f"the model lies in {run_sft(load_config(SftConfig, config, overrides or ())).model}")


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train a reasoner with GRPO; the run folder holds model, metrics and report."""
    from cluster.train import main as run_train

    run_train([str(config), *(overrides or ())])


@app.command()
def scale(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that is under way.")],
    wishes: Annotated[list[str], typer.Argument(metavar="ROLE=N...", help="rollout=2 segmenter=4, one or both.")],
) -> None:
    """Change how many rollouts and segmenters a running run has."""
    from cluster.scaling import ask

    wanted = ask(run, wishes)
    typer.echo(f"asked for {' and '.join(f'{count} {role}s' for role, count in wanted.items())}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a training run.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder to write, which must not exist yet.")],
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint; the newest by default.")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="Write the adapter alone, in peft's format.")] = False,
) -> None:
    """Export the model of a run's checkpoint as an ordinary Hugging Face folder."""
    from cluster.checkpoints import export_run

    typer.echo(f"saved      {out}, of step {export_run(run, step, out, adapter=adapter).state.step}")


@app.command()
def evaluate(
    config: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG] [key=value]...", help="YAML file, and values laid over it."),
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of a reasoner, a run or a checkpoint.")] = None,
    prompt: Prompt = None,
    data: Annotated[list[Path] | None, typer.Option(help="Rows to answer; may be given several times.")] = None,
    expert: Annotated[str | None, typer.Option(help="Name or folder of the expert.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run, whose folder is runs/NAME.")] = None,
    n: Annotated[int | None, typer.Option("--n", help="Answers to sample per row, besides the greedy one.")] = None,
    limit: Annotated[int | None, typer.Option(help="Evaluate at most this many rows.")] = None,
    seen: Annotated[list[Path] | None, typer.Option(help="Rows that the reasoner was trained on.")] = None,
) -> None:
    """Evaluate a reasoner with an expert, and write metrics, tables and a page to runs/NAME. An interrupted evaluation
    continues when it is run again."""
    from cluster.evaluate import main as run_evaluate

    options = {"model": model, "data.eval": data, "expert": expert, "name": name, "n": n, "limit": limit}
    run_evaluate(config or [], {**options, "prompt": prompt, "data.seen": seen})


@app.command()
def memory(
    config: ConfigFile,
    gpu: Annotated[float, typer.Option(help="Memory of each GPU, in GiB.")],
    overrides: Overrides = None,
) -> None:
    """Estimate what each role of a run needs of its GPU. Exit code 1 where it cannot fit."""
    from cluster.commands.memory import print_memory

    console = Console()
    # Piped output must not be cut to a terminal's width.
    console = console if console.is_terminal else Console(width=160)
    raise typer.Exit(print_memory(config, overrides or (), gpu, console))


@app.command(name="config")
def config_command(
    key: Annotated[str | None, typer.Argument(metavar="[KEY]", help="Dotted, such as learner.lr.")] = None,
) -> None:
    """Explain a configuration key: what it is, its default, and where it is used. Without KEY, list all."""
    from cluster.commands.config import print_key, print_keys

    console = Console()
    # Piped output must not be cut to a terminal's width.
    console = console if console.is_terminal else Console(width=160)
    print_keys(console) if key is None else print_key(key, console)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="Folder of an evaluation.")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="Folder of another.")],
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="HTML file to write.")] = None,
) -> None:
    """Compare two evaluations row by row: differences with intervals, and a page of the rows that changed most."""
    from cluster.comparison import compare as run_compare

    typer.echo(f"saved      {run_compare(first, second, out)}")


@app.command()
def serve(
    model: Annotated[Path, typer.Argument(metavar="[MODEL]", help="Folder of the reasoner.")] = TINY_REASONER,
    expert: Annotated[str, typer.Option(help="Name or folder of the expert.")] = "tiny",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights of a published expert, as `expert convert` wrote them.")
    ] = None,
    prompt: Prompt = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="One GPU, shared by reasoner and expert.")] = False,
    port: Annotated[int, typer.Option(help="Of the loopback interface.")] = 8000,
) -> None:
    """Serve a reasoner and its expert over HTTP on this machine, until Ctrl-C."""
    from serving.run import run

    segmenter: dict[str, object] = {"num_cpus": 0.1, "checkpoint": checkpoint}
    args: dict[str, object] = {"model": model, "prompt": prompt, "expert": expert, "segmenter": segmenter}
    if gpu:
        segmenter["num_gpus"] = 0.2
        args["rollout"] = {"num_cpus": 0.5, "num_gpus": 0.8, "dtype": "bfloat16"}
    run(args, port=port)


@app.command()
def ground(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="PNG, JPEG, TIFF, WebP or the like.")],
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What is asked about the image.")],
    model: Annotated[Path, typer.Option(help="Folder of the reasoner.")] = TINY_REASONER,
    prompt: Prompt = None,
    expert: Annotated[str, typer.Option(help="Name or folder of the expert.")] = "tiny",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights of a published expert, as `expert convert` wrote them.")
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(metavar="CENTRE,WIDTH", help="Values that become gray levels; for more than 8 bits a channel."),
    ] = None,
    frame: Annotated[int | None, typer.Option(help="Of a file with several pages; the first is 0.")] = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for overlay, mask and JSON.")] = Path("."),
) -> None:
    """Answer a query about one image: reasoning, box and points; overlay and mask are saved. Exit code 1 where the
    answer has no usable box and points."""
    with Console(stderr=True).status("grounding"):
        from serving.grounder import Grounder, abridged, check_query, check_savable, read_image
        from umrg.windowing import Window

        # Loading a model may take minutes: whatever can be wrong with the rest is found before.
        check_query(query)
        pixels = read_image(image, window=None if window is None else Window.parse(window), frame=frame)
        check_savable(out, image.stem)
        grounder = Grounder.load(model, expert, checkpoint=checkpoint, prompt=prompt)
        grounding = grounder.ground(pixels, query)
        saved = ", ".join(str(file) for file in grounding.save(out, image.stem))
    box, points = grounding.box, grounding.points
    if box is None or points is None:
        typer.echo(f"no usable box and points in the answer: {abridged(grounding.completion)}")
        typer.echo(f"saved      {saved}")
        raise typer.Exit(1)
    typer.echo(f"reasoning  {grounding.reasoning or '(none)'}")
    typer.echo(f"box        {', '.join(f'{v:.0f}' for v in box)}  (x1, y1, x2, y2 in pixels)")
    typer.echo(f"points     {'; '.join(f'{x:.0f}, {y:.0f}' for x, y in points)}  (x, y)")
    typer.echo(f"saved      {saved}")


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
