"""The training job on real components: vLLM, Ray, DeepSpeed, SAM, on the tiny models."""

import json
import os
import re
import shutil
import signal
import struct
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import ray
import torch
from prometheus_client.parser import text_string_to_metric_families
from ray.util import placement_group_table
from ray.util.state import list_actors
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event

import cluster.train
from actors.config import DeadlineConfig, SegmenterConfig
from actors.failures import DeadlinePassed
from actors.pools import SegmenterPool
from actors.rollout import Rollout
from actors.segmenter import Segmenter
from cluster.checkpoints import export_run
from cluster.commands.report import report
from cluster.data import open_rows
from cluster.display import Display
from cluster.evaluation import evaluate, evaluation_groups
from cluster.gauges import gauge_name
from cluster.journal import Journal
from cluster.records import read_records
from cluster.run_folder import RunFolder
from cluster.trackers import Trackers
from cluster.train import Training, actors, train
from cluster.weight_sync import WeightsDiffer, sync_weights
from cluster.workers import rollouts, started
from reasoner.model import load_reasoner
from rewards.case import Case
from tests.conftest import TINY_REASONER
from tests.runs import hand_out
from umrg.config import model_folder
from umrg.dataset import Dataset
from umrg.group import SamplingParams

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "medreasoner.json"
SMALL = (
    "data.train={phantoms: 24, seed: 1, modalities: [CT]}",
    "data.eval={phantoms: 4, seed: 2, modalities: [CT]}",
    "batch=4",
    "rollout.n=4",
    "evaluation.limit=4",
    "evaluation.n=2",
    "learner.warmup=0",
)


@pytest.fixture(scope="module")
def finished(ray_cluster, demo_config, tmp_path_factory):
    """A run of three steps, with two rollouts, three segmenters and two learner ranks by configuration alone."""
    folder = tmp_path_factory.mktemp("runs")
    actors = ("rollout.actors=2", "segmenter.actors=3", "learner.ranks=2", "learner.num_cpus=0.25")
    shares = ("segmenter.num_gpus=0.25", "segmenter.device=cpu")
    config = demo_config(*SMALL, *actors, *shares, f"runs={folder}", "name=small", "steps=3", "checkpoint_every=2")
    return train(config), config


class StaleRollout(Rollout):
    """Keeps its caches when new weights come."""

    async def start(self, *lodging):
        report = await super().start(*lodging)
        llm = self._running()._llm
        pause = llm.pause_generation
        llm.pause_generation = lambda **options: pause(**{**options, "clear_cache": False})
        return report


def test_without_the_cache_reset_the_canary_stops_the_run(ray_cluster, demo_config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        cluster.train, "rollouts", lambda *part: [replace(actor, actor_class=StaleRollout) for actor in rollouts(*part)]
    )
    # The phantoms' short prompts fill no block of the prefix cache; what is stale is the image's encoding.
    moving = ("learner.lr=3e-4", "learner.freeze=[]")
    config = demo_config(*SMALL, *moving, f"runs={tmp_path}", "name=stale", "steps=3")
    with pytest.raises(WeightsDiffer, match="stale weights or caches"):
        train(config)
    summary = json.loads((tmp_path / "stale" / "summary.json").read_text())
    assert (summary["status"], summary["before"]["greedy"]["n"]) == ("failed", 4)
    assert summary["error"].startswith("WeightsDiffer: after weights of version 1")


