"""The segmenter's replica, without Ray: what it draws, what it keeps, and how it says that it is ill."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from actors.config import EmbeddingsConfig, SegmenterConfig
from actors.experts.drawing import draw_masks
from actors.experts.protocol import Decoded, Embedding, Expert, NotFinite, Preprocess, Prompts
from actors.experts.registry import load_expert
from actors.experts.sam import SamExpert, build_sam
from actors.experts.sam_config import SamConfig
from serving.config import ServeConfig
from serving.consensus import vote
from serving.messages import Drawn, Prompt, UnknownImage
from serving.segmenter import Segmenter
from tests.conftest import TINY_REASONER
from umrg.answers import Answer, Form, parse_answer
from umrg.frames import Box
from umrg.masks import decode_rle

T = TypeVar("T")

CONFIG = ServeConfig(
    model=TINY_REASONER, segmenter=SegmenterConfig(threads=1, embeddings=EmbeddingsConfig(memory_mib=1))
)
"""With room for eight of the tiny expert's embeddings, of 128 KiB each."""
SMALL = SamConfig(
    image_side=64, patch=8, window=4, encoder_dim=16, encoder_depth=2, encoder_heads=2, global_layers=(1,),
    prompt_dim=16, decoder_heads=2, decoder_mlp_dim=16,
)  # fmt: skip
BOX = (30.0, 20.0, 90.0, 80.0)
NO_ANSWER = parse_answer("I cannot say.")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As many as the segmenter sets, for what it is compared with too: sums of other shares are rounded otherwise."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def picture(seed: int = 0) -> NDArray[np.uint8]:
    """A bright disc on noise, uint8 [100, 140, 3]."""
    image = np.random.default_rng(seed).integers(0, 60, (100, 140, 3), dtype=np.uint8)
    y, x = np.mgrid[:100, :140]
    image[(x - 60) ** 2 + (y - 50) ** 2 < 25**2] += 150
    return image


def answer(box: Box = BOX) -> Answer:
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return Answer(think=None, form=Form.CORRECT, box=box, points=((x - 5, y), (x + 5, y)), strict=True)


class Watched:
    """An expert that counts what it is asked, and works only when it is given turns."""

    def __init__(self, expert: Expert, *, images_at_once: int = 1) -> None:
        self._expert = expert
        self._images_at_once = images_at_once
        self.embedded: list[int] = []
        """Images of each call."""
        self.turns: threading.Semaphore | None = None
        """A call takes one; None for as many as there are calls."""
        self.asked = 0
        """Calls that have begun, those included that wait for their turn."""
        self.broken = False

    @property
    def name(self) -> str:
        return self._expert.name

    @property
    def preprocess(self) -> Preprocess:
        return self._expert.preprocess

    @property
    def takes_points(self) -> bool:
        return self._expert.takes_points

    @property
    def takes_masks(self) -> bool:
        return self._expert.takes_masks

    @property
    def images_at_once(self) -> int:
        return self._images_at_once

    def embed(self, image: NDArray[np.uint8]) -> Embedding:
        return self.embed_all([image])[0]

    def embed_all(self, images: Sequence[NDArray[np.uint8]]) -> list[Embedding]:
        self._take_turn()
        self.embedded.append(len(images))
        if self.broken:
            raise RuntimeError("out of memory")
        return self._expert.embed_all(images)

    def decode(self, embedding: Embedding, **prompts: Any) -> Decoded:
        return self.decode_all([Prompts(embedding=embedding, **prompts)])[0]

    def decode_all(self, requests: Sequence[Prompts]) -> list[Decoded]:
        self._take_turn()
        return self._expert.decode_all(requests)

    def digest(self) -> str:
        return self._expert.digest()

    def fingerprint(self) -> str:
        return self._expert.fingerprint()

    def _take_turn(self) -> None:
        self.asked += 1
        if self.turns is not None:
            assert self.turns.acquire(timeout=60)


def small_expert(**settings: Any) -> SamExpert:
    torch.manual_seed(0)
    return SamExpert(build_sam(SMALL), SMALL, name="small", **settings)


