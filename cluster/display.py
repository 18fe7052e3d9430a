"""What one sees while a run goes on: a live table on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from cluster.config import TrainConfig


class Display:
    """Of one run."""

    def __init__(self, config: TrainConfig, console: Console | None = None) -> None:
        self._console = console or Console()
        self._config = config
        self._status = ""
        self._metrics: Mapping[str, float] = {}
        self._evaluations: dict[str, Mapping[str, Mapping[str, float]]] = {}
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task(config.name, total=config.steps)
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=2)
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Say what is being waited for."""
        self._status = what
        self._line(what)
        yield
        self._status = ""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._metrics = metrics
        self._progress.update(self._task, completed=step)
        seconds = "  ".join(f"{name} {metrics[f'seconds/{name}']:.1f}" for name in _phases(metrics))
        self._line(
            f"step {step}/{self._config.steps}  reward {metrics['reward/total']:.3f}  "
            f"dice {metrics['answers/dice']:.3f}  iou {metrics['answers/iou']:.3f}  "
            f"well-formed {metrics['answers/well_formed']:.0%}  | s: {seconds}  | left {self._left(step)}"
        )

    def evaluation(self, name: str, summary: Mapping[str, Mapping[str, float]]) -> None:
        self._evaluations[name] = summary
        for kind, figures in summary.items():
            self._line(f"{name} {kind}  " + "  ".join(f"{figure} {value:.3f}" for figure, value in figures.items()))

    def gain(self, gains: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
        """What the run gained, with 95 % intervals."""
        for kind, figures in gains.items():
            self._console.print(
                f"gain {kind}  "
                + "  ".join(
                    f"{name} {pair['gain']:+.3f} ({pair['low']:+.3f} … {pair['high']:+.3f})"
                    for name, pair in figures.items()
                ),
                soft_wrap=True,
                highlight=False,
            )

    def resumed(self, step: int) -> None:
        self._progress.update(self._task, completed=step)
        self._line(f"resumed after step {step}")

    def _line(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(text, soft_wrap=True, highlight=False)

    def _left(self, step: int) -> str:
        task = self._progress.tasks[0]
        seconds = task.time_remaining
        return "?" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

    def _render(self) -> Group:
        parts: list[Table | Progress | str] = [self._progress]
        if self._metrics:
            parts.append(_table("this step", self._rows()))
        if self._evaluations:
            parts.append(self._evaluation_table())
        if self._status:
            parts.append(f"… {self._status}")
        return Group(*parts)

    def _rows(self) -> dict[str, str]:
        rows = {name: f"{self._metrics[f'answers/{name}']:.3f}" for name in ("dice", "iou", "pdice", "well_formed")}
        rewards = {
            name: f"{value:.3f}"
            for name, value in self._metrics.items()
            if name.startswith("reward/") and name not in ("reward/spread", "reward/flat_groups")
        }
        seconds = {f"{name} s": f"{self._metrics[f'seconds/{name}']:.1f}" for name in _phases(self._metrics)}
        return {**rows, **rewards, **seconds}

    def _evaluation_table(self) -> Table:
        table = Table("held out", "answers", "Dice", "IoU", "pDice", "well-formed", title_justify="left")
        for name, summary in self._evaluations.items():
            for kind, figures in summary.items():
                table.add_row(name, kind, *(f"{figures[f]:.3f}" for f in ("dice", "iou", "pdice", "well_formed")))
        return table


def _phases(metrics: Mapping[str, float]) -> list[str]:
    return [name.removeprefix("seconds/") for name in metrics if name.startswith("seconds/")]


def _table(title: str, rows: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    items = list(rows.items())
    half = (len(items) + 1) // 2
    for _ in range(4):
        table.add_column()
    for i in range(half):
        right = items[half + i] if half + i < len(items) else ("", "")
        table.add_row(*items[i], *right)
    return table