def test_a_run_leaves_its_folder(finished):
    run, config = finished
    metrics = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3]
    for line in metrics:
        assert np.isfinite(list(line.values())).all()
        assert line["learner/engine_gap"] < 1e-4 and line["learner/canary_gap"] < 1e-4
        assert line["policy/lag"] == 0
        assert {"seconds/rollout", "seconds/score", "seconds/learn", "seconds/sync"} <= line.keys()
        assert 0 < line["busy/rollout"] < 1 and 0 < line["busy/segmenter"] < 1 and 0 < line["busy/learner"] < 1
        assert [line[f"actors/{role}"] for role in ("rollout", "segmenter")] == pytest.approx([2, 3], abs=0.01)
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["status"] == "ended" and summary["steps"] == 3
    for when in ("before", "after"):
        for kind in ("greedy", "sampled"):
            assert set(summary[when][kind]) == {"dice", "iou", "pdice", "well_formed", "n"}
    assert summary["peak_memory_gib"] > 0.5 and "vllm" in summary["versions"]
    records = read_records(run.samples / "step-000002.parquet")
    assert len(records) == config.batch * config.rollout.n
    assert {record["policy_version"] for record in records} == {1}
    assert (run.checkpoints / "step-000003" / "state.json").exists()
    assert model_folder(run.checkpoints / "step-000003") == run.checkpoints / "step-000003" / "model"
    last, final = (
        load_file(folder / "model.safetensors") for folder in (model_folder(run.checkpoints / "step-000003"), run.model)
    )
    assert last.keys() == final.keys() and all(torch.equal(last[name], final[name]) for name in last)
    page = (run.report / "index.html").read_text()
    assert page.count("<article") == 4 and "<h2>Time by role</h2>" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page), "the page loads something from elsewhere"


def test_the_final_model_gives_the_evaluated_answers_again(finished):
    """In transformers; the vLLM that evaluated it had the learner's weights, not the folder's."""
    run, _ = finished
    reasoner = load_reasoner(run.model)
    evaluated = {record["sample_id"]: record for record in read_records(run.samples / "after-greedy.parquet")}
    for row in Dataset.open(run.path / "data" / "eval.parquet"):
        prompt = reasoner.encode(row.query, reasoner.encode_image(row.image()))
        answer = reasoner.completion_ids(evaluated[row.id]["completion"])
        assert shortfall(reasoner, prompt, answer) < 1e-3


@torch.no_grad()
def shortfall(reasoner, prompt, answer):
    """How many nats each token of an answer is at most behind the likeliest one: 0 for the greedy answer, and hardly
    more where rounding decided between two."""
    ids = torch.cat([prompt.token_ids, answer])[None]
    logits = reasoner.model(
        input_ids=ids,
        mm_token_type_ids=(ids == reasoner.image_token_id).int(),
        pixel_values=prompt.image.pixel_values,
        image_grid_thw=prompt.image.grid_thw,
    ).logits[0, len(prompt.token_ids) - 1 : -1]
    return (logits.max(1).values - logits.gather(1, answer[:, None])[:, 0]).max()


def test_the_final_model_answers_alike_in_vllm(finished, workers):
    """In the engine that runs already, with the weights of the run's folder."""
    run, _ = finished
    rows = list(Dataset.open(run.path / "data" / "eval.parquet"))
    evaluated = {record["sample_id"]: record for record in read_records(run.samples / "after-greedy.parquet")}
    try:
        hand_out(workers, load_file(run.model / "model.safetensors"))
        again = evaluate(workers, evaluation_groups(rows), SamplingParams(n=0, temperature=1.0, max_tokens=128))
    finally:
        sync_weights(workers, version=0, everything=True)
    for each in again.greedy:
        assert each.samples.completions[0].text == evaluated[each.group.sample.id]["completion"]


def test_the_actors_had_what_was_asked_for(finished):
    """Ray's own records of the run's actors; a share of a GPU was taken for the segmenters alone."""
    found = {}
    for kind in ("Rollout", "Segmenter", "LearnerRank"):
        here = ray.get_runtime_context().gcs_address
        actors = list_actors(address=here, filters=[("class_name", "=", kind)], detail=True, limit=1000)
        # Their names end with the placement group's.
        taken = [{name.split("_group")[0]: share for name, share in a.required_resources.items()} for a in actors]
        found[kind] = [(resources.get("CPU"), resources.get("GPU")) for resources in taken]
    assert found["Segmenter"].count((0.1, 0.25)) == 3
    assert found["LearnerRank"].count((0.25, None)) == 2
    assert {gpus for _, gpus in found["Rollout"]} == {None}


def test_tensorboard_is_given_the_same_metrics(finished):
    run, _ = finished
    (events,) = (run.path / "tensorboard").iterdir()
    shown = {
        value.tag: value.simple_value
        for record in read_tensorboard(events)
        if record.step == 3
        for value in record.summary.value
    }
    last = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
    for name in last.keys() - {"step"}:
        assert shown[name] == pytest.approx(last[name], abs=1e-5), name
    assert "evaluation/greedy_dice" in shown


