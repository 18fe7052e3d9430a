"""Groups sampled and scored: what both training and evaluation are made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ray

from actors.pools import Ref
from cluster.clock import Clock
from cluster.workers import Workers
from rewards.scored import ScoredAnswer
from umrg.group import Group, GroupSamples


@dataclass(frozen=True, kw_only=True)
class Experience:
    """One group, its answers and what they are worth. ref: of the group, so that its image travels once."""

    group: Group
    ref: Ref
    samples: GroupSamples
    scored: tuple[ScoredAnswer, ...]

    @property
    def rewards(self) -> list[float]:
        return [answer.reward.total for answer in self.scored]

    @property
    def flat(self) -> bool:
        """All answers are worth the same, so that their advantages are 0."""
        return max(self.rewards) - min(self.rewards) < 1e-9


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How each group is sampled. run_seed: what the groups' own seeds are hashed with."""

    n: int
    temperature: float
    max_tokens: int
    run_seed: int


def gain(
    workers: Workers,
    groups: Sequence[Group],
    draw: Draw,
    clock: Clock,
    *,
    thorough: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
) -> list[Experience]:
    """Sample and score groups; a group is scored while others are still being sampled. thorough: with all metrics.
    meanwhile: called now and then while groups are sampled, when the learner has nothing to do."""
    refs = {group.id: ray.put(group) for group in groups}
    samples, scoring = {}, {}
    with clock.phase("rollout"):
        for group, sampled in workers.rollouts.sample(
            refs,
            n=draw.n,
            temperature=draw.temperature,
            max_tokens=draw.max_tokens,
            run_seed=draw.run_seed,
            meanwhile=meanwhile,
        ):
            samples[group] = sampled
            scoring[group] = workers.segmenters.score(refs[group], sampled, thorough=thorough)
    with clock.phase("score"):
        scored = workers.segmenters.collect(scoring)
    return [
        Experience(group=group, ref=refs[group.id], samples=samples[group.id], scored=scored[group.id])
        for group in groups
    ]
