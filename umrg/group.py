"""A group: one prompt and its n completions, the unit of work of the whole pipeline.

    Sample ──► Group ──rollout──► GroupSamples (Completion × n) ──segmenter──► ScoredGroup ──► learner

Worked example: group (run "demo", step 3, index 5) has the id "demo/3/5"; its third answer is "demo/3/5/2" and is
sampled with the seed `group.seed(run_seed) + 2`.
"""

import hashlib
from dataclasses import dataclass, field, replace

from umrg.frames import Frames
from umrg.sample import Sample


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How completions are sampled, from the configuration to the engine. `top_p` and `top_k` are always neutral, so
    that the engine's log-probs are those of the distribution that is learnt from."""

    n: int
    """Completions per prompt."""
    temperature: float
    """0 for the greedy completion."""
    max_tokens: int
    """Longest completion, in tokens."""
    seed: int | None = None
    """Of the run, from which each group's own is derived (`Group.seeded`), or of the first completion of one request,
    from which an engine derives the others'. None for one of the engine's choice."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """One prompt of one step, and the place of its completions."""

    run: str
    """Name of the run."""
    step: int
    """The training step that consumes the group."""
    index: int
    """Its place within the step."""
    sample: Sample
    """The dataset row that is asked about. Rollouts and learner ranks get it without its masks, and a `ScoredGroup`
    carries it without any file, so that an image travels once."""

    @property
    def id(self) -> str:
        return f"{self.run}/{self.step}/{self.index}"

    def answer_id(self, i: int) -> str:
        return f"{self.id}/{i}"

    def seed(self, run_seed: int) -> int:
        """Sampling seed of the first completion, in [0, 2**31). It is a hash, so that the seeds that an engine derives
        by adding small numbers to one group's seed never meet another group's."""
        text = f"{run_seed}/{self.step}/{self.index}/0".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:4]) >> 1

    def seeded(self, sampling: SamplingParams) -> SamplingParams:
        """The run's sampling parameters with this group's own seed."""
        assert sampling.seed is not None, "a run has a seed"
        return replace(sampling, seed=self.seed(sampling.seed))

    def without_masks(self) -> "Group":
        """The group as rollouts and learner ranks get it."""
        return replace(self, sample=replace(self.sample, mask_bytes=()))

    def without_files(self) -> "Group":
        """The group as a `ScoredGroup` carries it: image and masks stay with whoever has the row."""
        return replace(self, sample=replace(self.sample, image_bytes=b"", mask_bytes=()))


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled completion."""

    text: str
    """The whole completion without special tokens, with what the chat template wrote of it."""
    token_ids: tuple[int, ...] = field(repr=False)
    """The tokens that were sampled, the end token included; () where an endpoint does not tell."""
    logprobs: tuple[float, ...] = field(repr=False)
    """Of each token, under the sampling distribution (temperature-scaled, image tokens excluded)."""
    policy_version: int
    """Version of the weights that produced it; of several, the oldest."""
    finished: bool
    """It ended by itself, not at the limit of tokens."""
    versions: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    """Where the weights changed while it was sampled: version and number of tokens of each stretch, in order; () where
    one version sampled all of it."""


@dataclass(frozen=True, kw_only=True)
class GroupSamples:
    """What an engine makes of one prompt."""

    prompt_ids: tuple[int, ...] = field(repr=False)
    """The prompt's token ids, image placeholders expanded, as the engine saw them; () where an endpoint does not
    tell."""
    frames: Frames
    """The image's coordinate frames."""
    completions: tuple[Completion, ...]
    """The n completions."""
    cached: int = field(default=0, compare=False)
    """How many of the prompt's tokens the completion that ended last found in the engine's prefix cache."""
