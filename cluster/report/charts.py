"""Charts as SVG text, drawn with matplotlib."""

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

matplotlib.use("Agg")
matplotlib.rcParams.update(
    {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "svg.fonttype": "none",
        "svg.hashsalt": "medreasoner",
    }
)
COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280", "#718096")

Series = Mapping[str, Sequence[float]]


def curves(title: str, steps: Sequence[int], series: Series, *, smooth: bool = True) -> str:
    """Lines over steps; with `smooth`, running means over a tenth of the steps, with the values pale behind them."""
    figure, axes = _figure(title)
    window = max(1, len(steps) // 10) if smooth else 1
    for colour, (name, values) in zip(COLOURS, series.items(), strict=False):
        if window > 1:
            axes.plot(steps, values, color=colour, alpha=0.22, linewidth=1)
        axes.plot(steps, running_mean(values, window), color=colour, linewidth=1.8, label=name)
    axes.set_xlabel("step")
    if len(series) > 1:
        _legend(axes)
    return _svg(figure)


def stacked(title: str, steps: Sequence[int], series: Series, unit: str) -> str:
    """Stacked areas over steps."""
    figure, axes = _figure(title)
    axes.stackplot(steps, *series.values(), labels=list(series), colors=COLOURS, alpha=0.85, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
    _legend(axes)
    return _svg(figure)


def histogram(title: str, values: Series, unit: str) -> str:
    """Histograms of values in [0, 1], in twenty bins."""
    figure, axes = _figure(title)
    for colour, (name, found) in zip(COLOURS, values.items(), strict=False):
        axes.hist(found, bins=np.linspace(0, 1, 21).tolist(), color=colour, alpha=0.55, label=name)
    axes.set_xlabel(unit)
    axes.set_ylabel("rows")
    if len(values) > 1:
        _legend(axes)
    return _svg(figure)


def bars(title: str, means: Mapping[str, tuple[float, float, float]], unit: str) -> str:
    """Horizontal bars, the highest mean on top. means: (mean, low, high) by name."""
    order = sorted(means, key=lambda name: means[name][0])
    figure, axes = _figure(title, height=max(1.6, 0.9 + 0.24 * len(order)))
    values = np.array([means[name] for name in order])
    spans = np.clip([values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]], 0, None)
    axes.barh(order, values[:, 0], xerr=spans, color=COLOURS[0], alpha=0.75, error_kw={"ecolor": "#444", "lw": 1})
    axes.set_xlabel(unit)
    axes.set_xlim(0, 1)
    return _svg(figure)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and the up to `window - 1` values before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    means: list[float] = ((sums[ends] - sums[starts]) / (ends - starts)).tolist()
    return means


def _figure(title: str, height: float = 2.9) -> tuple[Figure, "matplotlib.axes.Axes"]:
    figure = Figure(figsize=(5.2, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    return figure, axes


def _legend(axes: "matplotlib.axes.Axes") -> None:
    """Put the legend beside the chart, where it hides nothing."""
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
