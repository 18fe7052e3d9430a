"""The learner actor: one ZeRO rank in a process of its own."""

import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from actors.weight_files import WeightsDigest, pack
from learner.config import LearnerConfig
from learner.update_report import UpdateReport
from umrg.group import Group, GroupSamples
from umrg.prompts import PromptSpec
from umrg.sample import Sample

if TYPE_CHECKING:
    from learner.background import Records
    from learner.checkpoint import RankCheckpoints
    from learner.grpo import GrpoRank
    from learner.zero import ZeroRank


class LearnerRank:
    """Rank `rank` of `config.ranks`. `start` must have returned on every rank before anything else is called, and what
    is a collective must be called on every rank. updates: that the whole run makes. longest: tokens that an answer may
    have. run: where all ranks write their parts of checkpoints."""

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
        self._model, self._config, self._rank = model, config, rank
        self._updates, self._longest = updates, longest
        self._temperature, self._seed, self._spec, self._run = temperature, seed, spec, run
        self._zero: ZeroRank | None = None
        self._grpo: GrpoRank | None = None
        self._checkpoints: RankCheckpoints | None = None

    def address(self) -> tuple[str, int]:
        """Where the ranks may meet: this host and a free port of it."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), int(probe.getsockname()[1])

    def start(self, host: str, port: int, seconds: float) -> None:
        """Meet the other ranks and load the model; each collective may last `seconds`. Raises ValueError where the
        run's folder is not to be seen from here, or the model cannot be loaded."""
        if self._run is not None and not self._run.is_dir():
            raise ValueError(
                f"the run's folder {self._run} is not on this node ({ray.util.get_node_ip_address()}); give runs=… on "
                "storage that all nodes share"
            )
        on_gpu = self._config.num_gpus > 0
        os.environ.update(
            RANK=str(self._rank),
            WORLD_SIZE=str(self._config.ranks),
            LOCAL_RANK="0",  # Ray shows each actor its own GPUs only
            MASTER_ADDR=host,
            MASTER_PORT=str(port),
        )
        import deepspeed
        import torch

        from actors.threads import share_cores
        from learner.checkpoint import RankCheckpoints
        from learner.grpo import GrpoRank
        from learner.zero import ZeroRank

        share_cores(self._config.threads, self._config.ranks)

        torch.manual_seed(self._seed)
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo", timeout=timedelta(seconds=seconds), verbose=False
        )
        self._zero = ZeroRank(
            self._model,
            self._config,
            self._spec,
            updates=self._updates,
            temperature=self._temperature,
            entropy_learns=self._config.objective.entropy > 0,
            device="cuda" if on_gpu else "cpu",
        )
        self._grpo = GrpoRank(self._zero, self._config, self._model, longest=self._longest)
        self._checkpoints = RankCheckpoints(self._zero)

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
        for tensors in self._running().named_weights():
            if self._rank == 0:
                digest.add(tensors)
                buckets.append(ray.put(pack(tensors)))
        return digest.hexdigest(), buckets

    def logprobs(self, sample: Sample, token_ids: Sequence[int]) -> list[float]:
        """Log-probs of an answer's tokens to a sample's query; all ranks."""
        import torch

        from learner.shared_prefix import Branches

        zero = self._running()
        prompt = zero.reasoner.encode(sample.query, zero.reasoner.encode_image(sample.image()))
        with torch.no_grad():
            scores = zero.scores([Branches(prefix=prompt, branches=[torch.tensor(token_ids)])])
        values: list[float] = scores.logprobs.tolist()
        return values

    def save(self, folder: Path) -> None:
        """Copy optimizer, model and random state, and begin to write them; all ranks."""
        assert self._checkpoints is not None, "the learner was not started"
        self._checkpoints.begin(folder)

    def saved(self, seconds: float) -> "Records | None":
        """Once, the files that `save` wrote; None where this rank still writes after so many seconds."""
        assert self._checkpoints is not None, "the learner was not started"
        return self._checkpoints.written(seconds)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote; all ranks."""
        assert self._checkpoints is not None, "the learner was not started"
        self._checkpoints.load(folder)

    def _running(self) -> "ZeroRank":
        assert self._zero is not None, "the learner was not started"
        return self._zero