def read_tensorboard(path):
    """Its records: length, checksum of it, the record, checksum of that."""
    data = path.read_bytes()
    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield Event.FromString(data[at + 12 : at + 12 + length])
        at += 16 + length


def test_the_nodes_endpoint_has_every_metric_and_the_dashboard_asks_for_no_other(finished):
    run, config = finished
    last = run.metrics()[-1]
    wanted = {(name, *tags.values()): last[metric] for metric in last for name, tags in [gauge_name(metric)]}
    until = time.monotonic() + 120
    while (found := exported(config.name)).get(STEP) != last["step"] or not wanted.keys() <= found.keys():
        assert time.monotonic() < until, f"only {sorted(found)} is exported"
        time.sleep(2)
    assert {key: found[key] for key in wanted} == pytest.approx(wanted)
    names = {f"ray_{name}" for name, *_ in found}
    for asked in asked_names(json.loads(DASHBOARD.read_text())):
        assert any(re.fullmatch(asked, name) for name in names), f"{asked} is exported by nobody"


STEP = ("medreasoner_step",)


def exported(run):
    """A run's gauges at the node's metrics endpoint: values by name and the tag besides the run's, if any."""
    (node,) = [each for each in ray.nodes() if each["Alive"]]
    with urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=30) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [each for family in families for each in family.samples if each.labels.get("run") == run]
    tags = [[each.labels[tag] for tag in ("role", "phase") if tag in each.labels] for each in samples]
    return {(each.name.removeprefix("ray_"), *tag): each.value for each, tag in zip(samples, tags, strict=True)}


