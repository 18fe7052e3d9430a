"""OpenAI's chat completions, as far as a question about one image needs them."""

import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.config import ServeConfig
from serving.forms import from_base64
from serving.messages import Ask
from umrg.group import Completion, GroupSamples, SamplingParams
from umrg.mistake import Mistake


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Part):
    type: Literal["text"]
    text: str


class ImageUrl(_Part):
    url: str = Field(description="A data URL; no other is ever fetched.", examples=["data:image/png;base64,iVBORw0…"])
    detail: str | None = None


class ImagePart(_Part):
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(BaseModel):
    role: Literal["system", "user"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: str | None = None


class ChatRequest(BaseModel):
    """A request of OpenAI's. What would change the distribution that is sampled from is refused, not ignored."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    model: str
    messages: list[Message] = Field(min_length=1, max_length=2)
    n: int = Field(default=1, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    top_p: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    user: str | None = None
    """Not used."""
    metadata: dict[str, str] | None = None
    """Not used."""
    store: Literal[False] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    async def parsed(self, config: ServeConfig) -> tuple[bytes, Ask]:
        """The image file, and what is asked. Raises ValueError for what is not one question about one image."""
        if self.model != config.served_name:
            raise Mistake(f"there is no model of that name here; it is {config.served_name!r}")
        *before, question = self.messages
        if question.role != "user" or any(message.role != "system" for message in before):
            raise Mistake("a chat is one message of the user's, with a system message before it at most")
        texts, images = _parts(question)
        if len(images) != 1:
            raise Mistake(f"the message has {len(images)} images; send one, as a data URL")
        limits, most, system = config.limits, config.rollout.max_tokens, _system(before)
        # Before anything looks through the text: to find special tokens within special tokens takes long.
        if (length := sum(map(len, texts)) + len(system or "")) > limits.chat_characters:
            raise Mistake(f"the text has {length} characters, and {limits.chat_characters} are allowed; shorten it")
        asked = self.max_completion_tokens or self.max_tokens or most
        if self.n > limits.samples:
            raise Mistake(f"n is {self.n}, and {limits.samples} are allowed; lower it")
        if asked > most:
            raise Mistake(f"{asked} tokens were asked for, and {most} are allowed; lower max_tokens")
        return await _data(images[0]), Ask(
            text="\n".join(texts),
            raw=True,
            system=system,
            sampling=SamplingParams(n=self.n, temperature=self.temperature, max_tokens=asked, seed=self.seed),
        )

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool((self.stream_options or {}).get("include_usage"))


class Written(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


Reason = Literal["stop", "length"]


class Choice(BaseModel):
    index: int
    message: Written
    logprobs: None = None
    finish_reason: Reason


class PromptTokens(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class ChatResponse(BaseModel):
    """OpenAI's reply that is not streamed."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "medreasoner"


class ModelList(BaseModel):
    """OpenAI's list of models."""

    object: Literal["list"] = "list"
    data: list[Model]


def _parts(message: Message) -> tuple[list[str], list[str]]:
    """The texts and the images' URLs of a message."""
    if isinstance(message.content, str):
        return [message.content], []
    texts = [part.text for part in message.content if isinstance(part, TextPart)]
    return texts, [part.image_url.url for part in message.content if isinstance(part, ImagePart)]


def _system(messages: list[Message]) -> str | None:
    if not messages:
        return None
    texts, images = _parts(messages[0])
    if images:
        raise Mistake("the system message has an image; put it into the user's")
    return "\n".join(texts)


async def _data(url: str) -> bytes:
    head, comma, text = url.partition(",")
    if not (comma and head.lower().startswith("data:image/") and head.lower().endswith(";base64")):
        raise Mistake("the image's URL is no data URL (data:image/png;base64,…); no other is fetched")
    return await from_base64(text)


def completion(request_id: str, model: str, samples: GroupSamples) -> ChatResponse:
    """The reply that is not streamed."""
    choices = [
        Choice(index=i, message=Written(content=each.text), finish_reason=_reason(each))
        for i, each in enumerate(samples.completions)
    ]
    return ChatResponse(**_head("chat.completion", request_id, model), choices=choices, usage=_usage(samples))


async def chunks(
    request_id: str, model: str, pieces: AsyncIterator[str | GroupSamples], *, with_usage: bool
) -> AsyncIterator[str]:
    """The reply as server-sent events. Of several completions each is one piece."""
    head = _head("chat.completion.chunk", request_id, model)
    written = False
    async for piece in pieces:
        if isinstance(piece, str):
            written = True
            yield _event({**head, "choices": [_choice(0, {"role": "assistant", "content": piece}, None)]})
            continue
        for i, each in enumerate(piece.completions):
            if not written:
                yield _event({**head, "choices": [_choice(i, {"role": "assistant", "content": each.text}, None)]})
            yield _event({**head, "choices": [_choice(i, {}, _reason(each))]})
        if with_usage:
            yield _event({**head, "choices": [], "usage": _usage(piece).model_dump()})
    yield "data: [DONE]\n\n"


def models(name: str) -> ModelList:
    """The list of models, which is one."""
    return ModelList(data=[Model(id=name)])


def _head(kind: str, request_id: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{request_id}", "object": kind, "created": int(time.time()), "model": model}


def _choice(index: int, delta: dict[str, str], reason: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _reason(completion: Completion) -> Reason:
    return "stop" if completion.finished else "length"


def _usage(samples: GroupSamples) -> Usage:
    prompt, written = len(samples.prompt_ids), sum(len(each.token_ids) for each in samples.completions)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=written,
        total_tokens=prompt + written,
        prompt_tokens_details=PromptTokens(cached_tokens=samples.cached),
    )


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
