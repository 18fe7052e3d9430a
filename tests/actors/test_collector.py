"""Pool, ledger and collector against actors that die, hang, answer late, come and go, by a clock of the tests' own."""

import random
import tracemalloc
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.calls import Call, Ended
from actors.collector import Collector, Post
from actors.failures import ActorFailed
from actors.ledger import Ledger
from actors.pool import APART_S, Member, Pool


class World:
    """Actors and their calls, as the driver sees them, and what really happens to them."""

    def __init__(self, ids, *, bound=3, keeps=100, poison=(), broken=()):
        """keeps: images that a segmenter keeps prepared. poison: groups that kill whatever works on them. broken:
        groups on which every call ends in an error."""
        self.now = 0.0
        self.alive: set[str] = set()
        self.flying: dict[int, tuple[Call, float]] = {}
        self.abandoned: list[Ended] = []
        self.scored: Counter[str] = Counter()
        self.poison, self.broken = set(poison), set(broken)
        self.pools = {role: Pool(role, self, bound=bound, now=lambda: self.now) for role in ("rollout", "segmenter")}
        self.ledger = Ledger(ids)
        sampling, scoring = (
            Post(pool=pool, make=lambda member, entry: self.make(member, entry), doing="working", seconds=10.0)
            for pool in self.pools.values()
        )
        scoring = replace(scoring, ahead=self.ahead, best=lambda entry, member: self.image(entry) in member.images)
        self.collector = Collector(self.ledger, sampling, scoring, self)
        self.refs, self.keeps = 0, keeps
        self.group: dict[int, str] = {}
        self.prepared: list[tuple[str, str]] = []
        """Group and member of each call that was made ahead."""

    # As a `Starter`.
    def start(self, pool, name):
        self.alive.add(name)
        return name

    def end(self, name, handle, *, cause):
        if cause is None:
            assert not any(call.actor == name for call, _ in self.flying.values()), "it was ended with work in hand"
        self.alive.discard(name)

    # As `Waiting`.
    def make(self, member, entry):
        assert member.state == "ready" and len(member.flying) <= self.pools[self.role(member.name)].bound
        assert not entry.alone or len(member.flying) == 1, "a suspect has company"
        member.remember(self.image(entry))
        self.refs += 1
        self.group[self.refs] = entry.id
        return self.refs, self.refs

    def ahead(self, member, entry):
        assert entry.stage in ("queued", "sampling") and entry.id not in [id for id, _ in self.prepared]
        assert member.state == "ready" and len(member.flying) == 1 and not member.reserved
        self.prepared.append((entry.id, member.name))
        return self.make(member, entry)[0]

    @staticmethod
    def image(entry):
        """Two groups each are about the same."""
        return int(entry.id.rpartition("/")[2].lstrip("g"), 36) // 2

    def add(self, ref, call):
        self.flying[ref] = (call, self.now + call.seconds)

    def gone(self, actor, cause):
        gone = {ref: call for ref, (call, _) in self.flying.items() if call.actor == actor}
        for ref in gone:
            del self.flying[ref]
        for ref, call in gone.items():
            call.then(Ended(call=call, fault="died", cause=cause))
            self.abandoned.append(Ended(call=call, result=ref))

    @staticmethod
    def role(name):
        return name.partition(" ")[0]

    # What happens.
    def answer(self, ref):
        """A call ends as it does by itself."""
        call, _ = self.flying.pop(ref)
        entry = self.ledger.entries[self.group[ref]]
        if call.actor not in self.alive:
            self.heed(Ended(call=call, fault="died", cause="was dead"))
        elif entry.id in self.poison:
            self.alive.discard(call.actor)
            self.heed(Ended(call=call, fault="died", cause="killed by it"))
        elif entry.id in self.broken:
            self.heed(Ended(call=call, fault="error", cause="broken"))
        else:
            before = entry.stage
            self.heed(Ended(call=call, result=self.keeps if call.doing == "preparing" else ref))
            if entry.stage == "scored" != before:
                self.scored[entry.id] += 1

    def heed(self, ended):
        ended.call.then(ended)
        self.check()

    def kill(self, name):
        """An actor dies with all its work, or unseen if it has none."""
        self.alive.discard(name)
        for ref in [ref for ref, (call, _) in self.flying.items() if call.actor == name]:
            if ref in self.flying:
                call, _ = self.flying.pop(ref)
                self.heed(Ended(call=call, fault="died", cause="killed"))

    def pass_time(self, seconds):
        self.now += seconds
        for ref in [ref for ref, (_, due) in self.flying.items() if due <= self.now]:
            if ref in self.flying:
                call, _ = self.flying.pop(ref)
                self.heed(Ended(call=call, fault="late", cause="hangs"))

    def come_up(self):
        """All that start are loaded and admitted."""
        for pool in self.pools.values():
            for member in pool:
                pool.has_loaded(member.name)
                pool.admit(member.name)

    def turn(self, wanted):
        """One turn of the driver."""
        for role, pool in self.pools.items():
            pool.reconcile(wanted[role])
        self.come_up()
        self.collector.dispatch()
        self.check()

    def check(self):
        """What holds at any time."""
        for pool in self.pools.values():
            for member in pool:
                assert len(member.flying) <= pool.bound
            flying = [key for member in pool for key in member.flying]
            assert len(flying) == len(set(flying))
        assert all(count == 1 for count in self.scored.values()), "a group was scored twice"

    def settle(self, wanted):
        """Without further misfortune, until all groups are closed."""
        for _ in range(50 * len(self.ledger.entries) + 50):
            if self.ledger.closed:
                return
            self.turn(wanted)
            for ref in sorted(self.flying)[:4]:
                if ref in self.flying:
                    self.answer(ref)
        raise AssertionError("groups are left open")


