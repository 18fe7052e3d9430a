"""`medreasoner serve` and `ground`: the commands that answer questions about images."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.status import Status
from rich.text import Text

from cluster.commands.options import Checkpoint, DryRun, Expert, Prompt, console, examples, run_folders
from umrg.mistake import Mistake

if TYPE_CHECKING:
    from serving.client import Options
    from serving.grounder import Grounding

if TYPE_CHECKING:
    from serving.config import ServeConfig

TINY_REASONER = Path(__file__).parents[2] / "models" / "tiny-reasoner"
_LINES = 6
"""How many lines of the reasoning a terminal shows while it is written."""

answering_app = typer.Typer()


@answering_app.command(
    epilog=examples(
        "medreasoner serve runs/demo --port 8000",
        "medreasoner serve runs/lingshu_7b_soft --expert medsam2 --checkpoint medsam2.safetensors --gpu "
        "rollout.max_tokens=2048",
        "medreasoner serve runs/demo --host 0.0.0.0 --keys keys.yaml limits.image_mib=64",
    )
)
def serve(
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", help="Folder of the reasoner.", autocompletion=run_folders)
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the configuration.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of the service's configuration.")] = None,
    expert: Annotated[
        str | None, typer.Option(help="Name, folder or converted file of the expert; tiny by default.")
    ] = None,
    checkpoint: Checkpoint = None,
    prompt: Prompt = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="One GPU, shared by reasoner and expert.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on; any but loopback needs keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    keys: Annotated[Path | None, typer.Option(help="YAML file of the clients' keys (`medreasoner key`).")] = None,
    dry_run: DryRun = False,
) -> None:
    """Serve a reasoner and its expert over HTTP, until Ctrl-C; SIGHUP lets it take over newer weights.

    Lengths and precision are not those of the model's training: give rollout.max_tokens and rollout.dtype."""
    if model is not None and "=" in str(model) and not model.exists():
        # No model was named, and what follows it stands in its place.
        model, overrides = None, [str(model), *(overrides or ())]
    given: dict[str, object | None] = {
        "model": model,
        "expert": expert,
        "segmenter.checkpoint": checkpoint,
        "prompt": prompt,
        "keys_file": keys,
    }
    options = {name: value for name, value in given.items() if value is not None}
    if gpu:
        options |= {"segmenter.num_gpus": 0.2, "rollout.num_gpus": 0.8, "rollout.dtype": "bfloat16"}
    read = partial(_service, config, overrides or (), options)
    if dry_run:
        _print_service(read(), host, port)
        return
    from serving.run import run

    run(read, host=host, port=port)


def _service(file: Path | None, overrides: Sequence[str], options: Mapping[str, object]) -> "ServeConfig":
    """The service's configuration: a file, overrides, and options of the command line."""
    from cluster.config import load_config
    from serving.config import ServeConfig

    # Matrices as small as the tiny model's are multiplied by one thread sooner than by two that wait for each other.
    tiny = {} if file or "model" in options else {"model": TINY_REASONER, "rollout.threads": 1}
    return load_config(ServeConfig, file, overrides, {**tiny, **options})


def _print_service(config: "ServeConfig", host: str, port: int) -> None:
    """Print what would be served, as `cluster.dry_run.dry_run` does a job. Raises ValueError for what would be
    refused."""
    from cluster.commands.memory import Role
    from cluster.dry_run import print_actors, print_config, print_memory
    from cluster.memory import rollout_need, segmenter_need
    from cluster.placement import bundles
    from serving.run import check

    check(config)
    shown = console()
    rollout = bundles("rollout", config.rollout.actors, config.rollout)
    segmenter = bundles("segmenter", config.segmenter.actors, config.segmenter)
    print_config(config, shown)
    print_actors([*rollout, *segmenter], shown)
    needs = [
        Role(rollout, rollout_need(config.model, config.rollout)),
        Role(segmenter, segmenter_need(config.expert, config.segmenter)),
    ]
    print_memory(needs, shown)
    typer.echo(f"address    http://{host}:{port}/v1/ground")
    typer.echo("dry run    nothing was started or written")


