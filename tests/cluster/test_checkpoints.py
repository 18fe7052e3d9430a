"""Checkpoints on a real disk, whose operations can be counted and stopped; the learner's part is written by the real
background writer."""

import errno
import itertools
import shutil
import threading
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.checkpoints import Checkpoint, CheckpointFolder, Checkpoints, RunState, export_run
from cluster.lease import LeaseLost
from learner.checkpoint import BackgroundWriter, FilePart
from umrg.durable import Damaged, Disk
from umrg.shuffling import Cursor


class Killed(BaseException):
    """The process ends here."""


class Fragile(Disk):
    """Ends the process before one of its operations, or in the middle of it where that is a write or the removal of a
    folder."""

    def __init__(self, operations: int, *, halfway: bool) -> None:
        self.left, self.halfway = operations, halfway

    def _alive(self) -> bool:
        self.left -= 1
        if self.left < -1 or (self.left < 0 and not self.halfway):
            raise Killed
        return self.left >= 0

    def make_folder(self, path):
        if self._alive():
            super().make_folder(path)

    def write(self, path, data):
        super().write(path, data if self._alive() else data[: len(data) // 2])

    def sync(self, path):
        if self._alive():
            super().sync(path)

    def rename(self, source, target):
        if self._alive():
            super().rename(source, target)

    def remove(self, path):
        if self._alive():
            super().remove(path)
        elif path.is_dir():
            next(each for each in path.rglob("*") if each.is_file()).unlink()


class Learner:
    """One rank, whose state is the step that it was told of."""

    def __init__(self, disk=None):
        self.writer, self.content = BackgroundWriter(disk), b""

    def save(self, folder):
        files = {"optimizer/rank-00000.safetensors": self.content, "model/config.json": b"{}", "learner.json": b"{}"}
        self.writer.save(folder, [FilePart(name=name, data=partial(bytes, data)) for name, data in files.items()])

    def saved(self, *, wait):
        return self.writer.saved(60 if wait else 0)

    def load(self, folder):
        self.content = (folder / "optimizer/rank-00000.safetensors").read_bytes()


def save(folder, step, *, disk=None, score=None, rows=None, **kept):
    learner = Learner(disk)
    learner.content = b"state of step %d" % step
    checkpoints = Checkpoints(folder, learner, disk=disk, **{"keep": 2, "keep_best": 0, **kept})
    state = RunState(step=step, cursor=Cursor(seed=0, position=step), metrics=100 * step, score=score, rows=rows)
    checkpoints.save(state, "name: trial\n")
    checkpoints.saved(wait=True)
    return checkpoints


def latest(folder):
    return CheckpointFolder(folder).latest()


@pytest.mark.parametrize("halfway", [False, True])
def test_stopped_at_any_operation_the_run_finds_the_one_before_or_the_new_one(tmp_path, halfway):
    """From the first checkpoint on, over the one that makes the oldest go."""
    found = set()
    for operations in itertools.count():
        folder = tmp_path / f"{operations}"
        for step in (1, 2):
            save(folder, step)
        try:
            save(folder, 3, disk=Fragile(operations, halfway=halfway))
        except Killed:
            pass
        else:
            break
        checkpoint = latest(folder)
        assert checkpoint.state.step in (2, 3)
        content = (checkpoint.folder / "optimizer/rank-00000.safetensors").read_text()
        assert content == f"state of step {checkpoint.state.step}"
        found.add(checkpoint.state.step)
        # And from there it goes on.
        Checkpoints(folder, Learner(), keep=2, keep_best=0).rewind(checkpoint.state.step)
        for step in range(checkpoint.state.step + 1, 6):
            save(folder, step)
        assert latest(folder).state.step == 5
    assert found == {2, 3} and operations > 25


@pytest.mark.parametrize("halfway", [False, True])
def test_the_very_first_is_there_or_not(tmp_path, halfway):
    for operations in itertools.count():
        folder = tmp_path / f"{operations}"
        try:
            save(folder, 1, disk=Fragile(operations, halfway=halfway))
        except Killed:
            pass
        else:
            break
        checkpoint = latest(folder)
        assert checkpoint is None or checkpoint.state.step == 1
    assert operations > 15


def test_a_learner_that_dies_before_its_run_wrote_one_goes_on_from_what_it_resumed_from(tmp_path):
    """And not from a later one of the folder, which stays until nothing can refuse the older one any more."""
    for step in (4, 6):
        save(tmp_path, step)
    resumed = Checkpoints(tmp_path, Learner(), keep=2, keep_best=0)
    resumed.load(CheckpointFolder(tmp_path).at(4))
    assert resumed.newest() is None and latest(tmp_path).state.step == 6
    resumed.rewind(4)
    resumed.save(RunState(step=5, cursor=Cursor(seed=0, position=5), metrics=500), "name: trial\n")
    resumed.saved(wait=True)
    assert (newest := resumed.newest()) and newest.state.step == 5


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    for step in (10, 20):
        save(folder, step)
    return folder


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_one_flipped_bit_in_any_file_is_found(two, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged") / "checkpoints"
    shutil.copytree(two, folder)
    files = sorted(path for path in [folder / "latest", *(folder / "step-000020").rglob("*")] if path.is_file())
    path = data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(Damaged) as refusal:
        latest(folder)
    assert path.name in str(refusal.value)
    assert "resume=" in str(refusal.value) and "checkpoints/step-0000" in str(refusal.value)


@pytest.mark.parametrize("name", ["state.json", "manifest.json", "model/config.json"])
def test_a_missing_file_is_named_and_the_checkpoint_before_is_offered(tmp_path, two, name):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two, folder)
    (folder / "step-000020" / name).unlink()
    with pytest.raises(Damaged, match=rf"step-000020 is damaged: .*{name}.*resume={folder}/step-000010"):
        latest(folder)
    shutil.rmtree(folder / "step-000010")
    with pytest.raises(Damaged, match="no whole one before it"):
        latest(folder)


def test_the_newest_stay_and_the_best(tmp_path):
    for step, score in enumerate((0.3, 0.6, None, 0.5, 0.4, None), start=1):
        checkpoints = save(tmp_path, step, score=score, keep=2, keep_best=1)
    assert checkpoints.steps() == [2, 5, 6]


def test_it_is_written_while_training_goes_on(tmp_path):
    gate = threading.Event()

    class Slow(Learner):
        def save(self, folder):
            self.writer.save(folder, [FilePart(name="slow", data=lambda: b"x" if gate.wait(60) else b"")])

    learner = Slow()
    checkpoints = Checkpoints(tmp_path, learner, keep=1, keep_best=0)
    checkpoints.save(RunState(step=1, cursor=Cursor(seed=0), metrics=0), "")
    checkpoints.saved()
    assert checkpoints.latest() is None
    gate.set()
    checkpoints.saved(wait=True)
    assert checkpoints.steps() == [1]


class Timed(Learner):
    """Copying its state takes so many seconds of a clock."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def save(self, folder):
        self.clock[0] += self.seconds
        super().save(folder)


@pytest.mark.parametrize(("cost", "period"), [(1, 600), (29, 600), (31, 620), (300, 6000)])
def test_by_time_one_is_due_after_ten_minutes_or_twenty_times_what_the_last_cost(tmp_path, cost, period):
    clock = [1000.0]
    checkpoints = Checkpoints(tmp_path, Timed(clock, cost), keep=1, keep_best=0, now=lambda: clock[0])
    clock[0] += 599
    assert not checkpoints.due(1)
    clock[0] += 1
    assert checkpoints.due(2)
    checkpoints.save(RunState(step=2, cursor=Cursor(seed=0), metrics=0), "")
    clock[0] += period - 1
    assert not checkpoints.due(3)
    clock[0] += 1
    assert checkpoints.due(4)


@pytest.mark.parametrize(("every", "due"), [(0, []), (1, [1, 2, 3, 4]), (3, [3])])
def test_by_number_time_does_not_count(tmp_path, every, due):
    clock = itertools.count(0, 10_000)
    checkpoints = Checkpoints(tmp_path, Learner(), keep=1, keep_best=0, every=every, now=lambda: next(clock))
    assert [step for step in range(1, 5) if checkpoints.due(step)] == due


def test_a_folder_that_is_anothers_by_now_is_left_alone(tmp_path):
    lost: list[bool] = []

    def hold():
        if lost:
            raise LeaseLost

    save(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path, Learner(), keep=1, keep_best=0, hold=hold)
    checkpoints.save(RunState(step=2, cursor=Cursor(seed=0), metrics=0), "")
    lost.append(True)
    with pytest.raises(LeaseLost):
        checkpoints.saved(wait=True)
    with pytest.raises(LeaseLost):
        Checkpoints(tmp_path, Learner(), keep=1, keep_best=0, hold=hold).save(
            RunState(step=3, cursor=Cursor(seed=0), metrics=0), ""
        )
    assert latest(tmp_path).state.step == 1


def test_a_failed_write_is_an_error(tmp_path):
    class Full(Disk):
        def write(self, path, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    learner = Learner(Full())
    save(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path, learner, keep=1, keep_best=0)
    checkpoints.save(RunState(step=2, cursor=Cursor(seed=0), metrics=0), "")
    with pytest.raises(OSError, match="No space left"):
        checkpoints.saved(wait=True)
    with pytest.raises(OSError, match=r"No space left.*'/dev/full'"):
        Disk().write(Path("/dev/full"), b"x")
    assert latest(tmp_path).state.step == 1


def test_going_on_from_an_older_one_forgets_what_came_after(two, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two, folder)
    learner = Learner()
    checkpoints = Checkpoints(folder, learner, keep=2, keep_best=0)
    checkpoints.load(Checkpoint.open(folder / "step-000010"))
    assert learner.content == b"state of step 10"
    assert checkpoints.steps() == [10, 20], "until all else has accepted it"
    checkpoints.rewind(10)
    assert checkpoints.steps() == [10] and latest(folder).state.step == 10


def test_a_run_with_checkpoints_of_its_own_goes_on_from_no_other(tmp_path, two):
    save(tmp_path / "checkpoints", 1)
    other = CheckpointFolder(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="checkpoints of its own"):
        other.chosen(two / "step-000010", 100)
    anew = CheckpointFolder(tmp_path / "new" / "checkpoints")
    chosen = anew.chosen(two / "step-000010", 100)
    assert chosen is not None and chosen.state.step == 10
    with pytest.raises(ValueError, match="is of step 10; give steps a larger number"):
        anew.chosen(two / "step-000010", 10)
    assert anew.chosen("auto", 100) is anew.chosen("never", 100) is None


def test_what_is_no_checkpoint_is_refused(tmp_path, two):
    with pytest.raises(ValueError, match="there is no checkpoint"):
        Checkpoint.open(tmp_path / "step-000001")
    with pytest.raises(ValueError, match=r"no such checkpoint; those there are of steps 10, 20"):
        export_run(two.parent, 15, tmp_path / "out")
    with pytest.raises(ValueError, match="exists; give another folder"):
        export_run(two.parent, 10, tmp_path)


def test_a_model_is_exported_by_step(tmp_path, two):
    assert export_run(two.parent, None, tmp_path / "newest").state.step == 20
    assert export_run(two.parent, 10, tmp_path / "older").state.step == 10
    assert [path.name for path in (tmp_path / "older").iterdir()] == ["config.json"]