WANTED = {"rollout": 2, "segmenter": 3}
EVENTS = st.lists(
    st.tuples(st.sampled_from(["answer", "kill", "hang", "scale", "late", "turn"]), st.integers(0, 1 << 16)),
    max_size=80,
)


def happen(world, event, number, wanted):
    """One event of a random history."""
    flying, members = sorted(world.flying), sorted(world.alive)
    if event == "answer" and flying:
        world.answer(flying[number % len(flying)])
    elif event == "kill" and members:
        world.kill(members[number % len(members)])
    elif event == "hang":
        world.pass_time(number % 12)
    elif event == "scale":
        wanted["rollout"], wanted["segmenter"] = 1 + number % 3, 1 + number // 3 % 4
    elif event == "late" and world.abandoned:
        world.heed(world.abandoned.pop(number % len(world.abandoned)))
    world.turn(wanted)


@given(events=EVENTS, groups=st.integers(1, 12), poisoned=st.integers(0, 2), broken=st.integers(0, 1))
@settings(max_examples=300)
def test_each_group_is_scored_once_or_put_aside_for_a_cause(events, groups, poisoned, broken):
    """In any order of deaths, hangs, late answers and scalings."""
    ids = [f"g{i}" for i in range(groups)]
    world = World(ids, poison=ids[:poisoned], broken=ids[poisoned:][:broken])
    wanted = dict(WANTED)
    for event, number in events:
        happen(world, event, number, wanted)
    world.settle(wanted)
    for entry in world.ledger.entries.values():
        if entry.id in world.poison | world.broken:
            assert entry.stage == "aside" and entry.cause
        else:
            assert entry.stage == "scored" or entry.deaths > 2
            assert world.scored[entry.id] == (entry.stage == "scored")


