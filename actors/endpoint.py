"""A reasoner behind an OpenAI-compatible endpoint, in place of a rollout actor: it can be evaluated, not trained."""

import asyncio
import base64
import time
from typing import Any

import openai

from actors.config import EndpointConfig
from actors.gpus import ALONE, Lodging, Place, this_place
from umrg.frames import Frames, ResizeRule
from umrg.group import Completion, Group, GroupSamples, SamplingParams
from umrg.images import encode_png
from umrg.mistake import Mistake
from umrg.prompts import PromptSpec, prompt_text

_THOUGHTS = ("reasoning", "reasoning_content")
"""Where servers with a reasoning parser return the reasoning: vLLM's field, and that of older vLLM and others."""


class EndpointFailed(RuntimeError):
    """The endpoint gave no answer after all retries."""


class Endpoint:
    """Samples from the endpoint with a rollout actor's interface; its completions have no token ids and log-probs.
    key: of the endpoint; None if it asks for none."""

    def __init__(self, config: EndpointConfig, spec: PromptSpec, *, key: str | None) -> None:
        self._config, self._spec = config, spec
        self._resize = ResizeRule(min_pixels=config.min_pixels, max_pixels=config.max_pixels)
        self._client = openai.AsyncOpenAI(
            base_url=config.url, api_key=key or "none", timeout=config.timeout, max_retries=config.retries
        )
        self._concurrency = asyncio.Semaphore(config.concurrency)

    async def place(self) -> Place:
        """Where it is; may be called before `start`."""
        return this_place()

    async def start(self, lodging: Lodging = ALONE) -> None:
        """Check that the endpoint answers and serves the model. lodging: as of other actors; nothing is computed or
        opened here. Raises ValueError if it does not."""
        try:
            names = [model.id async for model in self._client.models.list()]
        except openai.OpenAIError as error:
            raise Mistake(f"the endpoint {self._config.url} does not answer: {error}; check endpoint.url") from error
        if self._config.model not in names:
            raise Mistake(
                f"the endpoint {self._config.url} has no model {self._config.model!r}; it has {', '.join(names)}"
            )

    async def sample(self, group: Group, sampling: SamplingParams) -> GroupSamples:
        """Sample the completions of a group's prompt. Raises EndpointFailed."""
        asked = group.seeded(sampling)
        async with self._concurrency:
            try:
                reply = await self._client.chat.completions.create(
                    model=self._config.model,
                    messages=self._messages(group),
                    n=asked.n,
                    temperature=asked.temperature,
                    max_tokens=asked.max_tokens,
                    seed=asked.seed,
                    # A server may take other defaults from the model folder's generation_config.json.
                    top_p=1.0,
                    presence_penalty=0.0,
                    frequency_penalty=0.0,
                    extra_body=self._config.body,
                )
            except openai.OpenAIError as error:
                raise EndpointFailed(f"{self._config.url} on {group.sample.name}: {error}") from error
        if len(reply.choices) != asked.n:
            raise EndpointFailed(f"{self._config.url} gave {len(reply.choices)} answers of {asked.n} asked for")
        size = group.sample.size
        return GroupSamples(
            prompt_ids=(),
            frames=Frames(original=size, model=self._resize.model_size(size)),
            completions=tuple(
                Completion(
                    text=whole_text(choice.message),
                    token_ids=(),
                    logprobs=(),
                    policy_version=0,
                    finished=choice.finish_reason == "stop",
                )
                for choice in sorted(reply.choices, key=lambda choice: choice.index)
            ),
        )

    async def sampled(self, group: Group, sampling: SamplingParams) -> tuple[float, GroupSamples]:
        """`sample`, and before it what the driver is told: the seconds that it took."""
        began = time.monotonic()
        samples = await self.sample(group, sampling)
        return time.monotonic() - began, samples

    async def stop(self) -> None:
        await self._client.close()

    def _messages(self, group: Group) -> Any:
        sample = group.sample
        # Sent as decoded here, so that the server's decoder cannot see another picture than the one that is scored.
        image = f"data:image/png;base64,{base64.b64encode(encode_png(sample.image())).decode('ascii')}"
        content = [
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": prompt_text(sample.query, self._spec)},
        ]
        return [{"role": "user", "content": content}]


def whole_text(message: Any) -> str:
    """The completion as the model wrote it. Restored are the reasoning, which a reasoning parser returns in a field of
    its own, and the opening `<think>` of a reply that has only the closing tag, because the chat template wrote it.
    Reasoning without an answer after it was cut off, and stays open."""
    content = message.content or ""
    thoughts = next((text for name in _THOUGHTS if isinstance(text := getattr(message, name, None), str) and text), "")
    if thoughts and not content.lstrip().startswith("<think>"):
        return f"<think>{thoughts}</think>{content}" if content else f"<think>{thoughts}"
    before, closing, _ = content.partition("</think>")
    return f"<think>{content}" if closing and "<think>" not in before else content
