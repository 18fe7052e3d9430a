"""A vLLM engine that samples completions, reports their log-probs, and takes new weights while it is running."""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import vllm
from numpy.typing import NDArray
from PIL import Image
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestOutputCollector

from actors import orphan_guard
from actors.config import RolloutConfig
from actors.engine_report import EngineReport, UpdateReceipt
from actors.failures import Broken
from actors.weight_files import Bucket, HostFile
from reasoner.footprint import GIB, cache_bytes, empty_model
from reasoner.prompter import Prompter, Writing
from umrg.frames import Size
from umrg.group import Completion, GroupSamples, SamplingParams
from umrg.mistake import Mistake

_CPU_BLOCK = 128  # tokens of a block of a CPU's KV cache
_FORBIDDEN = -100.0  # vLLM's lowest logit bias: e^-100 is no probability in any precision


@dataclass(frozen=True, kw_only=True)
class Question:
    """What an engine is asked about an image."""

    image: NDArray[np.uint8]
    """uint8 [H, W, 3] RGB."""
    text: str
    """The query; with `raw`, the whole text of the user's message."""
    think: bool | None = None
    """Whether the prompt asks for reasoning; None for what the engine's prompter says."""
    raw: bool = False
    """Whether the text is sent without the task's instructions."""
    system: str | None = None
    """The system message, with `raw` only."""
    image_id: str | None = None
    """Names the image in vLLM's caches, instead of a hash of its pixels: one id must always be of the same pixels. None
    for the hash."""


class Announcing(AsyncLLM):
    """vLLM's front end, which says when a request has been sent to the process that samples."""

    sent: Callable[[str], None]
    """Is given the request's id."""

    async def add_request(self, request_id: str, *args: Any, **options: Any) -> RequestOutputCollector:
        queue = await super().add_request(request_id, *args, **options)
        self.sent(request_id)
        return queue


@dataclass(kw_only=True)
class _Update:
    """A weight update that has begun."""

    ending: AsyncExitStack
    """Lets requests go on."""
    replaced: bool = False
    """Whether weights may have been replaced."""


