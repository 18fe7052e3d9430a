"""A vLLM engine that samples completions, reports their log-probs, and takes new weights while it is running."""

import math
from collections.abc import AsyncIterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vllm
from numpy.typing import NDArray
from PIL import Image
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from actors import orphan_guard
from actors.config import RolloutConfig
from actors.engine_report import EngineReport, UpdateReceipt
from actors.weight_files import Bucket, HostFile
from reasoner.footprint import GIB, cache_bytes, empty_model
from reasoner.prompter import Prompter
from umrg.frames import Size
from umrg.group import Completion, GroupSamples, SamplingParams
from umrg.mistake import Mistake

_CPU_BLOCK = 128  # tokens of a block of a CPU's KV cache
_FORBIDDEN = -100.0  # vLLM's lowest logit bias: e^-100 is no probability in any precision


class Engine:
    """Made by `Engine.start`, in a process that was started with `RolloutConfig.process_environment`."""

    def __init__(self, llm: AsyncLLM, prompter: Prompter, config: RolloutConfig, report: EngineReport) -> None:
        self.prompter, self.report = prompter, report
        self._llm, self._config = llm, config
        self._requests = 0

    @classmethod
    async def start(cls, model: Path, prompter: Prompter, config: RolloutConfig) -> "Engine":
        """Load a model folder. Its weights are version 0. Raises ValueError if a CPU's cache is too small."""
        check_cache(model, config)
        orphan_guard.own()
        llm = AsyncLLM.from_engine_args(
            vllm.AsyncEngineArgs(
                model=str(model),
                dtype=config.dtype,
                seed=0,
                max_model_len=config.longest,
                # Left to itself vLLM takes 128 outside its own entry points, however many wait.
                max_num_seqs=config.max_num_seqs or 128,
                # On CPU a seeded request must be prefilled whole: torch's CPU generators have no offset to resume from.
                enable_chunked_prefill=config.num_gpus > 0,
                max_num_batched_tokens=config.pass_tokens,
                enable_prefix_caching=True,
                enforce_eager=config.num_gpus == 0 or not config.cuda_graphs,
                max_cudagraph_capture_size=config.captured,
                kv_cache_dtype=config.kv_cache,
                tensor_parallel_size=config.tensor_parallel,
                # In a placement group vLLM would ask Ray for its workers, for which the run's group has no bundles.
                distributed_executor_backend="mp" if config.tensor_parallel > 1 else None,
                gpu_memory_utilization=config.gpu_memory,
                limit_mm_per_prompt={"image": 1, "video": 0},
                mm_processor_kwargs=prompter.vllm_arguments,
                # Of the sampling distribution: temperature-scaled, the forbidden tokens left out.
                logprobs_mode="processed_logprobs",
                weight_transfer_config=WeightTransferConfig(backend="medreasoner-host"),
                worker_extension_cls="actors.weight_transfer.WorkerExtension",
                disable_log_stats=True,
            )
        )
        await llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))
        await llm.update_weight_version("0")
        attention: list[list[str]] = await llm.collective_rpc("attention")
        return cls(llm, prompter, config, report(llm.vllm_config, attention[0]))

    async def generate(self, image: NDArray[np.uint8], query: str, sampling: SamplingParams) -> GroupSamples:
        """Sample n completions of a query about an image uint8 [H, W, 3], in one request; vLLM seeds completion i with
        seed + i. Raises ValueError for a prompt over `max_prompt_tokens`."""
        size = Size(image.shape[1], image.shape[0])
        self._check_length(query, size)
        self._requests += 1
        parameters = vllm.SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            logprobs=0,
            flat_logprobs=True,
            # Detokenizing token by token costs as much as sampling; `completion_text` decodes once.
            detokenize=False,
            logit_bias=dict.fromkeys(self.prompter.vision_tokens, _FORBIDDEN),
            # Streamed outputs leave completions out when n > 1.
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = {"prompt": self.prompter.chat_text(query), "multi_modal_data": {"image": Image.fromarray(image)}}
        final: Any = None
        async for output in self._llm.generate(prompt, parameters, request_id=f"request-{self._requests}"):
            final = output
        assert final is not None and len(final.outputs) == sampling.n, "vLLM left answers out"
        outputs = sorted(final.outputs, key=lambda output: output.index)
        return GroupSamples(
            prompt_ids=tuple(final.prompt_token_ids),
            frames=self.prompter.frames(size),
            completions=tuple(self._completion(output) for output in outputs),
            cached=int(final.num_cached_tokens or 0),
        )

    async def update_weights(self, buckets: AsyncIterable[Bucket], version: int) -> UpdateReceipt:
        """Replace the weights by those of some buckets, of which one at a time is in memory; requests in flight pause
        between two tokens."""
        await self._llm.pause_generation(mode="keep", clear_cache=True)
        try:
            await self._llm.start_weight_update()
            with HostFile() as file:
                async for bucket in buckets:
                    file.write(bucket)
                    entries = [asdict(entry) for entry in bucket.entries]
                    info = {"path": file.path, "entries": entries, "exact": bucket.exact}
                    await self._llm.update_weights(WeightTransferUpdateRequest(update_info=info))
            await self._llm.finish_weight_update(weight_version=str(version))
            found: list[tuple[str, int, list[str]]] = await self._llm.collective_rpc("received")
        finally:
            await self._llm.resume_generation()
        assert len({checksum for checksum, _, _ in found}) == 1, "the workers of one engine received different weights"
        unlike = [name for _, _, names in found for name in names]
        return UpdateReceipt(
            checksum=found[0][0], compared=min(count for _, count, _ in found), unlike=tuple(dict.fromkeys(unlike))
        )

    def stop(self) -> None:
        """End the engine's processes."""
        self._llm.shutdown()

    def _check_length(self, query: str, image: Size) -> None:
        tokens, most = self.prompter.prompt_tokens(query, image), self._config.max_prompt_tokens
        if tokens > most:
            raise Mistake(
                f"the prompt has {tokens} tokens, {self.prompter.image_tokens(image)} of them for the image, and "
                f"rollout.max_prompt_tokens allows {most}; raise it, shorten the question or make the image smaller"
            )

    def _completion(self, output: Any) -> Completion:
        versions = [int(span.version) for span in output.weight_versions or ()]
        return Completion(
            text=self.prompter.completion_text(output.token_ids),
            token_ids=tuple(output.token_ids),
            logprobs=tuple(output.logprobs.logprobs),
            # A completion that an update interrupted counts as the oldest weights that sampled a part of it.
            policy_version=min(versions),
            finished=output.finish_reason == "stop",
        )


