"""OpenAI's own client against the chat route."""

import asyncio
import base64

import numpy as np
import openai
import pytest

from serving.messages import Unavailable
from tests.serving.fake_models import FakeModels
from tests.serving.in_process import application, calling
from umrg.answers import parse_answer
from umrg.images import encode_png

URL = f"data:image/png;base64,{base64.b64encode(encode_png(np.zeros((64, 96, 3), dtype=np.uint8))).decode()}"
NESTED = "<|" * 300_000 + "|>" * 300_000
"""Special tokens within special tokens, which would be removed one layer after another for hours."""
QUESTION = [
    {"type": "image_url", "image_url": {"url": URL}},
    {"type": "text", "text": "Where is bile stored?"},
]


def chat(models=None, *, content=QUESTION, before=(), **parameters):
    """What OpenAI's client gives: a completion, or the chunks of a stream."""

    async def call():
        async with calling(application(models)) as http:
            client = openai.AsyncOpenAI(
                base_url="http://127.0.0.1:8000/v1", api_key="none", http_client=http, max_retries=0
            )
            asked = {"model": "tiny", "temperature": 0, **parameters}
            messages = [*before, {"role": "user", "content": content}]
            reply = await client.chat.completions.create(messages=messages, **asked)
            return [chunk async for chunk in reply] if parameters.get("stream") else reply

    return asyncio.run(call())


def test_a_question_is_answered_with_the_completion():
    models = FakeModels()
    reply = chat(models)
    assert parse_answer(reply.choices[0].message.content).promptable and reply.choices[0].finish_reason == "stop"
    assert reply.usage.prompt_tokens > 0 and reply.usage.completion_tokens > 0 and reply.model == "tiny"
    (asked,) = models.asks
    assert asked.raw and asked.text == "Where is bile stored?" and asked.sampling.temperature == 0


def test_sampling_is_as_asked_for_and_a_system_message_is_passed_on():
    models = FakeModels()
    reply = chat(
        models, before=[{"role": "system", "content": "Be brief."}], n=3, temperature=0.5, seed=9, max_tokens=20
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    (asked,) = models.asks
    sampling = asked.sampling
    assert (sampling.n, sampling.temperature, sampling.seed, sampling.max_tokens) == (3, 0.5, 9, 20)
    assert asked.system == "Be brief."


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_has_the_same_text(n):
    whole = chat(n=n)
    chunks = chat(n=n, stream=True, stream_options={"include_usage": True})
    for i, choice in enumerate(whole.choices):
        parts = [part for chunk in chunks for part in chunk.choices if part.index == i]
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert parts[-1].finish_reason == "stop"
    assert chunks[-1].usage == whole.usage


def test_an_error_in_the_middle_of_a_stream_is_one_to_openais_client():
    with pytest.raises(openai.APIError, match="a part of the service is being replaced"):
        chat(FakeModels(failures={"stream": Unavailable()}), stream=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "another"}, "there is no model of that name here; it is 'tiny'"),
        ({"content": "no image"}, "0 images"),
        ({"content": [*QUESTION, QUESTION[0]]}, "2 images"),
        ({"content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}]}, "no other is fetched"),
        ({"content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}, "no other is fetched"),
        ({"n": 99}, "16 are allowed"),
        ({"content": [QUESTION[0], {"type": "text", "text": NESTED}]}, "16000 are allowed"),
        ({"before": [{"role": "system", "content": NESTED}]}, "16000 are allowed"),
        ({"max_tokens": 100_000}, "512 are allowed"),
        ({"before": [{"role": "user", "content": "first"}]}, "one message of the user's"),
    ],
)
def test_what_is_not_answered_here_is_named(change, message):
    with pytest.raises(openai.BadRequestError, match=message):
        chat(**change)


@pytest.mark.parametrize("change", [{"top_p": 0.9}, {"logprobs": True}, {"tools": []}, {"presence_penalty": 1.0}])
def test_what_would_change_the_distribution_is_refused(change):
    with pytest.raises(openai.UnprocessableEntityError, match=next(iter(change))):
        chat(**change)


def test_the_model_is_listed():
    async def call():
        async with calling(application()) as http:
            client = openai.AsyncOpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none", http_client=http)
            return [model.id async for model in client.models.list()]

    assert asyncio.run(call()) == ["tiny"]
