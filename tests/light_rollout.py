"""A rollout in a tenth of vLLM's memory, for runs of many."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from actors.config import RolloutConfig
from actors.engine_report import EngineReport, UpdateReceipt
from actors.gpus import Place, this_place
from actors.weight_files import Checksum, unpack
from learner.policy import Policy
from learner.shared_prefix import Branches, pack
from reasoner.model import load_reasoner
from umrg.answers import format_answer
from umrg.frames import Frame
from umrg.group import Completion, Group, GroupSamples, SamplingParams
from umrg.prompts import PromptSpec


class LightRollout:
    """Its answers are drawn at random, by the group's seed; their log-probs are the model's. It stands for `Rollout`,
    weights included, and has no engine."""

    def __init__(self, model: Path, config: RolloutConfig, spec: PromptSpec) -> None:
        self._model, self._config, self._spec = model, config, spec
        self._version = 0

    async def place(self) -> Place:
        return this_place()

    async def start(self, sharers: int = 1) -> EngineReport:
        torch.set_num_threads(1)
        self._reasoner = load_reasoner(self._model, self._spec)
        self._policy = Policy(
            self._reasoner.model, temperature=self._config.temperature, forbidden=self._reasoner.vision_tokens
        )
        return EngineReport(
            dtype="float32",
            attention="none",
            kv_cache="none",
            kv_tokens=0,
            concurrency=0.0,
            max_num_seqs=self._config.max_num_seqs or 128,
            max_num_batched_tokens=0,
            cuda_graphs=False,
        )

    async def sample(self, group: Group, sampling: SamplingParams) -> GroupSamples:
        sample, reasoner = group.sample, self._reasoner
        prompt = reasoner.encode(sample.query, reasoner.encode_image(sample.image()))
        frames = reasoner.frames(sample.size)
        seed = group.seeded(sampling).seed
        assert seed is not None
        texts = [self._answer(sample.box, frames, np.random.default_rng(seed + i)) for i in range(sampling.n)]
        branches = [reasoner.completion_ids(text)[: sampling.max_tokens] for text in texts]
        with torch.no_grad():
            scores = self._policy(pack([Branches(prefix=prompt, branches=branches)], reasoner.model)).logprobs
        each = scores.split([len(branch) for branch in branches])
        return GroupSamples(
            prompt_ids=tuple(prompt.token_ids.tolist()),
            frames=frames,
            completions=tuple(
                Completion(
                    text=text,
                    token_ids=tuple(branch.tolist()),
                    logprobs=tuple(logprobs.tolist()),
                    policy_version=self._version,
                    finished=True,
                )
                for text, branch, logprobs in zip(texts, branches, each, strict=True)
            ),
            cached=0,
        )

    async def sampled(self, group: Group, sampling: SamplingParams) -> tuple[float, GroupSamples]:
        began = time.monotonic()
        samples = await self.sample(group, sampling)
        return time.monotonic() - began, samples

    async def update_weights(self, version: int, buckets: Sequence) -> UpdateReceipt:
        checksum, live = Checksum(), dict(self._reasoner.model.named_parameters())
        ours = {saved: name for name in live for saved in self._reasoner.as_saved({name: torch.empty(0)})}
        with torch.no_grad():
            for ref in buckets:
                bucket = await ref
                tensors = unpack(bucket)
                checksum.add(tensors, exact=bucket.exact)
                for name, tensor in tensors.items():
                    live[ours.get(name, name)].copy_(tensor)
        self._version = version
        return UpdateReceipt(checksum=checksum.hexdigest(), compared=len(live), unlike=())

    async def stop(self) -> None:
        pass

    def _answer(self, box, frames, chance: np.random.Generator) -> str:
        """The reference's box with each edge moved a little, and two points in it."""
        low, high = np.array(box[:2]), np.array(box[2:])
        low, high = low + chance.integers(-9, 4, 2), high + chance.integers(-3, 10, 2)
        low = np.maximum(low, 0)
        points = tuple(tuple(map(float, low + share * (high - low))) for share in (0.4, 0.6))
        return format_answer(
            box=frames.box((*map(float, low), *map(float, high)), Frame.ORIGINAL, self._spec.frame),
            points=frames.points(points, Frame.ORIGINAL, self._spec.frame),
            think="It is there." if self._spec.think else None,
        )
