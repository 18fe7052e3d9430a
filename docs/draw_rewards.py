"""The pictures of rewards.md, drawn from the terms themselves: `python -m docs.draw_rewards`."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from numpy.typing import NDArray

from rewards.box import bbox_align, bbox_iou, bbox_scale
from rewards.case import Case, Drawn, Reference
from rewards.mask import boundary, mask_dice, mask_iou
from rewards.options import Schedule
from rewards.smoothing import blend, sexp, slog
from umrg.answers import Answer, Form
from umrg.atomic import written_aside
from umrg.frames import Box, Size

PICTURES = Path(__file__).parent / "pictures"
ORANGE, BLUE, GREEN, GREY = "#d55e00", "#0072b2", "#009e73", "#888888"
REFERENCE = Reference(box=(320, 320, 520, 520), points=((380, 380), (460, 460)), size=Size(840, 840))


def case(box: Box, mask: NDArray[np.bool_] | None = None, target: NDArray[np.bool_] | None = None) -> Case:
    answer = Answer(think="", form=Form.CORRECT, box=box, points=REFERENCE.points, strict=True)
    reference = Reference(box=REFERENCE.box, points=REFERENCE.points, size=REFERENCE.size, mask=target)
    return Case(answer=answer, reference=reference, drawn=None if mask is None else Drawn.of(mask, reference))


def smoothing(axes: Any) -> None:
    """Both curves beside the straight lines that they replace."""
    rising, falling, schedule = axes
    v = np.linspace(0, 1, 101)
    for strength, style in ((1.0, "-"), (0.5, "--"), (0.0, ":")):
        rising.plot(v, [blend(x, slog(x), strength) for x in v], style, color=ORANGE, label=f"smooth: {strength:g}")
    rising.set(title="slog: IoU, circles, angle", xlabel="raw value", ylabel="reward")
    v = np.linspace(0, 2, 201)
    falling.plot(v, [sexp(x, centre=1.0) for x in v], color=BLUE, label="sexp, c = 1: align")
    falling.plot(v, 1 - v / 2, ":", color=BLUE, label="raw align")
    falling.plot(v[:101], [sexp(x, centre=0.5) for x in v[:101]], color=GREEN, label="sexp, c = 0.5: scale")
    falling.plot(v[:101], 1 - v[:101], ":", color=GREEN, label="raw scale")
    falling.set(title="sexp: edges, size", xlabel="relative error")
    steps = range(301)
    tightening = Schedule(start=0.3, end=0.7, steps=200)
    schedule.plot(steps, [tightening.at(step) for step in steps], color=ORANGE)
    schedule.set(title="{start: 0.3, end: 0.7, steps: 200}", xlabel="training step", ylabel="threshold", ylim=(0, 1))


def moved_boxes(axes: Any) -> None:
    """What a shifted box, a box of another size and a shifted mask are worth."""
    shift, size, mask = axes
    offsets = range(0, 301, 2)
    _curves(shift, offsets, [case((320 + d, 320, 520 + d, 520)) for d in offsets])
    shift.set(title="a box of 200x200 px, shifted", xlabel="shift in px", ylabel="reward")
    factors = np.geomspace(0.25, 4, 241)
    grown = [case((420 - 100 * f, 420 - 100 * f, 420 + 100 * f, 420 + 100 * f)) for f in factors]
    _curves(size, factors, grown)
    size.set(title="the same box, grown and shrunk", xlabel="side / reference side", xscale="log")
    size.minorticks_off()
    size.set_xticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    discs = [disc(420 + d) for d in range(31)]
    shifted = [case(REFERENCE.box, each, discs[0]) for each in discs]
    _plot(mask, range(31), shifted, mask_dice, label="mask_dice", color=ORANGE)
    _plot(mask, range(31), shifted, mask_iou, label="mask_iou", color=BLUE)
    _plot(mask, range(31), shifted, boundary, label="boundary, 2 px", color=GREEN)
    mask.set(title="a disc of 80 px across, shifted", xlabel="shift in px")


def disc(x: float) -> NDArray[np.bool_]:
    rows, columns = np.ogrid[:840, :840]
    inside: NDArray[np.bool_] = (columns - x) ** 2 + (rows - 420) ** 2 <= 40**2
    return inside


def _curves(axis: Any, x: Iterable[float], cases: list[Case]) -> None:
    _plot(axis, x, cases, lambda c: bbox_iou(c, smooth=0, damped=0), label="raw IoU", color=GREY, linestyle=":")
    for term, colour in ((bbox_iou, ORANGE), (bbox_align, BLUE), (bbox_scale, GREEN)):
        _plot(axis, x, cases, term, label=term.__name__, color=colour)


def _plot(axis: Any, x: Iterable[float], cases: list[Case], term: Callable[[Case], float], **style: str) -> None:
    axis.plot(list(x), [term(each) for each in cases], **style)


def draw(name: str, content: Callable[[Any], None]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    content(axes)
    for axis in axes:
        axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    with written_aside(PICTURES / name) as aside:
        figure.savefig(aside, format="png", dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    mpl.use("agg")
    draw("rewards_smoothing.png", smoothing)
    draw("rewards_boxes.png", moved_boxes)