@contextmanager
def opened(*, expert: Expert | None = None, patience: float = 20.0) -> Iterator[Segmenter]:
    """A segmenter with that expert, or the tiny one."""
    loaded = {} if expert is None else {"load": lambda _: expert}
    segmenter = Segmenter(CONFIG, **loaded, patience=patience)
    try:
        yield segmenter
    finally:
        segmenter.close()


def run(work: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(work, 120)

    return asyncio.run(bounded())


def mask_of(drawn: Drawn | None) -> NDArray[np.bool_]:
    assert drawn is not None
    mask = decode_rle(drawn.mask)
    assert mask.shape == (drawn.height, drawn.width)
    return mask


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.01)


def test_the_mask_of_an_answer_is_that_of_training() -> None:
    expert = load_expert("tiny")
    ((mask, score),) = draw_masks(expert, expert.embed(picture()), [answer()]).values()
    with opened() as segmenter:
        drawn = run(segmenter.draw("a", picture(), [answer()]))
    assert drawn is not None
    assert 0 < mask.mean() < 1 and np.array_equal(mask_of(drawn), mask)
    assert (drawn.score, drawn.chosen, drawn.confidence) == (score, 0, None)


def test_the_mask_of_several_answers_is_their_consensus() -> None:
    answers = [answer((20.0, 20.0, 60.0, 60.0)), NO_ANSWER, answer(), answer((32.0, 22.0, 88.0, 78.0))]
    expert = load_expert("tiny")
    masks = draw_masks(expert, expert.embed(picture()), answers)
    expected = vote([masks[i][0] if i in masks else None for i in range(4)])
    with opened() as segmenter:
        drawn = run(segmenter.draw("a", picture(), answers))
    assert drawn is not None and expected is not None
    assert np.array_equal(mask_of(drawn), expected.mask)
    assert (drawn.chosen, drawn.confidence) == (expected.chosen, expected.confidence)
    assert drawn.score == masks[expected.chosen][1]


def test_without_a_usable_answer_nothing_is_drawn_and_nothing_embedded() -> None:
    with opened() as segmenter:
        assert run(segmenter.draw("a", picture(), [NO_ANSWER, NO_ANSWER])) is None
        assert segmenter.stats().embedded == 0


def test_a_callers_box_and_points_are_drawn_as_the_expert_decodes_them() -> None:
    expert = load_expert("tiny")
    embedding = expert.embed(picture())
    points, labels = ((60.0, 50.0), (100.0, 90.0)), (1, 0)

    async def both(segmenter: Segmenter) -> tuple[Drawn, Drawn]:
        boxed = await segmenter.segment("a", picture(), Prompt(box=BOX))
        return boxed, await segmenter.segment("a", None, Prompt(box=None, points=points, labels=labels))

    with opened() as segmenter:
        boxed, pointed = run(both(segmenter))
        stats = segmenter.stats()
    assert np.array_equal(mask_of(boxed), expert.decode(embedding, boxes=np.array([BOX])).masks[0])
    expected = expert.decode(embedding, points=np.array([points]), labels=np.array([labels]))
    assert np.array_equal(mask_of(pointed), expected.masks[0])
    assert pointed.score == expected.scores[0]
    assert (stats.embedded, stats.decoded, stats.hits, stats.misses) == (1, 2, 1, 1)


def test_requests_for_one_image_embed_it_once() -> None:
    expert = Watched(load_expert("tiny"))

    async def together(segmenter: Segmenter) -> None:
        kept_by_id = asyncio.create_task(segmenter.segment("a", None, Prompt(box=BOX)))
        first = asyncio.create_task(segmenter.embed("a", picture()))
        await asyncio.sleep(0)
        prompted = (segmenter.segment("a", None, Prompt(box=BOX)) for _ in range(3))
        await asyncio.gather(first, segmenter.embed("a", picture()), *prompted)
        with pytest.raises(UnknownImage):  # it was asked for before the image was there
            await kept_by_id

    with opened(expert=expert) as segmenter:
        before = len(expert.embedded)
        run(together(segmenter))
        assert expert.embedded[before:] == [1]
        assert segmenter.stats().decoded == 3