def test_ten_thousand_groups_in_bounded_memory():
    """In steps of 100, through some thousand deaths, hangs and scalings."""
    chance = random.Random(0)
    tracemalloc.start()
    peaks = []
    deaths = scored = 0
    for step in range(100):
        tracemalloc.reset_peak()
        world = World([f"{step}/{i}" for i in range(100)], bound=8)
        wanted = dict(WANTED)
        for _ in range(200):
            event = chance.choices(["answer", "kill", "hang", "scale", "late"], [90, 5, 1, 2, 2])[0]
            deaths += event == "kill"
            happen(world, event, chance.randrange(1 << 16), wanted)
        world.settle(wanted)
        scored += sum(world.scored.values())
        peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert deaths > 500 and scored > 9_500
    assert max(peaks[50:]) < 1.5 * max(peaks[:50])


def test_what_was_merely_beside_the_culprit_is_scored():
    """Each of the poisoned group's companions is dispatched alone in the end, and lives."""
    ids = [f"g{i}" for i in range(6)]
    world = World(ids, bound=6, poison=["g3"])
    world.settle({"rollout": 1, "segmenter": 1})
    assert [entry.id for entry in world.ledger.aside] == ["g3"]
    assert world.ledger.entries["g3"].cause == "killed by it"
    assert sum(world.scored.values()) == 5


def test_an_error_is_tried_once_more_and_its_actor_lives():
    world = World(["a", "b"], broken=["a"])
    world.settle({"rollout": 1, "segmenter": 1})
    assert [entry.id for entry in world.ledger.aside] == ["a"] and world.scored == {"b": 1}


def test_what_failed_at_an_actor_is_tried_elsewhere():
    world = World(["a", "b"])
    world.turn({"rollout": 2, "segmenter": 1})
    pool = world.pools["rollout"]
    first, second = pool.ready
    for member in (first, second):
        for id, attempt in list(member.flying):
            pool.gave(member.name, id, attempt, error=member is first)
    assert pool.pick() is second
    pool.took(second, "c", 1)
    assert pool.pick() is second, "as long as it has room"


def test_actors_that_never_start_end_the_run():
    world = World(["a"])
    pool = world.pools["rollout"]
    with pytest.raises(ActorFailed, match="3 rollouts in turn did not start: no such model"):
        for _ in range(3):
            world.now += APART_S
            pool.reconcile(1)
            (member,) = pool
            pool.died(member.name, "no such model")


def test_actors_that_are_lost_with_a_node_while_they_start_end_nothing():
    """Several at once, and others that Ray places there before it notices."""
    world = World(["a"])
    pool = world.pools["rollout"]
    for _ in range(3):
        pool.reconcile(8)
        for member in pool:
            pool.died(member.name, "its node died")
    world.settle({"rollout": 1, "segmenter": 1})
    assert world.scored == {"a": 1}


def test_scaling_down_lets_work_end_first():
    world = World([f"g{i}" for i in range(8)])
    world.turn({"rollout": 2, "segmenter": 1})
    world.turn({"rollout": 1, "segmenter": 1})
    assert [member.state for member in world.pools["rollout"]].count("draining") == 1
    (leaving,) = [member for member in world.pools["rollout"] if member.state == "draining"]
    had = set(leaving.flying)
    for ref in [ref for ref, (call, _) in world.flying.items() if call.actor == leaving.name]:
        world.answer(ref)
    world.pools["rollout"].reconcile(1)
    assert leaving.name not in world.alive and all(world.ledger.entries[id].stage != "queued" for id, _ in had)


def world_of_many(groups, *, segmenters, **settings):
    """After a turn in which rollouts have taken what they have room for."""
    world = World([f"g{i}" for i in range(groups)], **settings)
    world.turn({"rollout": 2, "segmenter": segmenters})
    return world


def answer_all(world, role):
    for ref in [ref for ref, (call, _) in world.flying.items() if world.role(call.actor) == role]:
        world.answer(ref)


