"""What a run's records say of engine and learner drifting apart."""

from types import MappingProxyType

import pytest

from cluster.drift import FIRST
from cluster.journal import Journal
from cluster.run_folder import RunFolder
from cluster.trackers import Trackers
from learner.update_report import UpdateReport
from rewards.scored import ScoredAnswer, ScoredGroup
from rewards.scoring import Reward
from umrg.answers import parse_answer
from umrg.frames import Frames, Size
from umrg.group import Completion, Group, GroupSamples
from umrg.sample import Sample


@pytest.fixture
def recorded(demo_config, tmp_path):
    """Records steps of one group each, by the divergence of engine and learner, in a run's folder."""
    folder = RunFolder(tmp_path / "run")

    def record(values, resumed_after=None, lag=0, alarms=MappingProxyType({})):
        config = demo_config()
        run = folder if folder.path.exists() else RunFolder.create(folder.path, config)
        with Trackers(run, config, pytest.fail) as trackers, Journal(run, trackers) as journal:
            first = 1
            if resumed_after is not None:
                lines = (folder.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
                journal.rewind(resumed_after, sum(map(len, lines[:resumed_after])))
                first = resumed_after + 1
            journal.alarms |= alarms
            for step, value in enumerate(values, first):
                journal.step(step, [group(step, lag)], report(value), canary_gap=0.0, resampled=0, roles={})
            return journal.summary().get("alarms", [])

    return record


def group(step, lag=0):
    extent = Size(28, 28)
    sample = Sample(
        id="a",
        query="Where?",
        image_bytes=b"",
        mask_bytes=(),
        box=(1, 1, 9, 9),
        points=((2, 2), (5, 5)),
        supercategory="x",
        category="y",
        modality="CT",
    )
    completion = Completion(text="", token_ids=(1,), logprobs=(-0.5,), policy_version=step - 1 - lag, finished=True)
    answer = ScoredAnswer(
        reward=Reward(total=1.0, parts={"format": 1.0}), answer=parse_answer(""), failure=None, metrics={"iou": 0.5}
    )
    return ScoredGroup(
        group=Group(run="drift", step=step, index=0, sample=sample),
        samples=GroupSamples(
            prompt_ids=(1, 2), frames=Frames(original=extent, model=extent), completions=(completion,)
        ),
        answers=(answer,),
    )


def report(engine_kl):
    return UpdateReport(
        loss=0.0,
        kl=0.0,
        clip_fraction=0.0,
        entropy=0.0,
        engine_gap=0.0,
        engine_kl=engine_kl,
        truncated_fraction=0.0,
        correction=1.0,
        grad_norm=1.0,
        lr=1e-6,
        tokens=1,
        updates=1,
    )


def test_a_lasting_rise_is_told_once_by_its_step(recorded):
    (alarm,) = recorded([0.002] * FIRST + [0.1] * 10)
    assert alarm.startswith(f"step {FIRST + 5}: learner/engine_kl is 0.1 nats and was 0.002")


def test_a_resumed_run_is_compared_with_its_own_beginning(recorded):
    """Not with the first steps after it went on."""
    assert recorded([0.002] * FIRST) == []
    assert len(recorded([0.1] * 5, resumed_after=FIRST)) == 1


def test_a_rise_is_told_beside_what_else_is_alarming(recorded):
    other, drift = recorded([0.002] * FIRST + [0.1] * 10, alarms={"transfer": "it failed too often"})
    assert other == "it failed too often" and "drift apart" in drift


def test_where_steps_overlap_a_rise_is_the_policys_own(recorded):
    assert recorded([0.002] * FIRST + [0.1] * 10, lag=1) == []