def test_images_that_arrive_while_the_expert_is_busy_are_embedded_together() -> None:
    expert = Watched(load_expert("tiny"), images_at_once=4)

    async def busy(segmenter: Segmenter) -> None:
        expert.turns = threading.Semaphore(0)
        asked = expert.asked
        first = asyncio.create_task(segmenter.embed("first", picture(99)))
        await until(lambda: expert.asked > asked)
        others = [asyncio.create_task(segmenter.embed(str(i), picture(i))) for i in range(6)]
        await asyncio.sleep(0)
        expert.turns.release(3)
        await asyncio.gather(first, *others)
        expert.turns = None

    with opened(expert=expert) as segmenter:
        assert expert.embedded == [1, 2, 4]  # every shape, once at the start
        run(busy(segmenter))
        assert expert.embedded[3:] == [1, 4, 2]
        mask = mask_of(run(segmenter.segment("5", None, Prompt(box=BOX))))
    alone = load_expert("tiny")
    assert np.array_equal(mask, alone.decode(alone.embed(picture(5)), boxes=np.array([BOX])).masks[0])


def test_a_client_that_goes_away_leaves_the_others_their_embedding() -> None:
    expert = Watched(load_expert("tiny"))

    async def one_leaves(segmenter: Segmenter) -> None:
        expert.turns = threading.Semaphore(0)
        asked = expert.asked
        leaving = asyncio.create_task(segmenter.embed("a", picture()))
        staying = asyncio.create_task(segmenter.embed("a", picture()))
        await until(lambda: expert.asked > asked)
        leaving.cancel()
        expert.turns.release()
        await staying
        assert leaving.cancelled()
        expert.turns = None

    with opened(expert=expert) as segmenter:
        run(one_leaves(segmenter))
        assert segmenter.stats().kept == 1


def test_what_the_expert_raises_reaches_all_who_wait_and_the_next_request_is_served() -> None:
    expert = Watched(load_expert("tiny"))

    async def broken(segmenter: Segmenter) -> list[BaseException | None]:
        expert.broken = True
        outcomes = await asyncio.gather(*(segmenter.embed("a", picture()) for _ in range(2)), return_exceptions=True)
        expert.broken = False
        await segmenter.embed("a", picture())
        return outcomes

    with opened(expert=expert) as segmenter:
        assert [str(outcome) for outcome in run(broken(segmenter))] == ["out of memory"] * 2
        assert segmenter.stats().kept == 1


def test_prompts_that_wait_together_are_drawn_as_each_alone() -> None:
    expert = Watched(load_expert("tiny"))
    boxes = [(30.0 - i, 20.0, 90.0, 80.0 + i) for i in range(3)]

    async def busy(segmenter: Segmenter) -> list[Drawn]:
        for seed in range(2):
            await segmenter.embed(str(seed), picture(seed))
        expert.turns = threading.Semaphore(0)
        asked = expert.asked
        first = asyncio.create_task(segmenter.embed("busy", picture(99)))
        await until(lambda: expert.asked > asked)
        work = [
            asyncio.create_task(segmenter.segment(str(i % 2), None, Prompt(box=box))) for i, box in enumerate(boxes)
        ]
        for _ in range(10):
            await asyncio.sleep(0)
        expert.turns.release(100)
        await first
        drawn = list(await asyncio.gather(*work))
        expert.turns = None
        return drawn

    with opened(expert=expert) as segmenter:
        together = run(busy(segmenter))
        alone = [run(segmenter.segment(str(i % 2), None, Prompt(box=box))) for i, box in enumerate(boxes)]
    assert together == alone


def test_an_embedding_for_which_there_is_no_room_is_asked_for_again() -> None:
    async def nine(segmenter: Segmenter) -> None:
        for i in range(9):
            await segmenter.embed(str(i), picture(i))
        with pytest.raises(UnknownImage, match="send the image itself"):
            await segmenter.segment("0", None, Prompt(box=BOX))
        await segmenter.segment("1", None, Prompt(box=BOX))
        await segmenter.segment("0", picture(0), Prompt(box=BOX))

    with opened() as segmenter:
        run(nine(segmenter))
        stats = segmenter.stats()
    assert (stats.embedded, stats.kept, stats.kept_bytes) == (10, 8, 1 << 20)