class Engine:
    """Made by `Engine.start`, in a process that was started with `RolloutConfig.process_environment`."""

    def __init__(self, llm: Announcing, prompter: Prompter, config: RolloutConfig, report: EngineReport) -> None:
        self.prompter, self.report = prompter, report
        self._llm, self._config = llm, config
        self._requests = 0
        self._gate = _Gate()
        self._update: _Update | None = None
        self._turns = asyncio.Lock()  # of beginning and abandoning an update
        self._mixed = False
        self._asleep: AsyncExitStack | None = None
        llm.sent = self._gate.sent

    @classmethod
    async def start(cls, model: Path, prompter: Prompter, config: RolloutConfig, version: int = 0) -> "Engine":
        """Load a model folder, whose weights are of this version. Raises ValueError if a CPU's cache is too small."""
        check_cache(model, config)
        orphan_guard.own()
        llm = Announcing.from_engine_args(
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
                enable_sleep_mode=config.sleeps,
                limit_mm_per_prompt={"image": 1, "video": 0},
                mm_processor_kwargs=prompter.vllm_arguments,
                # Of the sampling distribution: temperature-scaled, the forbidden tokens left out.
                logprobs_mode="processed_logprobs",
                weight_transfer_config=WeightTransferConfig(backend="medreasoner-host"),
                worker_extension_cls="actors.weight_transfer.WorkerExtension",
                disable_log_stats=True,
            )
        )
        await llm.update_weight_version(str(version))
        attention: list[list[str]] = await llm.collective_rpc("attention")
        return cls(llm, prompter, config, report(llm.vllm_config, attention[0]))

    async def generate(self, image: NDArray[np.uint8], query: str, sampling: SamplingParams) -> GroupSamples:
        """Sample n completions of a query about an image uint8 [H, W, 3], in one request; vLLM seeds completion i with
        seed + i. Raises ValueError for a prompt over `max_prompt_tokens`."""
        return await self.answer(Question(image=image, text=query), sampling)

    async def answer(self, question: Question, sampling: SamplingParams) -> GroupSamples:
        """As `generate`, of any question. Raises ValueError too if the chat template does not take it."""
        final: Any = None
        # Streamed outputs leave completions out when n > 1.
        async with aclosing(self._outputs(question, sampling, RequestOutputKind.FINAL_ONLY)) as outputs:
            async for output in outputs:
                final = output
        assert final is not None and len(final.outputs) == sampling.n, "vLLM left answers out"
        written = [
            self._completion(each, each.token_ids, each.logprobs.logprobs)
            for each in sorted(final.outputs, key=lambda output: output.index)
        ]
        return self._samples(question, final, written)

    async def stream(self, question: Question, sampling: SamplingParams) -> AsyncGenerator[str | GroupSamples, None]:
        """One completion in pieces of text, as it is written, and at last the whole as `answer` returns it. Who closes
        the iterator, or cancels the task that waits for it, ends the request. Raises ValueError as `answer` does."""
        assert sampling.n == 1, "one completion is streamed"
        writing, token_ids, logprobs = Writing(self.prompter), list[int](), list[float]()
        final: Any = None
        async with aclosing(self._outputs(question, sampling, RequestOutputKind.DELTA)) as outputs:
            async for output in outputs:
                final, (piece,) = output, output.outputs
                token_ids += piece.token_ids
                logprobs += piece.logprobs.logprobs
                if text := writing.add(piece.token_ids):
                    yield text
        assert final is not None and final.finished, "vLLM left the end out"
        if text := writing.end():
            yield text
        yield self._samples(question, final, [self._completion(final.outputs[0], token_ids, logprobs)])

    async def update_weights(
        self,
        buckets: AsyncIterable[Bucket],
        version: int,
        *,
        mode: Literal["keep", "wait"] = "keep",
        check: Callable[[UpdateReceipt], None] = lambda _: None,
    ) -> UpdateReceipt:
        """Replace the weights by those of some buckets, of which one at a time is in memory.

        mode: as of `begin_update`. check: is called before any request goes on, and raises if it does not like the
        receipt. If anything fails once weights were replaced, the engine answers no more (`check_health`)."""
        await self.begin_update(mode)
        try:
            with HostFile() as file:
                async for bucket in buckets:
                    # In a thread, because whoever is answered from this event loop would wait for the copy.
                    await asyncio.to_thread(file.write, bucket)
                    entries = [asdict(entry) for entry in bucket.entries]
                    await self.receive({"path": file.path, "entries": entries, "exact": bucket.exact})
            return await self.end_update(version, check)
        except BaseException:
            await self.abandon_update()
            raise

    async def connect(self, direct: str | None, arguments: Mapping[str, Any]) -> None:
        """Take weights through an engine of vLLM's too, or through files alone, until the next call. A collective with
        whoever sends. direct, arguments: as `actors.weight_transfer.InitInfo` has them."""
        info = {"direct": direct, "arguments": dict(arguments)}
        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))

    async def begin_update(self, mode: Literal["keep", "wait"] = "keep") -> None:
        """Begin to replace the weights, which `end_update` or `abandon_update` must follow; caches are emptied.

        mode: `keep` lets requests in flight pause between two tokens, so that two versions write their completions;
        `wait` lets them end, and later ones wait until the new weights are there."""
        async with self._turns:
            if self._update:
                raise RuntimeError("a weight update begins while another is under way")
            self._update = _Update(ending=AsyncExitStack())
            try:
                await self._update.ending.enter_async_context(self._paused(mode))
                await self._llm.start_weight_update()
            except BaseException:
                await self._resume()
                raise

    async def receive(self, info: Mapping[str, Any]) -> None:
        """Take some of the weights. info: the fields of an `actors.weight_transfer.UpdateInfo`."""
        assert self._update, "no weight update has begun"
        self._update.replaced = True
        await self._llm.update_weights(WeightTransferUpdateRequest(update_info=dict(info)))

    async def end_update(self, version: int, check: Callable[[UpdateReceipt], None] = lambda _: None) -> UpdateReceipt:
        """All weights of a version are there. check: as of `update_weights`. If it raises, the update must be
        abandoned."""
        await self._llm.finish_weight_update(weight_version=str(version))
        receipt = _receipt(await self._llm.collective_rpc("received"))
        check(receipt)
        await self._resume()
        return receipt

    async def abandon_update(self) -> None:
        """End an update that failed, if one has begun. If weights were replaced, the engine answers no more. Returns
        once its workers answer: one that waits for the others of a group does not."""
        async with self._turns:
            if not self._update:
                await self._llm.collective_rpc("received")
                return
            self._mixed = self._mixed or self._update.replaced
            try:
                if not self._update.replaced:
                    await self._llm.finish_weight_update()  # else vLLM would not begin another
            finally:
                await self._resume()

    async def _resume(self) -> None:
        update, self._update = self._update, None
        if update:
            await update.ending.aclose()

    async def set_version(self, version: int) -> None:
        """Give the weights another version, without a change of themselves."""
        await self._llm.update_weight_version(str(version))

    async def check_health(self) -> None:
        """Raises vLLM's EngineDeadError if one of its processes has died, and Broken if a weight update failed half
        way."""
        await self._llm.check_health()
        if self._mixed:
            raise Broken("a weight update failed half way, and the engine holds weights of two versions")

    @property
    def unfinished(self) -> int:
        """Completions that vLLM has not finished."""
        return int(self._llm.output_processor.get_num_unfinished_requests())

    def stop(self) -> None:
        """End the engine's processes."""
        self._llm.shutdown()

    async def _outputs(
        self, question: Question, sampling: SamplingParams, kind: RequestOutputKind
    ) -> AsyncGenerator[Any, None]:
        """vLLM's outputs of one request. Closing it takes the request out of the engine."""
        prompt = self._prompt(question)
        for retried in (False, True):
            began = missed = False
            self._requests += 1
            request = f"request-{self._requests}"
            async with self._gate.passing(request) as answered:
                await self.check_health()
                parameters = self._parameters(sampling, kind)
                async with aclosing(self._llm.generate(prompt, parameters, request_id=request)) as outputs:
                    async for output in outputs:
                        answered()
                        # A request that was cancelled before it reached the engine leaves its image noted as sent, and
                        # so the next one about it misses the image there, whereupon vLLM forgets the note.
                        if missed := any(each.finish_reason == "error" for each in output.outputs):
                            break
                        began = True
                        yield output
            if not missed:
                return
            if began or retried:
                raise RuntimeError("vLLM has given a request up")

    @cached_property
    def _prompters(self) -> dict[bool | None, Prompter]:
        """By `Question.think`; they share the processor."""
        return {think: self.prompter.thinking(think) for think in (None, False, True)}

    def _prompt(self, question: Question) -> dict[str, Any]:
        """vLLM's input."""
        prompter = self._prompters[question.think]
        raw = question.raw
        text = prompter.raw_text(question.text, question.system) if raw else prompter.chat_text(question.text)
        self._check_length(text, _size(question.image))
        prompt = {"prompt": text, "multi_modal_data": {"image": Image.fromarray(question.image)}}
        return prompt if question.image_id is None else {**prompt, "multi_modal_uuids": {"image": [question.image_id]}}

    def _parameters(self, sampling: SamplingParams, kind: RequestOutputKind) -> vllm.SamplingParams:
        return vllm.SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            logprobs=0,
            flat_logprobs=True,
            # Detokenizing token by token costs as much as sampling; `completion_text` decodes once.
            detokenize=False,
            logit_bias=dict.fromkeys(self.prompter.vision_tokens, _FORBIDDEN),
            output_kind=kind,
        )

    def _check_length(self, text: str, image: Size) -> None:
        tokens, most = self.prompter.text_tokens(text, image), self._config.max_prompt_tokens
        if tokens > most:
            raise Mistake(
                f"the prompt has {tokens} tokens, {self.prompter.image_tokens(image)} of them for the image, and "
                f"rollout.max_prompt_tokens allows {most}; raise it, shorten the question or make the image smaller"
            )

    @asynccontextmanager
    async def _paused(self, mode: Literal["keep", "wait"]) -> AsyncIterator[None]:
        """Within it nothing is sampled. Requests come in again once vLLM's caches are empty or, with `wait`, at the
        end."""
        async with AsyncExitStack() as gate:
            await gate.enter_async_context(self._gate.shut(mode))
            try:
                await self._llm.pause_generation(mode=mode, clear_cache=True)
                if mode == "keep":
                    await gate.aclose()
                yield
            finally:
                await self._llm.resume_generation()

    def _samples(self, question: Question, final: Any, completions: Sequence[Completion]) -> GroupSamples:
        return GroupSamples(
            prompt_ids=tuple(final.prompt_token_ids),
            frames=self.prompter.frames(_size(question.image)),
            completions=tuple(completions),
            cached=int(final.num_cached_tokens or 0),
        )

    def _completion(self, output: Any, token_ids: Sequence[int], logprobs: Sequence[float]) -> Completion:
        stretches = tuple((int(span.version), span.end - span.start) for span in output.weight_versions or ())
        return Completion(
            text=self.prompter.completion_text(token_ids),
            token_ids=tuple(token_ids),
            logprobs=tuple(logprobs),
            # A completion that an update interrupted counts as the oldest weights that sampled a part of it.
            policy_version=min(version for version, _ in stretches),
            versions=stretches if len(stretches) > 1 else (),
            finished=output.finish_reason == "stop",
        )

    async def sleep(self) -> None:
        """Give the memory of weights and KV cache away, once the requests in flight have ended; later ones wait until
        the engine has woken. May be called again, also after `wake_weights`.

        At vLLM's level 2, at which weights are dropped: at level 1 it would copy them to page-locked memory, locked
        anew each time, and back, only for most of them to be replaced. So all must be sent before `wake`."""
        if self._asleep is None:
            async with AsyncExitStack() as stack:
                await stack.enter_async_context(self._gate.shut("wait"))
                self._asleep = stack.pop_all()
        await self._llm.sleep(level=2, mode="wait")

    async def wake_weights(self) -> None:
        """Take the memory of the weights back; what they are is undefined until all have been sent."""
        assert self._asleep is not None, "the engine is awake"
        await self._llm.wake_up(tags=["weights"])

    async def wake(self) -> None:
        """Take the memory of the KV cache back, which is empty, and let requests in."""
        assert self._asleep is not None, "the engine is awake"
        if not await self._llm.wake_up(tags=["kv_cache"]):
            raise Broken("a part of the engine did not wake")
        asleep, self._asleep = self._asleep, None
        await asleep.aclose()


