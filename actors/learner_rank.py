"""The learner actor: one ZeRO rank that learns by GRPO, in a process of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from actors.weight_files import WeightsDigest, pack
from actors.zero_actor import ZeroActor
from learner.config import LearnerConfig
from learner.update_report import UpdateReport
from umrg.group import Group, GroupSamples
from umrg.prompts import PromptSpec
from umrg.sample import Sample

if TYPE_CHECKING:
    from learner.grpo import GrpoRank


class LearnerRank(ZeroActor):
    """As `ZeroActor`. longest: tokens that an answer may have."""

    def __init__(
        self,
        model: Path,
        config: LearnerConfig,
        *,
        rank: int,
        updates: int,
        longest: int,
        temperature: float,
        seed: int,
        spec: PromptSpec,
        run: Path | None = None,
    ) -> None:
        super().__init__(
            model,
            config,
            rank=rank,
            updates=updates,
            seed=seed,
            spec=spec,
            temperature=temperature,
            entropy_learns=config.objective.entropy > 0,
            run=run,
        )
        self._config, self._longest = config, longest
        self._grpo: GrpoRank | None = None

    def start(self, host: str, port: int, seconds: float) -> None:
        """As `ZeroActor.start`, and the model that the run began with is loaded too where it is wanted."""
        super().start(host, port, seconds)
        from learner.grpo import GrpoRank

        self._grpo = GrpoRank(self.running(), self._config, self._model, longest=self._longest)

    def update(
        self,
        groups: Sequence["ray.ObjectRef[Group]"],
        samples: Sequence[GroupSamples],
        rewards: Sequence[Sequence[float]],
    ) -> UpdateReport:
        """Learn from a step's groups, given by reference; all ranks."""
        from learner.scored_group import ScoredGroup

        assert self._grpo is not None, "the learner was not started"
        return self._grpo.update(
            [
                ScoredGroup(
                    id=group.id,
                    sample=group.sample,
                    prompt_ids=sampled.prompt_ids,
                    completions=sampled.completions,
                    rewards=tuple(values),
                )
                for group, sampled, values in zip(ray.get(list(groups)), samples, rewards, strict=True)
            ]
        )

    def weights(self) -> tuple[str, list["ray.ObjectRef[bytes]"]]:
        """Digest of the weights, and buckets of them as safetensors bytes; all ranks, though only the first gives."""
        digest, buckets = WeightsDigest(), []
        for tensors in self.running().named_weights():
            if self._rank == 0:
                digest.add(tensors)
                buckets.append(ray.put(pack(tensors)))
        return digest.hexdigest(), buckets

    def logprobs(self, sample: Sample, token_ids: Sequence[int]) -> list[float]:
        """Log-probs of an answer's tokens to a sample's query; all ranks."""
        import torch

        from learner.shared_prefix import Branches

        zero = self.running()
        prompt = zero.reasoner.encode(sample.query, zero.reasoner.encode_image(sample.image()))
        with torch.no_grad():
            scores = zero.scores([Branches(prefix=prompt, branches=[torch.tensor(token_ids)])])
        values: list[float] = scores.logprobs.tolist()
        return values