NAN = float("nan")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt(box=None), "give a box, points, or both"),
        (Prompt(box=(50.0, 10.0, 40.0, 20.0)), "x1 <= x2"),
        (Prompt(box=(0.0, 0.0, NAN, 20.0)), "finite"),
        (Prompt(box=None, points=((float("inf"), 2.0),)), "finite"),
        (Prompt(box=(0.0, 0.0, 140.5, 20.0)), "x from 0 to 140, y from 0 to 100; 140.5, 20 does not"),
        (Prompt(box=None, points=((-1.0, 2.0),)), "must lie within the image"),
        (Prompt(box=BOX, points=((1.0, 2.0), (3.0, 4.0)), labels=(1,)), "2 points and 1 labels"),
        (Prompt(box=BOX, labels=(1,)), "0 points and 1 labels"),
        (Prompt(box=None, points=((1.0, 2.0),), labels=(2,)), "label is 1 inside"),
    ],
)
@pytest.mark.parametrize("kept", [False, True])
def test_a_prompt_that_cannot_be_drawn_says_what_to_change(prompt: Prompt, message: str, kept: bool) -> None:
    async def ask(segmenter: Segmenter) -> None:
        if kept:
            await segmenter.embed("a", picture())
        await segmenter.segment("a", None if kept else picture(), prompt)

    with opened(expert=small_expert()) as segmenter, pytest.raises(ValueError, match=message):
        run(ask(segmenter))


def test_an_expert_of_boxes_is_given_boxes_alone() -> None:
    with opened(expert=small_expert(preprocess="native")) as segmenter:
        assert mask_of(run(segmenter.segment("a", picture(), Prompt(box=BOX)))).shape == (100, 140)
        assert mask_of(run(segmenter.draw("a", picture(), [answer()]))).shape == (100, 140)
        with pytest.raises(ValueError, match="takes no points; give a box alone"):
            run(segmenter.segment("a", picture(), Prompt(box=BOX, points=((60.0, 50.0),))))


def test_the_health_check_asks_the_expert_itself() -> None:
    torch.manual_seed(0)
    sam = build_sam(SMALL)
    with opened(expert=SamExpert(sam, SMALL, name="small")) as segmenter:
        run(segmenter.check_health())
        sam.mask_decoder.mask_tokens.weight.add_(1.0)
        with pytest.raises(RuntimeError, match="no longer draws the mask"):
            run(segmenter.check_health())
        sam.mask_decoder.mask_tokens.weight.fill_(torch.nan)
        with pytest.raises(NotFinite):
            run(segmenter.check_health())
        run(segmenter.embed("a", picture()))
        with pytest.raises(RuntimeError, match="not finite"):  # no mistake of the caller's
            run(segmenter.segment("a", None, Prompt(box=(1.0, 1.0, 20.0, 20.0))))


def test_an_expert_that_computes_no_numbers_does_not_start() -> None:
    sam = build_sam(SMALL)
    broken = SamExpert(sam, SMALL, name="small")
    sam.mask_decoder.mask_tokens.weight.fill_(torch.nan)
    with pytest.raises(NotFinite), opened(expert=broken):
        pass


def test_an_expert_that_hangs_is_ill_and_one_that_is_busy_is_well() -> None:
    expert = Watched(small_expert())

    async def hanging(segmenter: Segmenter) -> None:
        await segmenter.embed("a", picture())
        expert.turns = threading.Semaphore(0)
        asked = expert.asked
        work: list[Awaitable[Drawn]] = [asyncio.create_task(segmenter.segment("a", None, Prompt(box=BOX)))]
        await until(lambda: expert.asked > asked)
        with pytest.raises(RuntimeError, match="has finished nothing within 2 s"):
            await segmenter.check_health()
        check = asyncio.create_task(segmenter.check_health())
        await asyncio.sleep(0)
        expert.turns.release()  # the mask is drawn, and then the check itself takes too long
        await check
        expert.turns.release()
        await asyncio.gather(*work)
        expert.turns = None

    with opened(expert=expert, patience=2.0) as segmenter:
        run(hanging(segmenter))
