"""From records to figures: by hand, on rows of phantoms."""

import json

import numpy as np
import pytest

from cluster.comparison import compare_records
from cluster.figures import TrainingCoverage, as_malformed, comma_separated, consensus, markdown, row_figures, summarise
from cluster.records import Results, read_results
from phantoms import rows
from umrg.dataset import Dataset
from umrg.dataset_writer import write_rows
from umrg.masks import encode_rle


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "phantoms.parquet"
    write_rows(path, rows(6, seed=5, modalities=["CT"], queries_per_image=1))
    return Dataset.open(path)


def record(sample, kind="greedy", *, mask=None, box=None, failure=None, **metrics):
    """A record as a segmenter and a rollout would leave it; perfect unless told otherwise."""
    mask = sample.mask() if mask is None else mask
    names = ("iou", "pdice", "pdice_published", "dice_points", "dice_box", "dice", "mask_iou", "oracle_dice")
    return {
        "kind": kind,
        "sample_id": sample.id,
        "mask": None if failure else encode_rle(mask),
        "box": None if failure else list(box or sample.box),
        "failure": failure,
        "metrics": {**dict.fromkeys((*names, "well_formed"), 0.0 if failure else 1.0), **metrics},
    }


def test_sampled_answers_have_a_mean_a_best_and_a_consensus(dataset):
    sample = dataset[0]
    nothing = np.zeros_like(sample.mask())
    answers = [
        record(sample),
        record(sample, "sampled"),
        record(sample, "sampled", dice=0.5, iou=0.5),
        record(sample, "sampled", mask=nothing, box=(0, 0, 1, 1), dice=0.0, iou=0.0),
    ]
    found = row_figures(answers, sample)
    assert found["mean_dice"] == pytest.approx(0.5) and found["best_dice"] == 1.0
    assert (found["consensus_dice"], found["consensus_iou"]) == (1.0, 1.0), "two of three agree on the reference"


def test_a_malformed_answer_votes_for_nothing_but_counts(dataset):
    sample = dataset[0]
    half = [record(sample, "sampled"), record(sample, "sampled", failure="no answer block")]
    assert consensus(half, sample) == {"consensus_dice": 0.0, "consensus_iou": 0.0}, "one of two is no majority"
    assert consensus([*half, record(sample, "sampled")], sample)["consensus_dice"] == 1.0


def test_without_samples_there_are_greedy_figures_only(dataset):
    assert "mean_dice" not in row_figures([record(dataset[0])], dataset[0])


def test_means_have_intervals_overall_and_by_stratum(dataset):
    samples = list(dataset)
    seen = TrainingCoverage(dataset.infos[:3])
    figures = {s.id: row_figures([record(s, dice=i / 5)], s) for i, s in enumerate(samples)}
    metrics = summarise(figures, {s.id: seen.strata(s) for s in samples}, {samples[0].id: "no answer block"})
    dice = metrics["overall"]["dice"]
    assert dice["mean"] == 0.5 and dice["low"] < 0.35 and dice["high"] > 0.65
    assert metrics["overall"]["n"] == 6 and metrics["failures"] == {"no answer block": [samples[0].id]}
    by_words = metrics["by"]["phrasing"]
    assert {name: part["n"] for name, part in by_words.items()}.get("seen", 0) >= 3
    assert metrics["by"]["modality"]["CT"]["dice"] == dice
    json.dumps(metrics)


def test_a_row_may_say_itself_that_its_words_are_new(dataset):
    sample = dataset[0]
    assert TrainingCoverage([]).strata(sample)["phrasing"] == "seen"
    assert TrainingCoverage(dataset.infos[1:]).strata(sample)["phrasing"] == (
        "seen" if sample.query in {info.query for info in dataset.infos[1:]} else "unseen"
    )


def test_tables_hold_every_stratum(dataset):
    figures = {s.id: row_figures([record(s)], s) for s in dataset}
    metrics = summarise(figures, {s.id: TrainingCoverage([]).strata(s) for s in dataset}, {})
    lines = markdown(metrics).splitlines()
    assert lines[2].startswith("| **all** | 6 | 100.00 (100.0-100.0)")
    assert len({line.count("|") for line in lines}) == 1
    table = comma_separated(metrics).splitlines()
    assert table[0] == "kind,stratum,n,figure,mean,low,high" and "modality,CT,6,dice,1.0,1.0,1.0" in table