def test_segmenters_with_nothing_to_do_prepare_for_groups_that_are_being_sampled():
    """One image each at a time, which none was given before."""
    world = world_of_many(8, segmenters=2)
    assert world.prepared == [("g0", "segmenter 0"), ("g2", "segmenter 1")]
    world.turn({"rollout": 2, "segmenter": 2})
    assert len(world.prepared) == 2, "both are busy"
    world.now += 3.0
    answer_all(world, "segmenter")
    assert world.pools["segmenter"].worked().busy == 6.0
    world.turn({"rollout": 2, "segmenter": 2})
    assert world.prepared[2:] == [("g4", "segmenter 0"), ("g6", "segmenter 1")]
    world.settle({"rollout": 2, "segmenter": 2})
    assert len(world.prepared) == 4


def test_no_more_is_prepared_than_is_kept_until_it_is_scored():
    """Half of what a segmenter keeps, as the first one says; those that are scored make room for others."""
    world = world_of_many(40, segmenters=1, bound=6, keeps=6)
    for _ in range(9):
        answer_all(world, "segmenter")
        world.turn({"rollout": 2, "segmenter": 1})
    assert [id for id, _ in world.prepared] == ["g0", "g2", "g4"]
    answer_all(world, "rollout")
    for _ in range(9):
        world.turn({"rollout": 2, "segmenter": 1})
        answer_all(world, "segmenter")
    waiting = [id for id, _ in world.prepared if world.ledger.entries[id].stage != "scored"]
    assert len(world.prepared) > 3 and len(waiting) <= 3
    sampling, scoring = world.collector._posts.values()
    other = Collector(Ledger(["other"]), sampling, scoring, world)  # of another step
    (member,) = world.pools["segmenter"]
    assert not member.flying and len(member.prepared) == 3 and not other._keeps_more(member)
    world = world_of_many(8, segmenters=2, keeps=1)
    for _ in range(4):
        answer_all(world, "segmenter")
        world.turn({"rollout": 2, "segmenter": 2})
    assert len(world.prepared) == 2, "one each, which said that there is no room"


def test_a_group_is_scored_where_its_image_is_as_long_as_there_is_room():
    pool = Pool("segmenter", World([]), bound=2)
    pool.adopt({f"segmenter {i}": None for i in range(2)})
    first, second = pool
    second.remember("liver")

    def pick():
        return pool.pick(best=lambda member: "liver" in member.images)

    for i, expected in enumerate((second, second, first)):  # a busy one holds up nothing
        assert pick() is expected
        pool.took(expected, f"x{i}", 1)
    pool.gave(second.name, "x0", 1, error=True)
    assert pick() is first, "what failed is tried elsewhere"


def test_what_fails_ahead_puts_no_group_aside_and_is_not_tried_ahead_again():
    """One image kills a segmenter, another cannot be embedded: both are met again when their groups are scored."""
    world = world_of_many(6, segmenters=1, poison=["g0"], broken=["g2"])
    answer_all(world, "segmenter")
    assert not world.pools["segmenter"].ready and world.ledger.entries["g0"].deaths == 0
    for _ in range(20):
        world.turn({"rollout": 0, "segmenter": 1})
        answer_all(world, "segmenter")
    assert [id for id, _ in world.prepared] == ["g0", "g1", "g2", "g4"], "the other that is about the image too"
    assert all(not entry.deaths and not entry.errors for entry in world.ledger.entries.values())
    assert world.pools["segmenter"].ready[0].errors == 0


def test_a_member_is_known_to_have_the_images_that_it_was_given_last():
    member = Member(name="segmenter 0", handle=None)
    for image in ("liver", "lung", "liver", "heart"):
        member.remember(image)
    member.forget(kept=5)
    assert list(member.images) == ["lung", "liver", "heart"]
    member.forget(kept=2)
    assert list(member.images) == ["liver", "heart"]


def test_nothing_is_prepared_at_a_segmenter_that_drains():
    world = world_of_many(8, segmenters=2)
    answer_all(world, "segmenter")
    before = len(world.prepared)
    for member in world.pools["segmenter"]:
        member.state = "draining"
    world.collector.dispatch()
    assert len(world.prepared) == before