@answering_app.command(
    epilog=examples(
        'medreasoner ground docs/pictures/example.png "What may break in old age?" --model runs/demo',
        'medreasoner ground chest.png "Which organ pumps the blood?" --window 40,400 --out answers',
        'medreasoner ground chest.png "Which organ pumps the blood?" --server https://grounder:8000 --samples 8',
    )
)
def ground(
    ctx: typer.Context,
    image: Annotated[
        Path, typer.Argument(metavar="IMAGE", help="PNG, JPEG, TIFF or WebP; without --server others too.")
    ],
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What is asked about the image.")],
    model: Annotated[Path, typer.Option(help="Folder of the reasoner.", autocompletion=run_folders)] = TINY_REASONER,
    prompt: Prompt = None,
    expert: Expert = "tiny",
    checkpoint: Checkpoint = None,
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="A service that answers, instead of models loaded here.")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="File with the key for the service, instead of MEDREASONER_KEY.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers that the service puts to a vote.")] = 1,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="WINDOW",
            help="CENTRE,WIDTH in stored values, or percentiles, p1,p99; for more than 8 bits a channel.",
        ),
    ] = None,
    frame: Annotated[int | None, typer.Option(help="Of a file with several pages; the first is 0.")] = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for overlay, mask and JSON.")] = Path("."),
) -> None:
    """Answer a query about one image: reasoning, box and points; overlay and mask are saved.

    Exit code 1 where the answer has no usable box and points, or where a service cannot answer."""
    _refuse_of_the_other_way(ctx, server)
    with Console(stderr=True).status("grounding") as status:
        from serving.grounder import Grounder, check_query, check_savable, read_image
        from umrg.windowing import Window

        # Loading a model may take minutes: whatever can be wrong with the rest is found before.
        check_query(query)
        pixels = read_image(image, window=None if window is None else Window.parse(window), frame=frame)
        check_savable(out, image.stem)
        confidence = None
        if server is None:
            grounder = Grounder.load(model, expert, checkpoint=checkpoint, prompt=prompt)
            from actors.experts.registry import licence_line

            typer.echo(licence_line(str(expert), checkpoint), err=True)
            grounding = grounder.ground(pixels, query)
        else:
            options: Options = {"samples": samples, "window": window, "frame": frame}
            grounding, confidence = _asked(server, key_file, image, query, options, status)
        saved = ", ".join(str(file) for file in grounding.save(out, image.stem))
    _print_answer(grounding, confidence, saved)


def _refuse_of_the_other_way(ctx: typer.Context, server: str | None) -> None:
    """Raise ValueError for options that only a model loaded here has, where a service answers, or the other way
    round."""
    names = ("samples", "key_file") if server is None else ("model", "prompt", "expert", "checkpoint")
    given = [f"--{name}".replace("_", "-") for name in names if _was_given(ctx, name)]
    these = f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'}"
    if given and server is None:
        raise Mistake(f"{these} for a service; give its address with --server")
    if given:
        raise Mistake(f"{these} the service's own choice; leave out either that or --server")


def _was_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _asked(
    server: str, key_file: Path | None, image: Path, query: str, options: "Options", status: Status
) -> tuple["Grounding", float | None]:
    """A service's answer and its confidence; on a terminal the reasoning is shown while it is written. A service that
    cannot answer now, or fails, ends the command with exit code 1."""
    from serving.client import Client, Grounded, ReasoningEvent, ServiceBusy, ServiceFault, Unreachable

    written = ""
    try:
        with Client(server, key=None if key_file is None else _key(key_file)) as client:
            if not status.console.is_terminal:
                found = client.ground(image, query, **options)
                return found.grounding(), found.confidence
            for event in client.ground_stream(image, query, **options):
                if isinstance(event, ReasoningEvent):
                    written += event.text
                    status.update(_tail(written, status.console))
                elif isinstance(event, Grounded):
                    return event.grounding(), event.confidence
    except Unreachable as error:
        raise Mistake(str(error)) from error
    except (ServiceBusy, ServiceFault) as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from None
    raise AssertionError("a stream ends with the answer, or with an error")


def _key(path: Path) -> str:
    if not path.is_file():
        raise Mistake(f"{path} is not a file; give one that holds the key alone")
    # What is no key's text is refused by the client.
    key = path.read_text(errors="replace").strip()
    if not key:
        raise Mistake(f"{path} is empty; write the key into it")
    return key


def _tail(written: str, terminal: Console) -> Text:
    """The last lines of a text that grows."""
    return Text.assemble("grounding\n", (written[-_LINES * terminal.width :], "dim"))


def _print_answer(grounding: "Grounding", confidence: float | None, saved: str) -> None:
    """The answer as lines. Exit code 1 where it has no usable box and points."""
    from serving.grounder import abridged

    box, points = grounding.box, grounding.points
    if box is None or points is None:
        typer.echo(f"no usable box and points in the answer: {abridged(grounding.completion)}")
        typer.echo(f"saved      {saved}")
        raise typer.Exit(1)
    typer.echo(f"reasoning  {grounding.reasoning or '(none)'}")
    typer.echo(f"box        {', '.join(f'{v:.0f}' for v in box)}  (x1, y1, x2, y2 in pixels)")
    typer.echo(f"points     {'; '.join(f'{x:.0f}, {y:.0f}' for x, y in points)}  (x, y)")
    if confidence is not None:
        typer.echo(f"confidence {confidence:.2f}")
    typer.echo(f"saved      {saved}")
