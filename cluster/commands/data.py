"""`medreasoner data …`: commands that describe, check and split datasets, and make phantoms."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from actors.config import RolloutConfig
from cluster.commands.options import console, examples
from cluster.display import progress
from umrg.atomic import write_bytes
from umrg.dataset import Dataset, open_files, write_rows
from umrg.split import SplitBy, plan_split, write_split

if TYPE_CHECKING:
    from cluster.commands.data_check import ExtraCheck, Report

data_app = typer.Typer(help="Describe, check and split datasets, and make phantoms.", no_args_is_help=True)


class Phrasings(StrEnum):
    SEEN = "seen"
    HELD_OUT = "held_out"


class Annotation(StrEnum):
    EXACT = "exact"
    COARSE = "coarse"


Files = Annotated[list[Path], typer.Argument(metavar="FILE...", help="Parquet files in the released schema.")]
Supercategories = Annotated[list[str] | None, typer.Option("--supercategory", help="Keep only these rows.")]
Categories = Annotated[list[str] | None, typer.Option("--category", help="Keep only these rows.")]
Modalities = Annotated[
    list[str] | None, typer.Option("--modality", help="Keep only these rows; MRI includes MRI-FLAIR.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the random choices.")]


@data_app.command(epilog=examples("medreasoner data stats rows.parquet --out statistics"))
def stats(
    files: Files,
    out: Annotated[Path | None, typer.Option(file_okay=False, help="Folder for JSON and pictures.")] = None,
    supercategory: Supercategories = None,
    category: Categories = None,
    modality: Modalities = None,
    tiles: Annotated[int, typer.Option(min=1, help="Samples on the contact sheet.")] = 42,
) -> None:
    """Count the rows, and measure size and position of the targets, by modality, super-category and category.

    With --out, write a contact sheet of samples and a heat map of where each super-category lies.
    """
    from umrg.statistics import GROUPINGS, summary, survey

    dataset = Dataset.open(files, supercategory=supercategory, category=category, modality=modality)
    with progress("measuring", len(dataset)) as show:
        found = survey(dataset, show)
    figures = summary(found.measurements)
    shown = console()
    sizes = ", ".join(f"{size} px ({count})" for size, count in list(_dict(figures["image_sizes"]).items())[:8])
    shown.print(f"{len(dataset)} rows; images of {sizes}", highlight=False)
    for grouping in GROUPINGS:
        shown.print(_table(grouping, _dict(figures[grouping]), plain=not shown.is_terminal))
    if out is not None:
        _write_statistics(out, dataset, found, figures, tiles)
        typer.echo(f"{out}: stats.json, contact_sheet.png, positions.png")


@data_app.command(
    epilog=examples(
        "medreasoner data check rows.parquet --clean clean.parquet",
        "medreasoner data check rows.parquet --model models/tiny-reasoner --expert tiny --out check",
    )
)
def check(
    files: Files,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a reasoner, within whose limits the prompts must be.")
    ] = None,
    max_prompt_tokens: Annotated[
        int,
        typer.Option(min=1, help="With --model: longest allowed prompt, the run's rollout.max_prompt_tokens."),
    ] = RolloutConfig().max_prompt_tokens,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="With --model: the run's max_pixels. Default: the model's own.")
    ] = None,
    expert: Annotated[
        str | None, typer.Option(help="Name, folder or file of an expert, which is given the reference box and points.")
    ] = None,
    out: Annotated[Path | None, typer.Option(file_okay=False, help="Folder for check.csv and check.png.")] = None,
    clean: Annotated[
        Path | None, typer.Option(metavar="FILE.parquet", dir_okay=False, help="File for the rows without an error.")
    ] = None,
) -> None:
    """Check every row for errors, which make it unusable, and for what deserves a look. The files are not changed.

    The exit code is 1 if any row has an error, otherwise 0.
    """
    from cluster.commands.data_check import check_files, worst_sheet

    sources = open_files(files)
    extra_checks: list[ExtraCheck] = []
    if model is not None:
        from cluster.commands.data_model_checks import prompt_limits

        extra_checks.append(prompt_limits(model, max_prompt_tokens, max_pixels))
    oracle = None
    if expert is not None:
        from cluster.commands.data_model_checks import load_oracle

        extra_checks.append(oracle := load_oracle(expert))
        from actors.experts.registry import licence_line

        typer.echo(licence_line(expert), err=True)
    with progress("checking", sum(source.rows for source in sources)) as show:
        table = None if out is None else out / "check.csv"
        report = check_files(sources, extra_checks=extra_checks, table=table, clean=clean, progress=show)
    _print_report(report)
    if out is not None:
        sheet = worst_sheet(report, oracle.mask if oracle else None)
        typer.echo(f"{out}: " + ", ".join(_write_sheet(out, sheet)))
    if clean is not None:
        typer.echo(f"{clean}: {report.rows - report.unusable} rows" + _left_out(report))
    if report.unusable:
        raise typer.Exit(1)


@data_app.command(epilog=examples("medreasoner data split rows.parquet --by phrasing --out divided"))
def split(
    files: Files,
    by: Annotated[SplitBy, typer.Option(help="What held-out rows and training rows must not share.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for train and held_out.parquet.")],
    hold_out: Annotated[list[str] | None, typer.Option(help="A name to hold out; may be repeated.")] = None,
    share: Annotated[float, typer.Option(help="Share of the names or queries to hold out, where none is named.")] = 0.2,
    seed: Seed = 0,
) -> None:
    """Hold out phrasings, categories or modalities, to study generalisation."""
    dataset = Dataset.open(files)
    plan = plan_split(dataset.infos, by, hold_out=hold_out or (), share=share, seed=seed)
    with progress("writing", len(dataset)) as show:
        report = write_split(dataset, plan, out, show)
    typer.echo(f"{out}: {len(plan.train)} rows in train.parquet, {len(plan.held_out)} in held_out.parquet")
    typer.echo(f"held out by {by.value}: " + _few(plan.held_names))
    if shared := report["images_on_both_sides"]:
        typer.echo(f"note: {shared} images occur on both sides, with different questions")


@data_app.command(
    epilog=examples(
        "medreasoner data phantoms rows.parquet --count 100",
        "medreasoner data phantoms held_out.parquet --count 100 --seed 1 --phrasings held_out",
    )
)
def phantoms(
    path: Annotated[Path, typer.Argument(metavar="OUT.parquet", dir_okay=False, help="The file to write.")],
    count: Annotated[int, typer.Option(min=1, help="Number of rows.")],
    seed: Seed = 0,
    size: Annotated[int, typer.Option(help="Side of the square images, in pixels.")] = 224,
    modality: Annotated[list[str] | None, typer.Option(help="A modality; may be repeated. Default: all.")] = None,
    phrasings: Annotated[Phrasings, typer.Option(help="Which queries to ask.")] = Phrasings.SEEN,
    annotation: Annotated[
        Annotation, typer.Option(help="Exact boxes and points, or loose ones like those of clinical annotators.")
    ] = Annotation.EXACT,
) -> None:
    """Make synthetic medical images with exact masks, implicit queries and reasoning."""
    from phantoms import MODALITIES, rows
    from umrg.names import modality_name

    made = rows(
        count,
        seed=seed,
        size=size,
        modalities=[modality_name(name) for name in modality or MODALITIES],
        phrasings=phrasings.value,
        annotation=annotation.value,
    )
    with progress("drawing", count) as show:
        written = write_rows(path, made, progress=show)
    typer.echo(f"{path}: {written} rows")


def _write_statistics(out: Path, dataset: Dataset, found: Any, figures: dict[str, object], tiles: int) -> None:
    from umrg.images import encode_png
    from umrg.statistics import occupancy_sheet, sample_sheet

    pictures = {
        "contact_sheet.png": encode_png(sample_sheet(dataset, tiles)),
        "positions.png": encode_png(occupancy_sheet(found)),
    }
    text = json.dumps(figures, indent=2, ensure_ascii=False) + "\n"
    for name, content in {"stats.json": text.encode(), **pictures}.items():
        write_bytes(out / name, content)


def _print_report(report: "Report") -> None:
    from umrg.checks import CHECKS

    shown = console()
    plain = not shown.is_terminal
    table = Table(box=None if plain else box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("check", "", "rows", "for example"):
        table.add_column(heading, justify="right" if heading == "rows" else "left", no_wrap=heading != "for example")
    for found in CHECKS:
        if worst := report.worst.get(found):
            example = f"row {worst[0].row} of {worst[0].file}: {worst[0].finding.message}"
            table.add_row(found.name, found.severity.value, str(report.counts[found]), Text(example))
    if table.row_count:
        shown.print(table)
    clean = report.rows - report.unusable - report.flagged
    shown.print(
        f"{report.rows} rows: {report.unusable} cannot be used, {report.flagged} to look at, {clean} without a finding",
        highlight=False,
    )


def _left_out(report: "Report") -> str:
    from umrg.checks import Severity

    errors = {found.name: rows for found, rows in report.counts.items() if found.severity is Severity.ERROR}
    if not errors:
        return ""
    return f"; {report.unusable} left out: " + ", ".join(f"{name} ({rows})" for name, rows in sorted(errors.items()))


def _write_sheet(out: Path, sheet: Any) -> list[str]:
    """Write check.png where there is something to show; returns the names of the files in the folder."""
    from umrg.images import encode_png

    if sheet is None:
        # One from an earlier check would show findings of another dataset.
        (out / "check.png").unlink(missing_ok=True)
        return ["check.csv"]
    write_bytes(out / "check.png", encode_png(sheet))
    return ["check.csv", "check.png"]


def _table(grouping: str, groups: dict[str, Any], *, plain: bool) -> Table:
    """A table of medians in per cent of the image, with the range from the 5th to the 95th percentile."""
    title = f"By {grouping} (per cent of the image: median, 5th to 95th percentile)"
    table = Table(title=title, title_justify="left", box=None if plain else box.SIMPLE_HEAD)
    table.add_column(grouping, no_wrap=True)
    for heading in ("rows", "area", "centre x", "centre y", "width", "height"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, group in groups.items():
        cells = (
            _range(group[key], alone=group["rows"] == 1) for key in ("area", "centre_x", "centre_y", "width", "height")
        )
        table.add_row(name, str(group["rows"]), *cells)
    return table


def _range(figures: dict[str, float], *, alone: bool) -> str:
    low, middle, high = (100 * figures[key] for key in ("q05", "q50", "q95"))
    digits = 1 if middle < 10 else 0
    if alone:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def _dict(value: object) -> dict[str, Any]:
    assert isinstance(value, dict)
    return value


def _few(names: tuple[str, ...], most: int = 8) -> str:
    return "; ".join(names[:most]) + (f"; and {len(names) - most} more" if len(names) > most else "")
