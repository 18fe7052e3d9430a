"""Sample records: one row an answer, the same for training, evaluation and whoever looks at them."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.experience import Experience
from umrg.atomic import written_aside


def records(experience: Iterable[Experience]) -> Iterator[dict[str, Any]]:
    """Rows of plain values. Boxes and points in original pixels; mask as COCO run-length encoding. The image stays in
    its dataset, under `sample_id`."""
    for each in experience:
        sample = each.group.sample
        for i, (completion, scored) in enumerate(zip(each.samples.completions, each.scored, strict=True)):
            yield {
                "answer_id": each.group.answer_id(i),
                "step": each.group.step,
                "sample_id": sample.id,
                "query": sample.query,
                "supercategory": sample.supercategory,
                "category": sample.category,
                "modality": sample.modality,
                "completion": completion.text,
                "tokens": len(completion.token_ids) or None,
                "finished": completion.finished,
                "policy_version": completion.policy_version,
                "read": "lenient" if scored.answer.lenient else "strict",
                "reasoning": scored.answer.think,
                "box": list(scored.answer.box) if scored.answer.box else None,
                "points": [list(point) for point in scored.answer.points] if scored.answer.points else None,
                "mask": dict(scored.mask) if scored.mask else None,
                "expert_score": scored.expert_score,
                "reference_box": list(sample.box),
                "reference_points": [list(point) for point in sample.points],
                "reward": scored.reward.total,
                "parts": dict(scored.reward.parts),
                "failure": scored.failure,
                "metrics": dict(scored.metrics),
            }


def as_results(experience: Iterable[Experience], kind: str) -> list[dict[str, Any]]:
    """Records of one kind of answers, "greedy" or "sampled", as an evaluation's results.jsonl has them."""
    return [{"kind": kind, **record} for record in records(experience)]


def write_records(path: Path, experience: Iterable[Experience]) -> None:
    """Write records as parquet."""
    with written_aside(path) as aside:
        pq.write_table(pa.Table.from_pylist(list(records(experience))), aside)


def read_records(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows
