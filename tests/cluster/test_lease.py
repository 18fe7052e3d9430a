"""The lease on a run's folder, with a clock and machines that the tests make; and once with real processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from cluster.lease import BEAT, PATIENCE, SILENCE, Holder, Lease, LeaseLost, Machine, Process, holder_of, leased, take
from tests.conftest import ROOT


class Fake(Machine):
    """A process of a machine; time passes as it sleeps, and `meanwhile` happens then. dead: processes that ended."""

    def __init__(self, host="here", pid=1, *, dead=(), meanwhile=lambda self: None):
        self.own = Process(host=host, machine=host, pid=pid, started=7)
        self.dead, self.meanwhile, self.seconds = set(dead), meanwhile, 0.0

    def process(self):
        return self.own

    def gone(self, process):
        return process.pid in self.dead if process.machine == self.own.machine else None

    def now(self):
        return self.seconds

    def sleep(self, seconds):
        self.seconds += seconds
        self.meanwhile(self)


def held_by(path):
    """The process that holds a lease."""
    holder = holder_of(path)
    assert holder is not None and holder.process is not None
    return holder.process


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".run.lease"


def test_it_is_there_while_it_is_held(tmp_path):
    with leased(tmp_path / "run") as lease:
        assert held_by(tmp_path / ".run.lease").pid == os.getpid()
        assert not (tmp_path / "run").exists()
        lease.hold()
    assert list(tmp_path.iterdir()) == []


def test_a_lease_is_made_once(path):
    first = Lease.made(path, Holder(id="first", process=None, since="then"))
    assert first is not None and first.ours()
    assert Lease.made(path, Holder(id="second", process=None, since="then")) is None and first.ours()


def test_a_living_driver_on_the_same_machine_is_named(path):
    take(path, Fake(pid=1))
    waiting = Fake(pid=2)
    with pytest.raises(ValueError, match=r"held by process 1 on here since 2\d{3}-.*wait for it, end it"):
        take(path, waiting)
    assert PATIENCE <= waiting.seconds < PATIENCE + 5


def test_the_end_of_the_other_is_waited_for(path):
    first = take(path, Fake(pid=1))

    def end(waiting):
        if waiting.seconds == 10:
            first.release()

    waiting = Fake(pid=2, meanwhile=end)
    assert take(path, waiting).ours() and waiting.seconds < 15


def test_who_ended_on_the_same_machine_is_followed_at_once(path):
    first = take(path, Fake(pid=1))
    following = Fake(pid=2, dead={1})
    second = take(path, following)
    assert following.seconds == 0 and second.ours() and not first.ours()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_beating_heart_elsewhere_is_alive_however_its_clock_goes(path):
    first = take(path, Fake("there"))
    os.utime(path, (0, 0))

    def beat(waiting):
        if waiting.seconds % BEAT == 0:
            first.beat()

    waiting = Fake("here", meanwhile=beat)
    with pytest.raises(ValueError, match="process 1 on there"):
        take(path, waiting)
    assert first.ours() and waiting.seconds < SILENCE


def test_a_silent_one_elsewhere_is_gone_after_a_while_that_the_waiter_sees(path):
    take(path, Fake("there"))
    waiting = Fake("here")
    assert take(path, waiting).ours()
    assert SILENCE <= waiting.seconds < SILENCE + 5


def test_a_heart_that_stops_while_one_waits_is_waited_for_no_longer_than_a_living_one(path):
    first = take(path, Fake("there"))

    def beat_once(waiting):
        if waiting.seconds == 5:
            first.beat()

    with pytest.raises(ValueError, match="process 1 on there"):
        take(path, Fake("here", meanwhile=beat_once))


def test_one_that_was_suspended_finds_its_lease_lost_and_harms_nobody(path):
    first = take(path, Fake("there"))
    second = take(path, Fake("here"))
    first.beat()
    with pytest.raises(LeaseLost, match="held by process 1 on here"):
        first.hold()
    first.release()
    second.hold()
    assert held_by(path).machine == "here"


def test_a_lease_that_somebody_removed_is_lost(path):
    lease = take(path, Fake())
    path.unlink()
    with pytest.raises(LeaseLost, match="held by nobody"):
        lease.hold()


@pytest.mark.parametrize("content", [b"", b"{", b'{"id": 3}'])
def test_one_that_cannot_be_read_is_silent(path, content):
    path.write_bytes(content)
    waiting = Fake()
    assert take(path, waiting).ours() and waiting.seconds >= SILENCE


def test_who_ended_while_it_took_over_is_followed_too(path):
    """Between the claim and its renaming."""
    first = take(path, Fake(pid=1))
    claim = path.with_name(f"{path.name}.after-{first.holder.id}")
    Lease.made(claim, Holder(id="second", process=Fake(pid=2).own, since="then"))
    assert held_by(path).pid == 2
    assert take(path, Fake(pid=3, dead={1, 2})).ours()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_claim_to_what_is_no_longer_the_lease_is_given_up(path):
    """Two see that the first is gone; the slower makes its claim when the quicker has come and gone again."""
    first = take(path, Fake(pid=1))

    class Slow(Fake):
        def gone(self, process):
            if process.pid == 1 and not path.with_name("third").exists():
                path.with_name("third").touch()
                take(path, Fake(pid=2, dead={1})).release()
                self.third = take(path, Fake(pid=3))
            return super().gone(process)

    slow = Slow(pid=4, dead={1})
    with pytest.raises(ValueError, match="process 3 on here"):
        take(path, slow)
    slow.third.hold()
    assert not first.ours()


@pytest.mark.parametrize("left_behind", [False, True])
def test_of_many_who_take_at_once_one_has_it(path, left_behind):
    """Threads, fifty times; whoever has it does not share it."""
    for _ in range(50):
        if left_behind:
            take(path, Fake(pid=99))
        start = threading.Barrier(4)
        won: list[Lease] = []

        def run(pid, start=start, won=won):
            start.wait()
            with suppress(ValueError):
                # So long that a file that was made is written before it counts as silent.
                won.append(take(path, Fake(pid=pid, dead={99}, meanwhile=lambda self: time.sleep(0.001))))

        threads = [threading.Thread(target=run, args=(pid,)) for pid in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1 and won[0].ours()
        won[0].release()
        assert list(path.parent.iterdir()) == []


TAKER = """
import os, sys, time
from pathlib import Path
from cluster.lease import leased
run = Path(sys.argv[1])
for _ in range(2):
    with leased(run):
        os.close(os.open(run.with_name("inside"), os.O_CREAT | os.O_EXCL))
        time.sleep(0.05)
        os.unlink(run.with_name("inside"))
"""


def test_processes_have_it_one_after_the_other(tmp_path):
    takers = [subprocess.Popen([sys.executable, "-c", TAKER, str(tmp_path / "run")], cwd=ROOT) for _ in range(3)]
    assert [taker.wait(timeout=120) for taker in takers] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []


HOLDER = """
import sys, time
from pathlib import Path
from cluster.lease import leased
with leased(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_process_is_followed_at_once(tmp_path):
    """Also before anybody has taken note of its end."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    assert Machine().gone(held_by(tmp_path / ".run.lease")) is False
    os.kill(holder.pid, signal.SIGSTOP)
    assert Machine().gone(held_by(tmp_path / ".run.lease")) is False
    os.kill(holder.pid, signal.SIGKILL)
    while Machine().gone(held_by(tmp_path / ".run.lease")) is False:
        time.sleep(0.01)
    with leased(tmp_path / "run") as lease:
        assert lease.ours()
    holder.wait()
    assert list(tmp_path.iterdir()) == []


def test_another_boot_or_process_with_that_number_is_another():
    own = Machine().process()
    assert Machine().gone(own) is False
    assert Machine().gone(own.model_copy(update={"started": own.started + 1})) is True
    assert Machine().gone(own.model_copy(update={"machine": "another boot"})) is None