def test_answers_read_leniently_are_counted_apart(dataset):
    samples = list(dataset)
    rows = {s.id: [{**record(s), "read": "lenient" if i < 2 else "strict"}] for i, s in enumerate(samples)}
    # A row of an evaluation that knew no other way of reading.
    rows[samples[-1].id] = [record(samples[-1])]
    strata = {s.id: TrainingCoverage([]).strata(s) for s in samples}
    read, strict = (
        summarise({s.id: row_figures(change(rows[s.id]), s) for s in samples}, strata, {})
        for change in (list, as_malformed)
    )
    assert read["overall"]["dice"]["mean"] == 1
    assert strict["overall"]["dice"]["mean"] == strict["overall"]["well_formed"]["mean"] == pytest.approx(4 / 6)
    assert strict["overall"]["oracle_dice"]["mean"] == 1, "the ceiling is no answer's"
    metrics = {**read, "lenient": {"greedy": 2, "sampled": 0, "as_malformed": strict}}
    table = markdown(metrics)
    assert table.startswith(markdown(read))
    assert "\n2 of 6 greedy answers were read leniently. Counted as malformed:\n" in table
    assert table.endswith(markdown(strict))
    lines = comma_separated(metrics).splitlines()
    assert "overall,all,6,dice,1.0,1.0,1.0" in lines
    assert any(line.startswith('"overall, lenient as malformed",all,6,dice,0.66') for line in lines)


def test_results_go_on_after_half_a_line_and_half_a_row(dataset, tmp_path):
    path = tmp_path / "results.jsonl"
    first, second, third = (dataset[i] for i in range(3))
    results = Results(path, n=1)
    results.add([record(first), record(first, "sampled"), record(second)])
    with path.open("a") as file:
        file.write('{"kind": "greedy", "sample_')
    again = Results(path, n=1)
    assert list(again.rows) == [first.id], "the second row lacks an answer, and of the third there is half a line"
    again.add([record(third), record(third, "sampled"), record(second), record(second, "sampled")])
    again.sort([first.id, second.id, third.id])
    assert list(read_results(path)) == [first.id, second.id, third.id]
    assert sum(map(len, read_results(path).values())) == 6


def test_a_line_ends_at_its_newline_only(dataset, tmp_path):
    odd = {**record(dataset[0]), "completion": "a line\u2028separator and\x85another"}
    Results(tmp_path / "results.jsonl", n=0).add([odd])
    assert Results(tmp_path / "results.jsonl", n=0).rows[dataset[0].id] == [odd]


def test_rows_may_lack_a_stratum(dataset):
    figures = {s.id: row_figures([record(s)], s) for s in dataset}
    strata: dict[str, dict[str, str]] = {s.id: {} for s in dataset}
    strata[dataset[0].id] = {"phrasing": "seen"}
    assert summarise(figures, strata, {})["by"]["phrasing"]["seen"]["n"] == 1


def test_there_must_be_results(tmp_path):
    with pytest.raises(ValueError, match="give the folder of an evaluation"):
        read_results(tmp_path / "results.jsonl")


def test_two_evaluations_are_compared_over_the_rows_that_both_have(dataset):
    samples = list(dataset)
    before = {s.id: [record(s, dice=0.4)] for s in samples[:4]}
    after = {s.id: [record(s, dice=0.4 + i / 10)] for i, s in enumerate(samples)}
    found = compare_records(before, after, ["dice"])["dice"]
    assert found["before"] == pytest.approx(0.4) and found["gain"] == pytest.approx(0.15)
    assert found["low"] <= found["gain"] <= found["high"]


def test_metrics_that_one_of_two_evaluations_lacks_are_not_compared(dataset):
    before, after = ({s.id: [record(s)] for s in dataset} for _ in range(2))
    for (each,) in after.values():
        del each["metrics"]["dice_points"]
    assert compare_records(before, after, ["dice", "dice_points"]).keys() == {"dice"}
    assert compare_records({}, after, ["dice"]) == {}
