"""The groups of the step that is to be learnt from next, and of those that rollouts and segmenters may work on already.

With a staleness of k the steps from the next one to the k-th after it are open at the same time:

    rollouts, segmenters   │ step t │ step t+1        │ step t+2        │
    learner                         │ step t │ ─ ─ ─  │ step t+1 │ ─ ─  │       k = 1

A group is sampled with weights at most k versions older than those that learn from it, because the step after those is
opened only when the next version is there, and a rollout that has not taken that over is given nothing. With k = 0 one
step is open, and only while nothing is learnt.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from cluster.evaluation import Collected


class Begun(Protocol):
    """Groups on their way (`cluster.evaluation.Collecting`)."""

    @property
    def sampled(self) -> bool: ...

    @property
    def closed(self) -> bool: ...

    @property
    def aside(self) -> int: ...

    def dispatch(self) -> None: ...

    def collected(self) -> list[Collected]: ...


@dataclass(kw_only=True)
class _Step:
    """The groups of one step. Zero-variance groups are replaced by newly sampled ones, as often as is allowed (dynamic
    sampling: DAPO, Yu et al. 2025, arXiv:2503.14476)."""

    number: int
    rows: dict[int, int]
    """Row of each group that is not yet given up as a zero-variance one, by the group's index."""
    collecting: Begun | None
    """None once all are there."""
    retries: int
    """How often zero-variance groups may yet be replaced."""
    sampled: int
    """Groups so far; the index of the next one."""
    put_aside: int = 0
    kept: list[Collected] = field(default_factory=list)


class StepsAhead:
    """The open steps, in their order."""

    def __init__(
        self,
        *,
        draw: Callable[[int], list[int]],
        begin: Callable[[int, int, Sequence[int], int], Begun],
        tend: Callable[[], None],
        turn: Callable[[], None],
        batch: int,
        retries: int,
        staleness: int,
        last: int,
    ) -> None:
        """draw: takes so many rows from the data. begin: sends rows as groups of a step on their way; it is given the
        step, the index of the first group, the rows, and how many groups of the step were put aside. tend: looks after
        the pools, and waits for rollouts and segmenters not at all. turn: waits until something happens, a second at
        most. batch: groups of a step. retries: how often zero-variance groups of a step are replaced. last: number of
        the last step, from 0."""
        self._draw, self._begin, self._tend, self._wait = draw, begin, tend, turn
        self._batch, self._retries, self._staleness, self._last = batch, retries, staleness, last
        self._steps: list[_Step] = []
        self._listed: list[list[int]] = []
        self._awaited: _Step | None = None
        """The one that `collect` waits for, and takes further itself."""

    def restore(self, rows: Sequence[Sequence[int]]) -> None:
        """Forget the open steps. rows: those that the next steps begin with, as `rows` told them."""
        self._steps, self._listed, self._awaited = [], [list(each) for each in rows], None

    def rows(self) -> list[list[int]]:
        """Of each step that was begun, the rows that are not yet learnt from."""
        return [*(list(step.rows.values()) for step in self._steps), *self._listed]

    def collect(
        self,
        number: int,
        *,
        phase: Callable[[str], AbstractContextManager[None]],
        meanwhile: Callable[[], None],
    ) -> tuple[list[Collected], int]:
        """The groups of a step, and how many zero-variance groups were replaced. phase: times the phases "rollout" and
        "score". meanwhile: called at once, and at least once a second. Raises TooManyFailures."""
        for open in range(number + len(self._steps), min(number + self._staleness, self._last) + 1):
            self._open(open)
        step = self._awaited = self._steps[0]
        assert step.number == number
        with phase("rollout"):  # also where nothing is waited for, as the learner is free only between two steps
            meanwhile()
            self._tend()
        if step.collecting is None:
            with phase("score"):
                pass
        while (collecting := step.collecting) is not None:
            with phase("rollout"):
                while not collecting.sampled:
                    self._turn(meanwhile)
            with phase("score"):
                while not collecting.closed:
                    self._turn(meanwhile)
            self._advance(step)
        self._awaited = None
        del self._steps[0]
        return step.kept, step.sampled - len(step.kept) - step.put_aside

    def attend(self) -> None:
        """While the learner is busy: let rollouts and segmenters work on what is open. Makes calls, and waits for
        none."""
        if self._steps:
            self._tend()
            self._dispatch()

    def _turn(self, meanwhile: Callable[[], None]) -> None:
        self._tend()
        self._dispatch()
        self._wait()
        meanwhile()

    def _dispatch(self) -> None:
        for step in self._steps:
            if step is not self._awaited:
                self._advance(step)
            elif step.collecting is not None:
                step.collecting.dispatch()

    def _open(self, number: int) -> None:
        listed = self._listed.pop(0) if self._listed else []
        rows = [*listed, *(self._draw(self._batch - len(listed)) if len(listed) < self._batch else [])]
        self._steps.append(
            _Step(
                number=number,
                rows=dict(enumerate(rows)),
                collecting=self._begin(number, 0, rows, 0),
                retries=self._retries,
                sampled=len(rows),
            )
        )

    def _advance(self, step: _Step) -> None:
        """Dispatch what there is room for; take what is closed, and replace its zero-variance groups."""
        if step.collecting is None:
            return
        step.collecting.dispatch()
        if not step.collecting.closed:
            return
        step.put_aside += step.collecting.aside
        collected = step.collecting.collected()
        step.kept += [group for group in collected if not group.scored.zero_variance]
        zero_variance = [group for group in collected if group.scored.zero_variance]
        missing = self._batch - len(step.kept)
        if not zero_variance or not step.retries:
            # Zero-variance groups that no retry replaced are kept: every step has the same number of groups.
            step.kept += zero_variance[:missing]
            step.collecting = None
        else:
            fresh = self._draw(missing)
            step.collecting = self._begin(step.number, step.sampled, fresh, step.put_aside)
            step.retries -= 1
            step.rows = {
                **{group.scored.group.index: step.rows[group.scored.group.index] for group in step.kept},
                **dict(enumerate(fresh, start=step.sampled)),
            }
            step.sampled += len(fresh)