def asked_names(dashboard):
    """The metrics of its queries, as patterns."""
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [each["query"]["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"]
    asked = [re.findall(r'__name__=~"([^"]+)"', query) or re.findall(r"\bray_\w+", query) for query in queries]
    assert all(asked)
    return {name for names in asked for name in names}


def test_no_placement_group_stays_on_a_lasting_cluster(finished, workers):
    living = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    assert len(living) == 1, "only that of the workers that all tests share"


def test_a_wait_for_room_says_what_is_missing(workers, demo_config, capsys):
    config = demo_config("learner.num_cpus=3", "deadlines.resources=1")
    with (
        pytest.raises(DeadlinePassed, match=r"waited 1 s for 3\.6 CPUs and 0 GPUs; [\d.]+ and 1 are free"),
        started(actors(config), config),
    ):
        pass


@pytest.fixture
def without_room(workers, demo_config, tmp_path):
    """A run that waits, because others hold what it needs."""
    return demo_config(*SMALL, "learner.num_cpus=3", "deadlines.resources=60", f"runs={tmp_path}", "name=waiting")


def test_a_wait_for_room_that_ends_does_not_block_the_corrected_command(without_room, tmp_path):
    summary = tmp_path / "waiting" / "summary.json"
    with pytest.raises(DeadlinePassed):
        train(without_room.model_copy(update={"deadlines": DeadlineConfig(resources=1)}))
    assert json.loads(summary.read_text())["status"] == "failed"
    with pytest.raises(ValueError, match="there is no checkpoint"):
        train(without_room.model_copy(update={"seed": 5, "resume": Path("nothing")}))
    assert not any(tmp_path.iterdir())


def test_a_wait_for_room_that_is_ended_says_so(without_room, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("builtins.print", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(without_room)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert json.loads((tmp_path / "waiting" / "summary.json").read_text())["status"] == "interrupted"
    assert [path.name for path in tmp_path.iterdir()] == ["waiting"]


def test_a_finished_run_is_not_begun_again(finished):
    run, config = finished
    with pytest.raises(ValueError, match=f"the run folder {run.path} exists"):
        train(config)


def half_flat(case: Case) -> float:
    """A reward term: the same for every answer where the reference box begins at an even pixel."""
    return 0.0 if int(case.reference.box[0]) % 2 == 0 else len(case.answer.text) % 7 / 7


def test_zero_variance_groups_give_way_to_others(workers, demo_config, tmp_path):
    config = demo_config(
        *SMALL,
        "reward={terms: [{name: tests.cluster.test_train:half_flat}]}",
        "dynamic_sampling_retries=8",
        f"runs={tmp_path}",
    )
    spec = config.spec()
    segmenter = (
        ray.remote(Segmenter)
        .options(num_cpus=0, num_gpus=0)
        .remote(
            "tiny",
            SegmenterConfig(threads=1),
            config.reward.scorer(think=spec.think),
            frame=spec.frame,
            think=spec.think,
        )
    )
    workers.calls.gather({"segmenter 0": segmenter.start.remote()}, seconds=300, doing="starting")
    starter: Any = None
    pool = SegmenterPool(starter, workers.calls, config.deadlines)
    pool.adopt({"segmenter 0": segmenter})
    own = replace(workers, segmenters=pool, wanted={"rollout": 1, "segmenter": 1})
    with (
        RunFolder.begun(tmp_path / "resampled", config, resume=False) as run,
        Journal(run, Trackers(run, config, pytest.fail)) as journal,
    ):
        training = Training(config, run, own, journal, Display(config), *open_rows(config, run)[:2])
        kept, resampled = training.ahead.collect(0, phase=journal.clock.phase, meanwhile=lambda: None)
    assert len(kept) == 4 and not any(each.scored.zero_variance for each in kept) and resampled > 0
    indices = sorted(each.scored.group.index for each in kept)
    assert len(set(indices)) == 4 and indices[-1] > 3


def test_the_page_of_a_run_is_made_again_from_its_folder_wherever_that_is(finished, tmp_path, monkeypatch):
    run, _ = finished
    again = report(run.path, tmp_path / "again.html")
    assert again.path.read_text() == (run.report / "index.html").read_text() and not again.remarks
    moved = tmp_path / "moved"
    shutil.copytree(run.path, moved, ignore=shutil.ignore_patterns("data", "report"))
    monkeypatch.chdir(tmp_path)
    config = moved / "config.yaml"
    config.write_text(config.read_text().replace(str(TINY_REASONER), "/nowhere/model"))
    written = report(moved)
    assert written.standing.status == "ended" and written.remarks[0].startswith("Without the images")
    assert written.path.read_text().count("<article") == 4 and "data:image" not in written.path.read_text()
    export_run(moved, None, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (run.model / "model.safetensors").read_bytes()


def test_a_run_goes_on_from_its_checkpoint(finished, ray_cluster):
    """On fewer actors than it began with."""
    run, config = finished
    fewer = {
        role: getattr(config, role).model_copy(update={key: 1})
        for role, key in (("rollout", "actors"), ("segmenter", "actors"), ("learner", "ranks"))
    }
    train(config.model_copy(update={"steps": 4, "resume": "auto", **fewer}))
    metrics = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]


def test_an_exported_model_is_the_runs(finished, tmp_path):
    run, _ = finished
    export_run(run.path, None, tmp_path / "out")
    files = sorted(path.name for path in run.model.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert all((run.model / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in files)


def test_a_run_is_not_resumed_with_another_configuration(finished):
    _, config = finished
    with pytest.raises(ValueError, match="another batch"):
        train(config.model_copy(update={"batch": 3, "resume": "auto"}))


def test_too_many_actors_are_refused_before_anything_starts(ray_cluster, demo_config, tmp_path):
    with pytest.raises(ValueError, match=r"actors need .* CPUs and 3 GPUs, the cluster has 4 and 1 on 1 node"):
        train(demo_config(*SMALL, "segmenter.actors=3", "segmenter.num_gpus=1", f"runs={tmp_path}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=docs", "docs is not a model folder"),
        ("expert=sam_vit_b", "sam_vit_b needs its weights"),
        ("expert=tinny", "the nearest expert is 'tiny'"),
    ],
)
def test_what_cannot_be_loaded_is_the_users_mistake(ray_cluster, demo_config, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        train(demo_config(*SMALL, override, f"runs={tmp_path}"))
    assert not any(tmp_path.iterdir()), "the corrected command shall find the name free"
