"""A group: one prompt and its n answers, the unit of work of the whole pipeline.

    sample ──► Group ──rollout──► GroupSamples (Completion × n) ──segmenter──► ScoredAnswer × n ──► learner

Worked example: group (run "demo", step 3, index 5) has the id "demo/3/5"; its third answer is "demo/3/5/2" and is
sampled with the seed `group.seed(run_seed, 2)`.
"""

import hashlib
from dataclasses import dataclass, field

from umrg.frames import Frames
from umrg.sample import Sample


@dataclass(frozen=True, kw_only=True)
class Group:
    """One prompt of one step.

    run: name of the run. step: the training step that consumes the group. index: place within the step.
    """

    run: str
    step: int
    index: int
    sample: Sample

    @property
    def id(self) -> str:
        return f"{self.run}/{self.step}/{self.index}"

    def answer_id(self, i: int) -> str:
        return f"{self.id}/{i}"

    def seed(self, run_seed: int, i: int) -> int:
        """Sampling seed of answer i, in [0, 2**31): a hash, so that the seeds that an engine derives by adding
        small numbers to one group's seed never meet another group's."""
        text = f"{run_seed}/{self.step}/{self.index}/{i}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:4]) >> 1


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled answer.

    text: the whole completion without special tokens, with what the chat template wrote of it. token_ids: those that
    were sampled, the end token included.
    logprobs: of each token under the sampling distribution (temperature-scaled, before any bias), as many as tokens.
    policy_version: version of the weights that produced it. finished: it ended by itself, not at the limit.
    """

    text: str
    token_ids: tuple[int, ...] = field(repr=False)
    logprobs: tuple[float, ...] = field(repr=False)
    policy_version: int
    finished: bool


@dataclass(frozen=True, kw_only=True)
class GroupSamples:
    """What a rollout makes of a group. It names the group and does not hold it: images travel once.

    group: its id. prompt_ids: token ids of the prompt, image placeholders expanded, as the engine saw them.
    frames: the image's coordinate frames. completions: the n answers. cached: how many of the prompt's tokens the
    answer that ended last found in the engine's prefix cache.
    """

    group: str
    prompt_ids: tuple[int, ...] = field(repr=False)
    frames: Frames
    completions: tuple[Completion, ...]
    cached: int = field(default=0, compare=False)