class _Gate:
    """Requests pass it on their way into the process that samples, and wait before it while it is shut.

    vLLM notes on our side which images that process has. An update empties first the notes and then the images, so that
    whoever was noted between the two would be missed by the next request about the same image. Once a request has been
    sent it does no harm: it arrives before the call that empties the images. Once it has begun to be answered, vLLM
    lets it end before an update that waits; it may leave one that was only sent for later."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._unsent, self._unanswered = _Requests(), _Requests()
        self._shut = 0  # by how many: weights are taken over while an engine sleeps too

    @asynccontextmanager
    async def passing(self, request: str) -> AsyncIterator[Callable[[], None]]:
        """Until `sent` is called a request is on its way, and until the function that is yielded is, at the latest
        until the end, it is not answered."""
        while not self._open.is_set():  # it may have been shut again before this task goes on
            await self._open.wait()
        self._unsent.add(request)
        self._unanswered.add(request)
        try:
            yield lambda: self._unanswered.remove(request)
        finally:
            self.sent(request)
            self._unanswered.remove(request)

    def sent(self, request: str) -> None:
        """A request has been sent."""
        self._unsent.remove(request)

    @asynccontextmanager
    async def shut(self, mode: Literal["keep", "wait"]) -> AsyncIterator[None]:
        """Shut, and nobody on the way or, with `wait`, not answered."""
        self._shut += 1
        self._open.clear()
        try:
            await (self._unsent if mode == "keep" else self._unanswered).none.wait()
            yield
        finally:
            self._shut -= 1
            if not self._shut:
                self._open.set()


class _Requests:
    """A set of requests, of which one can wait that it is empty."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self.none = asyncio.Event()
        self.none.set()

    def add(self, name: str) -> None:
        self._names.add(name)
        self.none.clear()

    def remove(self, name: str) -> None:
        self._names.discard(name)
        if not self._names:
            self.none.set()


def _size(image: NDArray[np.uint8]) -> Size:
    return Size(image.shape[1], image.shape[0])


def _receipt(found: Sequence[tuple[str, int, list[str]]]) -> UpdateReceipt:
    """What the workers of an engine say of an update, together."""
    assert len({checksum for checksum, _, _ in found}) == 1, "the workers of one engine received different weights"
    unlike = [name for _, _, names in found for name in names]
    return UpdateReceipt(
        checksum=found[0][0], compared=min(count for _, count, _ in found), unlike=tuple(dict.fromkeys(unlike))
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
