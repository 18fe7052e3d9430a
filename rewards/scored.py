"""A scored group: a prompt's completions with their rewards, as journal, report, evaluation and learner read it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from rewards.scoring import Reward
from umrg.answers import Answer
from umrg.group import Group, GroupSamples

ScoringDepth = Literal["reward", "masks", "ablations"]
"""How much of a group is measured. reward: what the reward looks at; where it looks at no mask, none is decoded. masks:
the metrics of the expert's masks too. ablations: also those of masks from the box alone and from the points alone, and
the ceiling that the expert reaches with the reference."""


@dataclass(frozen=True, kw_only=True)
class ScoredAnswer:
    """A completion's parsed answer, reward and metrics."""

    reward: Reward
    """Total and named parts."""
    answer: Answer
    """Box and points in original pixels."""
    failure: str | None
    """Why the answer is not well formed; None where it is."""
    metrics: Mapping[str, float]
    """Measured against the reference, by name; those of masks only where masks were decoded."""
    mask: Mapping[str, object] | None = field(default=None, repr=False)
    """The expert's mask, COCO run-length encoded [H, W]; None where none was decoded."""
    expert_score: float | None = None
    """The expert's own prediction of the mask's IoU; None without a mask."""


@dataclass(frozen=True, kw_only=True)
class ScoredGroup:
    """A group with its completions and their rewards; made by a segmenter actor."""

    group: Group
    """Without the row's files (`Group.without_files`); who needs the image joins the group to it again."""
    samples: GroupSamples
    """Its n completions, as sampled."""
    answers: tuple[ScoredAnswer, ...]
    """One per completion, in the same order."""

    @property
    def rewards(self) -> tuple[float, ...]:
        """Total reward of each answer."""
        return tuple(answer.reward.total for answer in self.answers)

    @property
    def tokens(self) -> int:
        """Of all completions."""
        return sum(len(completion.token_ids) for completion in self.samples.completions)

    @property
    def zero_variance(self) -> bool:
        """All rewards are equal, so that the advantages are 0."""
        return max(self.rewards) - min(self.rewards) < 1e-9
