"""The segmenter actor: a frozen expert that turns answers into masks, and masks into rewards."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from actors.config import SegmenterConfig
from actors.experts.cache import open_cache
from actors.experts.desk import CacheUse, Desk
from actors.experts.drawing import load_frozen, prompts_of, reference_prompts
from actors.experts.measuring import encoded, overlaps
from actors.experts.protocol import Decoded, Embedding, Expert
from actors.gpus import ALONE, Lodging, Place, this_place
from actors.threads import share_cores
from rewards.answer_metrics import answer_metrics
from rewards.case import Drawn, Reference
from rewards.scored import ScoredAnswer, ScoredGroup, ScoringDepth
from rewards.scoring import Scorer
from umrg.answers import Answer
from umrg.foreign_answers import parse_lenient
from umrg.frames import Frame
from umrg.group import Completion, Group, GroupSamples

T = TypeVar("T")


class Segmenter:
    """The reward worker: it runs the expert (a frozen SAM-like segmentation model) and the reward on whole groups.

        embed(group) ──► the image's embedding, ahead ─────────────┐
        score(group) ──► the reference, the answers' boxes, points ─┴─► masks ──► counts, reward, run lengths

    Several groups may be scored at the same time, each in a thread of the caller's: the expert works for all of them
    in one more (`actors.experts.desk`), while masks of others are measured. An image is embedded alone, so that no bit
    of a reward depends on which images are beside it. `start` must have returned before anything else is called.

    frame: the frame that the reasoner answers in. think: whether an answer must reason to be well formed. lenient:
    whether foreign forms of answers are taken too, where otherwise they are read as the scorer reads them.
    """

    def __init__(
        self,
        expert: str,
        config: SegmenterConfig,
        scorer: Scorer,
        *,
        frame: Frame,
        think: bool,
        lenient: bool = False,
    ) -> None:
        self._name, self._config = expert, config
        self._scorer, self._frame, self._think = scorer, frame, think
        self._read = partial(parse_lenient, frame=frame) if lenient else scorer.read
        self._told = CacheUse()
        self._scoring = threading.Lock()  # terms of users' own need not know of threads

    def place(self) -> Place:
        """Where it is; may be called before `start`."""
        return this_place({"expert": self._name, "segmenter.checkpoint": self._config.checkpoint})

    def start(self, lodging: Lodging = ALONE) -> str:
        """Load the expert; `digest`. Raises ValueError where there is no expert by that name, or its weights do not
        fit."""
        share_cores(self._config.threads, lodging.sharers)
        self._expert = self._load(lodging)
        self._desk = Desk(self._expert, open_cache(self._config.embeddings, self._expert))
        return self.digest()

    def _load(self, lodging: Lodging) -> Expert:
        return load_frozen(lodging.local(self._name), self._config.at(lodging.local))

    def digest(self) -> str:
        """Digest of the expert's weights, which never change."""
        return self._desk.do(self._expert.digest).result()

    def cache_use(self) -> CacheUse:
        """How embeddings were come by since this was asked last."""
        use = self._desk.use()
        since, self._told = use.since(self._told), use
        return since

    def embed(self, group: Group, depth: ScoringDepth = "masks") -> int | None:
        """Have the embedding of a group's image ready for when the group is scored. Returns how many such embeddings
        are kept at the same time; None where no masks are looked at, and so none is made."""
        return self._desk.room(self._embedding(group).result()) if self._looks_at_masks(depth) else None

    def score(
        self, group: Group, masks: tuple[bytes, ...], samples: GroupSamples, depth: ScoringDepth = "masks"
    ) -> ScoredGroup:
        """Masks, metrics and rewards of a group's completions. masks: the row's reference masks, as its `mask_bytes`.
        Raises ValueError where the reference cannot be read."""
        parsed = (self._read(completion.text) for completion in samples.completions)
        answers = [answer.to_original(samples.frames, self._frame) for answer in parsed]
        with_masks = self._looks_at_masks(depth)
        drawable = with_masks and (depth == "ablations" or any(answer.promptable for answer in answers))
        embedding = self._embedding(group) if drawable else None
        # Read while the expert embeds.
        reference = Reference.of_sample(replace(group.sample, mask_bytes=masks), with_mask=with_masks)
        masked: Sequence[_Masked | None] = [None] * len(answers)
        ablations: Mapping[str, Sequence[float]] = {}
        if embedding is not None:
            begun = self._begin(embedding.result(), answers)
            if depth == "ablations":
                ablations = self._ablations(embedding.result(), answers, reference)
            masked = _of_each(answers, _masked(begun.result(), reference) if begun else ())
        with self._scoring:
            scored = [
                self._scored(
                    answer,
                    completion,
                    reference,
                    masked[i],
                    {name: values[i] for name, values in ablations.items()},
                    step=group.step,
                )
                for i, (answer, completion) in enumerate(zip(answers, samples.completions, strict=True))
            ]
        return ScoredGroup(group=group.without_files(), samples=samples, answers=tuple(scored))

    def _looks_at_masks(self, depth: ScoringDepth) -> bool:
        return depth != "reward" or self._scorer.uses_mask

    def _embedding(self, group: Group) -> Future[Embedding]:
        return self._desk.embed(group.sample.image_key, group.sample.image)

    def _begin(
        self, embedding: Embedding, answers: Sequence[Answer], *, boxes: bool = True, points: bool = True
    ) -> Future[Decoded] | None:
        """Begin to decode the promptable answers; None if there are none. boxes, points: as `prompts_of` takes them."""
        promptable = [answer for answer in answers if answer.promptable]
        if not promptable:
            return None
        prompts = prompts_of(self._expert, embedding, promptable, boxes=boxes, points=points)
        return self._desk.decode(prompts, _as_it_is)

    def _ablations(
        self, embedding: Embedding, answers: Sequence[Answer], reference: Reference
    ) -> dict[str, Sequence[float]]:
        """Of each answer the Dice of the mask from its box alone and, if the expert takes points, from them alone, 0
        where it is malformed; and the Dice that the expert reaches with the reference: the ceiling of any answer."""
        begun = {"dice_box": self._begin(embedding, answers, points=False)}
        if self._expert.takes_points:
            begun["dice_points"] = self._begin(embedding, answers, boxes=False)
        ideal = reference_prompts(self._expert, embedding, reference.box, reference.points)
        (ceiling,) = overlaps(self._desk.decode(ideal, _as_it_is).result().drawn, reference.target)
        found = {name: overlaps(each.result().drawn, reference.target) if each else [] for name, each in begun.items()}
        return {
            **{
                name: [overlap.dice if overlap else 0.0 for overlap in _of_each(answers, each)]
                for name, each in found.items()
            },
            "oracle_dice": [ceiling.dice] * len(answers),
        }

    def _scored(
        self,
        answer: Answer,
        completion: Completion,
        reference: Reference,
        masked: "_Masked | None",
        ablations: Mapping[str, float],
        *,
        step: int,
    ) -> ScoredAnswer:
        drawn = masked.drawn if masked else None
        return ScoredAnswer(
            reward=self._scorer.score(answer, reference, drawn, step=step),
            answer=answer,
            failure=answer.failure(think=self._think, finished=completion.finished),
            metrics={**answer_metrics(answer, drawn, reference, think=self._think), **ablations},
            mask=masked.runs if masked else None,
            expert_score=masked.score if masked else None,
        )


@dataclass(frozen=True, kw_only=True)
class _Masked:
    """What is made of an answer's mask."""

    drawn: Drawn
    runs: Mapping[str, object]
    """The mask's run lengths, for the records."""
    score: float
    """The expert's own."""


def _masked(decoded: Decoded, reference: Reference) -> list[_Masked]:
    return [
        _Masked(
            drawn=Drawn(fetch=partial(_mask, decoded, row), compare=partial(_as_it_is, overlap)),
            runs=runs,
            score=float(decoded.scores[row]),
        )
        for row, (overlap, runs) in enumerate(
            zip(overlaps(decoded.drawn, reference.target), encoded(decoded.drawn), strict=True)
        )
    ]


def _mask(decoded: Decoded, row: int) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = decoded.masks[row]
    return mask


def _of_each(answers: Sequence[Answer], found: Iterable[T]) -> list[T | None]:
    """What was found of each promptable answer, in order; None for the others."""
    rest = iter(found)
    return [next(rest) if answer.promptable else None for answer in answers]


def _as_it_is(found: T) -> T:
    return found
