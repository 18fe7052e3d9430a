"""What a user sees while a job goes on: a live view on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Protocol, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from cluster.advice import RECENT, Advice, Load, advice_after, loads
from rewards.answer_metrics import TRAINING_METRICS

if TYPE_CHECKING:
    from cluster.config import TrainConfig

LINE_EVERY_S = 5.0
"""Seconds between two lines of `progress` where there is no terminal."""

LINE_METRICS = {
    "reward/total": "reward {:.3f}",
    "answers/dice": "dice {:.3f}",
    "answers/iou": "iou {:.3f}",
    "answers/well_formed": "well-formed {:.0%}",
    "answers/tokens": "tokens {:.0f}",
    "learner/kl": "kl {:.4f}",
}
"""What the plain line of a step says, of what it has: the metrics of masks are absent where the reward needs none."""

_BAR = 20
"""Characters of a bar."""
_GROUP_STATISTICS = ("std", "zero_variance_groups", "resampled_groups")


class ShowProgress(Protocol):
    """Shows how many units are done, and a short text such as the current loss."""

    def __call__(self, done: int, text: str = "", *, at_once: bool = False) -> None:
        """at_once: print the plain line also if the last one was just printed."""


@contextmanager
def progress(
    what: str, total: int, *, done: int = 0, unit: str = "rows", console: Console | None = None
) -> Iterator[ShowProgress]:
    """Show the progress of a task on stderr: a bar on a terminal, a plain line every few seconds elsewhere.

    what: the task, such as "evaluating". done: units that an earlier run has done. unit: what is counted.
    """
    console = console or Console(stderr=True)
    columns = *_columns(), TimeRemainingColumn(), _TEXT
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden, speed_estimate_period=600) as bar:
        task = bar.add_task(what, total=total, completed=done, text="")
        last_line = time.monotonic()

        def show(done: int, text: str = "", *, at_once: bool = False) -> None:
            nonlocal last_line
            bar.update(task, completed=done, text=text)
            if not console.is_terminal and (at_once or time.monotonic() > last_line + LINE_EVERY_S):
                last_line = time.monotonic()
                _print_line(console, f"{what}: {done} of {total} {unit}" + (f"  {text}" if text else ""))

        yield show


_TEXT = TextColumn("{task.fields[text]}")


def _columns() -> tuple[ProgressColumn, ...]:
    return TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()


def _print_line(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


class Display:
    """The display of one training run: progress, the latest step's metrics and the evaluations so far."""

    def __init__(self, config: "TrainConfig", console: Console | None = None) -> None:
        self._console = console or Console()
        self._config = config
        self._status = ""
        self._warnings: set[str] = set()
        self._lines: list[Mapping[str, float]] = []
        """Metrics of the newest steps."""
        self._advice: Advice | None = None
        self._advised: str | None = None
        self._evaluations: dict[str, Mapping[str, Mapping[str, float]]] = {}
        self._progress = Progress(*_columns(), _TEXT, console=self._console)
        self._task = self._progress.add_task(config.name, total=config.steps, text="")
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=2)

    @property
    def console(self) -> Console:
        """Where it is shown. A bar within the live view must be on the same one."""
        return self._console

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Show what the run is waiting for."""
        self._status = what
        self._line(what)
        yield
        self._status = ""

    def resumed(self, step: int) -> None:
        """Show that the run continues after a step."""
        self._progress.update(self._task, completed=step)
        self._line(f"resumed after step {step}")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a step's metrics."""
        self._lines = [*self._lines, metrics][-RECENT:]
        left = self._left(self._config.steps - step)
        self._progress.update(self._task, completed=step, text=f"left {left}")
        measured = [text.format(metrics[name]) for name, text in LINE_METRICS.items() if name in metrics]
        seconds = [f"{name} {value:.1f}" for name, value in section(metrics, "seconds").items()]
        busy = [f"{role} {load.busy:.0%}" for role, load in loads([metrics]).items()]
        parts = [
            "  ".join([f"step {step}/{self._config.steps}", *measured]),
            f"s: {'  '.join(seconds)}",
            *([f"busy: {'  '.join(busy)}"] if busy else []),
            f"left {left}",
        ]
        self._line("  | ".join(parts))
        self._advise()

    def note(self, text: str) -> None:
        """Print what was found out."""
        _print_line(self._console, text)

    def warning(self, text: str) -> None:
        """Print what the user should know, once."""
        if text not in self._warnings:
            self._warnings.add(text)
            _print_line(self._console, f"warning: {text}")

    def evaluation(self, name: str, summary: Mapping[str, Mapping[str, float]]) -> None:
        """Show an evaluation's mean figures. summary: those of greedy and of sampled answers."""
        self._evaluations[name] = summary
        for kind, figures in summary.items():
            self._line(f"{name} {kind}  " + "  ".join(f"{figure} {value:.3f}" for figure, value in figures.items()))

    def improvement(self, gains: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
        """Print the improvement over the run, with 95 % intervals, for greedy and sampled answers."""
        for kind, figures in gains.items():
            differences = (
                f"{name} {pair['gain']:+.3f} ({pair['low']:+.3f} … {pair['high']:+.3f})"
                for name, pair in figures.items()
            )
            _print_line(self._console, f"gain {kind}  " + "  ".join(differences))

    def advice(self) -> None:
        """Print which pool should be larger."""
        if self._advice:
            _print_line(self._console, f"advice: {self._advice.text}")

    def _advise(self) -> None:
        """Find advice; on a terminal it is shown with each step, elsewhere printed where it is of another role."""
        self._advice = advice_after(self._lines)
        if self._advice and self._advice.role != self._advised:
            self._advised = self._advice.role
            self._line(f"advice: {self._advice.text}")

    def _line(self, text: str) -> None:
        if not self._console.is_terminal:
            _print_line(self._console, text)

    def _left(self, steps: int) -> str:
        """Hours, minutes and seconds that so many steps will take, if they take as long as the newest ones did."""
        seconds = [line["seconds/step"] for line in self._lines if "seconds/step" in line]
        return str(timedelta(seconds=round(steps * sum(seconds) / len(seconds)))) if seconds else "?"

    def _render(self) -> Group:
        parts: list[RenderableType] = [self._progress]
        if self._lines:
            parts.append(_step_table(self._lines[-1]))
            if found := loads(self._lines[-1:]):
                parts.append(_role_table(found))
            if self._advice:
                parts.append(self._advice.text)
        if self._evaluations:
            parts.append(self._evaluation_table())
        if self._status:
            parts.append(f"… {self._status}")
        return Group(*parts)

    def _evaluation_table(self) -> Table:
        table = _table("held out", "answers", *TRAINING_METRICS.values())
        for name, summary in self._evaluations.items():
            for kind, figures in summary.items():
                table.add_row(name, kind, *(f"{figures[metric]:.3f}" for metric in TRAINING_METRICS))
        return table


def section(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    """The metrics named `prefix/…`, without the prefix."""
    return {name.removeprefix(f"{prefix}/"): value for name, value in metrics.items() if name.startswith(f"{prefix}/")}


def reward_parts(metrics: Mapping[str, float]) -> dict[str, float]:
    """The total reward and its parts, without the statistics of groups that are named `reward/…` too."""
    return {name: value for name, value in section(metrics, "reward").items() if name not in _GROUP_STATISTICS}


def _table(*headers: str) -> Table:
    return Table(*headers, box=SIMPLE_HEAD, pad_edge=False)


def _step_table(metrics: Mapping[str, float]) -> Table:
    """A step's metrics, a column for each group of them, by the names that they have everywhere."""
    answers, learner = section(metrics, "answers"), section(metrics, "learner")
    groups = {
        "reward": {name: f"{value:.3f}" for name, value in reward_parts(metrics).items()},
        "answers": {name: f"{answers[name]:.3f}" for name in TRAINING_METRICS if name in answers}
        | {name: f"{answers[name]:.0f}" for name in ("tokens",) if name in answers},
        "learner": {name: f"{learner[name]:.4f}" for name in ("kl", "entropy", "grad_norm") if name in learner}
        | {f"policy/{name}": f"{value:.2f}" for name, value in section(metrics, "policy").items()},
        "seconds": {name: f"{value:.1f}" for name, value in section(metrics, "seconds").items()},
    }
    table = _table()
    for group in groups:
        table.add_column(group)
        table.add_column("", justify="right")
    for row in zip_longest(*(rows.items() for rows in groups.values()), fillvalue=("", "")):
        table.add_row(*chain.from_iterable(row))
    return table


def _role_table(found: Mapping[str, Load]) -> Table:
    """A bar for each role: the part of the step in which it was busy, and the rest, in which it waited."""
    table = _table("time by role", "actors", "busy █ waiting ░", "", "", "all else waits")
    for role, load in found.items():
        busy = load.busy * load.seconds
        filled = round(_BAR * load.busy)
        bar = f"[green]{'█' * filled}[/]{'░' * (_BAR - filled)}"
        shares = f"{busy:.1f} s, {load.busy:.0%}", f"{load.seconds - busy:.1f} s", f"{load.awaited:.0%}"
        table.add_row(role, f"{load.actors:.0f}", bar, *shares)
    return table