def check_cache(model: Path, config: RolloutConfig) -> None:
    """Raise ValueError if a CPU's KV cache cannot hold the longest prompt with its completion, which vLLM would say on
    its core's stderr alone. A GPU's is looked at with all else that its memory holds (`cluster.memory`)."""
    if config.num_gpus > 0:
        return
    dtype = getattr(torch, config.dtype)
    blocks = math.ceil(config.longest / _CPU_BLOCK) + 1  # vLLM keeps one to itself
    needed = blocks * _CPU_BLOCK * cache_bytes(empty_model(model, dtype), dtype.itemsize)
    if needed > config.cpu_cache_gib * GIB:
        raise Mistake(
            f"{config.longest} tokens, the longest prompt with its completion, need {needed / GIB:.1f} GiB of an "
            f"engine's cache, which has {config.cpu_cache_gib}; raise rollout.cpu_cache_gib, or lower "
            "rollout.max_prompt_tokens or max_tokens"
        )


def report(config: Any, attention: Sequence[str]) -> EngineReport:
    """What vLLM settled when it started. config: its own. attention: the kernels of the language model's layers."""
    cache, scheduler = config.cache_config, config.scheduler_config
    return EngineReport(
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        attention=", ".join(attention),
        kv_cache=str(cache.cache_dtype),
        kv_tokens=int(cache.kv_cache_size_tokens or 0),
        concurrency=round(float(cache.kv_cache_max_concurrency or 0), 2),
        max_num_seqs=int(scheduler.max_num_seqs),
        max_num_batched_tokens=int(scheduler.max_num_batched_tokens),
        cuda_graphs=not config.model_config.enforce_eager,
    )
