"""The fake that other tests stand on keeps the contract of `serving.messages.Models`."""

import asyncio

import numpy as np
import pytest

from serving.messages import Ask, Models, Overloaded, Picture, Prompt, UnknownImage
from tests.serving.fake_models import FakeModels, box_of, mask_of, points_of
from umrg.answers import parse_answer
from umrg.frames import Frame
from umrg.group import GroupSamples, SamplingParams
from umrg.masks import decode_rle

PICTURE = Picture(id="a" * 32, pixels=np.zeros((40, 60, 3), dtype=np.uint8))
GREEDY = Ask(text="Which organ?", sampling=SamplingParams(n=1, temperature=0.0, max_tokens=64))
SAMPLED = Ask(text="Which organ?", sampling=SamplingParams(n=4, temperature=1.0, max_tokens=64, seed=1))


def answers(samples: GroupSamples):
    return [parse_answer(each.text).to_original(samples.frames, Frame.MODEL) for each in samples.completions]


def test_an_answer_is_that_of_the_images_size():
    async def ground(models: Models):
        (answer,) = answers(await models.sample(PICTURE, GREEDY))
        return answer, await models.draw(PICTURE, [answer])

    answer, drawn = asyncio.run(ground(FakeModels()))
    assert answer.box == box_of(60, 40) and answer.points == points_of(60, 40) and answer.think
    assert drawn is not None and drawn.confidence is None
    assert np.array_equal(decode_rle(drawn.mask), mask_of(box_of(60, 40), 60, 40))


def test_samples_differ_and_are_those_of_the_seed():
    async def ground(models: Models):
        first, again = [answers(await models.sample(PICTURE, SAMPLED)) for _ in range(2)]
        return first, again, await models.draw(PICTURE, first)

    first, again, drawn = asyncio.run(ground(FakeModels()))
    assert first == again and len({answer.box for answer in first}) == 3
    assert drawn is not None and drawn.confidence is not None and 0 < drawn.confidence < 1


def test_a_stream_ends_with_the_whole():
    async def pieces(models: Models):
        return [piece async for piece in models.stream(PICTURE, GREEDY)]

    *texts, samples = asyncio.run(pieces(FakeModels()))
    assert isinstance(samples, GroupSamples) and "".join(map(str, texts)) == samples.completions[0].text


def test_a_prompt_is_drawn_on_an_image_that_is_kept():
    async def segment(models: Models):
        with pytest.raises(UnknownImage):
            await models.segment(PICTURE.id, None, Prompt(box=(1, 2, 3, 4)))
        await models.embed(PICTURE)
        return await models.segment(PICTURE.id, None, Prompt(box=(1, 2, 3, 4), points=((3.0, 4.0),), labels=(0,)))

    mask = decode_rle(asyncio.run(segment(FakeModels())).mask)
    assert mask.shape == (40, 60) and mask[:, 0].sum() == 0 and mask.sum() == 0


def test_a_failure_is_that_of_its_method():
    models = FakeModels(failures={"draw": Overloaded("full"), "stream": Overloaded("full")})

    async def ask():
        await models.sample(PICTURE, GREEDY)
        with pytest.raises(Overloaded):
            await models.draw(PICTURE, [])
        written = []
        with pytest.raises(Overloaded):
            async for piece in models.stream(PICTURE, GREEDY):
                written.append(piece)
        return written

    assert len(asyncio.run(ask())) == 2


def test_a_caller_that_goes_away_is_seen():
    async def leave(models: FakeModels):
        task = asyncio.create_task(models.sample(PICTURE, GREEDY))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=10)
        return models.cancelled

    assert asyncio.run(leave(FakeModels(gate=asyncio.Event()))) == ["sample"]
