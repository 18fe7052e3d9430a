"""Where actors would sit, worked out without a cluster."""

import pytest

from cluster.placement import (
    Bundle,
    Node,
    Slot,
    alone,
    beside,
    core,
    gpus_taken,
    joined,
    largest_first,
    shortage,
    turns,
    waves,
)
from cluster.train import actors


def actor(cpus: float = 0.0, gpus: float = 0.0, role: str = "rollout", index: int = 0) -> Bundle:
    return Bundle(role=role, index=index, cpus=cpus, gpus=gpus)


@pytest.mark.parametrize(
    ("wanted", "nodes", "fits"),
    [
        ([actor(cpus=1)], [Node(cpus=2, gpus=0)], True),
        ([actor(cpus=1), actor(cpus=1)], [Node(cpus=2, gpus=0)], True),
        ([actor(cpus=1), actor(cpus=1.5)], [Node(cpus=2, gpus=0)], False),
        # Fractions of a GPU share it; they add up to one exactly.
        ([actor(gpus=0.25)] * 4, [Node(cpus=8, gpus=1)], True),
        ([actor(gpus=0.1)] * 10, [Node(cpus=8, gpus=1)], True),
        ([actor(gpus=0.25)] * 5, [Node(cpus=8, gpus=1)], False),
        # A fraction is of one GPU: what is left of two GPUs makes none.
        ([actor(gpus=0.6)] * 5, [Node(cpus=8, gpus=3)], False),
        ([actor(gpus=0.6)] * 3 + [actor(gpus=0.4)] * 3, [Node(cpus=8, gpus=3)], True),
        ([actor(gpus=0.1), actor(gpus=1)], [Node(cpus=8, gpus=1)], False),
        # One actor's GPUs must lie on one node.
        ([actor(gpus=2)], [Node(cpus=8, gpus=1), Node(cpus=8, gpus=1)], False),
        ([actor(gpus=2), actor(gpus=2)], [Node(cpus=8, gpus=2), Node(cpus=8, gpus=2)], True),
        # The large one is placed first, and the small ones fill what is left.
        ([actor(gpus=0.5), actor(gpus=0.5), actor(gpus=4)], [Node(cpus=8, gpus=4), Node(cpus=8, gpus=1)], True),
        ([actor()], [Node(cpus=0, gpus=0)], True),
    ],
)
def test_what_fits(wanted, nodes, fits):
    assert (shortage(wanted, nodes) is None) == fits


def test_what_is_missing_is_said():
    message = shortage([actor(cpus=1, gpus=1), actor(cpus=1, gpus=1, index=1)], [Node(cpus=4, gpus=1)])
    assert message is not None
    assert "2 actors need 2 CPUs and 2 GPUs" in message
    assert "the cluster has 4 and 1 on 1 node" in message
    assert "no room for rollout 1 (1 CPUs, 1 GPUs on one node)" in message
    assert "no room for rollout 0 (1 CPUs, 0.5 of one GPU)" in str(shortage([actor(1, 0.5)], [Node(cpus=4, gpus=0)]))


def test_a_bundle_asks_for_something():
    assert Slot(together=(actor(),)).resources == {"CPU": 0.001}
    assert Slot(together=(actor(cpus=0.5, gpus=0.25),)).resources == {"CPU": 0.5, "GPU": 0.25}
    assert Slot(together=(actor(cpus=2, gpus=1),) * 4).resources == {"CPU": 8, "GPU": 4}


def test_every_actor_has_a_bundle(demo_config):
    config = demo_config("rollout.actors=2", "segmenter.actors=3", "segmenter.num_gpus=0.25", "learner.ranks=2")
    wanted = [actor.bundle for actor in actors(config)]
    assert [bundle.name for bundle in wanted] == [
        *("learner 0", "learner 1"),
        *("rollout 0", "rollout 1"),
        *("segmenter 0", "segmenter 1", "segmenter 2"),
    ]
    assert [bundle.gpus for bundle in wanted] == [0, 0, 0, 0, 0.25, 0.25, 0.25]


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ({"learner": 1, "rollout": 1}, [["learner 0", "learner 1", "rollout 0", "rollout 1"]]),
        ({"learner": 0, "rollout": 0}, [["learner 0", "learner 1", "rollout 0", "rollout 1"]]),
        ({"learner": 1, "rollout": 0.9}, [["rollout 0", "rollout 1"], ["learner 0", "learner 1"]]),
        ({"learner": 0.2, "rollout": 0.4}, [["rollout 0"], ["rollout 1"], ["learner 0", "learner 1"]]),
    ],
    ids=str,
)
def test_an_engine_measures_its_gpu_before_others_fill_it(gpus, expected):
    """Engines with a part of a GPU start first, and one after another where two share one."""
    assert (
        turns([actor(gpus=gpus[role], role=role, index=i) for role in ("learner", "rollout") for i in range(2)])
        == expected
    )


def role(name: str, gpus: float, count: int) -> list[Bundle]:
    return [actor(gpus=gpus, role=name, index=i) for i in range(count)]


def test_small_shares_lie_beside_the_large_ones_whatever_the_order():
    """The published 7B set-up: eight GPUs, of which four are the learner's."""
    parts = [*role("segmenter", 0.1, 4), *role("learner", 1, 4), *role("rollout", 0.9, 4)]
    assert [bundle.role for bundle in largest_first(parts)] == ["learner"] * 4 + ["rollout"] * 4 + ["segmenter"] * 4
    taken = gpus_taken(parts)
    assert [taken[f"learner {i}"] for i in range(4)] == [[0], [1], [2], [3]]
    for name in ("rollout", "segmenter"):
        assert [taken[f"{name} {i}"] for i in range(4)] == [[4], [5], [6], [7]]


@pytest.mark.parametrize(
    ("segmenters", "engines", "idle"),
    [
        (role("segmenter", 1, 2), role("rollout", 1, 3), 2),
        (role("segmenter", 0.25, 4), role("rollout", 1, 3), 1),  # the four share one
        (role("segmenter", 0.1, 4), role("rollout", 0.9, 4), 0),
        (role("segmenter", 0, 4), role("rollout", 1, 4), 0),
    ],
)
def test_gpus_that_segmenters_have_for_themselves(segmenters, engines, idle):
    assert alone("segmenter", [*engines, *segmenters]) == idle


def parts(slots):
    return [slot.names for slot in slots]


@pytest.mark.parametrize(
    ("nodes", "asked", "each"),
    [
        ([Node(cpus=64, gpus=8)], None, 8),
        ([Node(cpus=64, gpus=8)] * 2, None, 8),
        ([Node(cpus=64, gpus=4)] * 2, None, 4),
        ([Node(cpus=64, gpus=6)] * 2, None, 4),  # as many on each
        ([Node(cpus=64, gpus=8)] * 2, 4, 2),
        ([Node(cpus=3, gpus=8)] * 3, None, 2),
        # A node that is not there yet is asked for with all its GPUs.
        ([Node(cpus=4, gpus=0)], None, 8),
        ([], None, 8),
    ],
)
def test_the_ranks_of_a_node_share_a_bundle(nodes, asked, each):
    ranks = [actor(cpus=1, gpus=1, role="learner", index=i) for i in range(8)]
    slots = core(ranks, nodes, asked=asked)
    assert [len(slot.together) for slot in slots] == [each] * (8 // each)
    assert [name for names in parts(slots) for name in names] == [rank.name for rank in ranks]


def test_a_run_begins_with_the_learner_a_rollout_and_a_segmenter():
    """The largest first; whoever else it asks for lies outside of the placement group."""
    listed = [*role("segmenter", 0.1, 4), *role("rollout", 0.9, 4), *role("learner", 1, 4)]
    assert parts(core(listed, [Node(cpus=8, gpus=8)])) == [
        ["learner 0", "learner 1", "learner 2", "learner 3"],
        ["rollout 0"],
        ["segmenter 0"],
    ]
    assert parts(core(listed[:8], [])) == [["rollout 0"], ["segmenter 0"]], "an evaluation"


def test_a_share_that_could_break_a_whole_gpu_waits_for_its_turn():
    listed = [*role("segmenter", 0.25, 2), *role("rollout", 1, 2), *role("learner", 1, 1)]
    assert parts(core(listed, [])) == [["learner 0"], ["rollout 0"]]
    assert parts(core([*role("segmenter", 0.25, 2), *role("rollout", 1, 1)], [])) == [["rollout 0"], ["segmenter 0"]]


def test_ranks_are_spread_where_that_is_asked_for_and_where_they_have_parts_of_gpus():
    node = Node(cpus=8, gpus=8)
    assert len(core(role("learner", 1, 4), [node], spread=True)) == 4
    assert len(core(role("learner", 0.75, 4), [node])) == 4


def test_whole_gpus_are_asked_for_before_shares_of_them():
    """A share that came first would break a GPU that an engine needs whole."""
    listed = [*role("segmenter", 0.25, 2), *role("rollout", 1, 2), *role("other", 0.5, 1), *role("cpu", 0, 1)]
    assert [[each.name for each in wave] for wave in waves(listed)] == [
        ["rollout 0", "rollout 1", "cpu 0"],
        ["other 0"],
        ["segmenter 0", "segmenter 1"],
    ]


def test_a_share_goes_beside_others():
    taken = {("a", "0"): 0.25, ("a", "1"): 0.5, ("b", "0"): 0.9}
    assert [beside(share, taken) for share in (0.1, 0.25, 0.6, 0.8)] == ["b", "a", "a", None]
    assert beside(0.1, {("b", "0"): 0.1 * 9}) == "b"


def test_a_shortage_names_the_labels_of_a_node():
    wanted = Bundle(role="learner", index=0, cpus=1, gpus=9, labels={"ray.io/accelerator-type": "H100"})
    assert "ray.io/accelerator-type=H100" in str(shortage([wanted], [Node(cpus=8, gpus=8)]))


COLOCATED = [*role("learner", 0.6, 4), *role("rollout", 0.3, 4), *role("segmenter", 0.1, 4)]


def test_a_rank_and_the_engine_of_its_index_share_a_bundle():
    slots = core(COLOCATED, [Node(cpus=8, gpus=4)], colocated=True)
    assert parts(slots) == [*(([f"learner {i}", f"rollout {i}"]) for i in range(4)), ["segmenter 0"]]
    assert [slot.resources for slot in slots[:4]] == [{"GPU": pytest.approx(0.9)}] * 4, "of one GPU each"
    # As a rehearsal on CPUs, too.
    rehearsal = [*role("learner", 0, 2), *role("rollout", 0, 2), *role("segmenter", 0, 1)]
    assert parts(core(rehearsal, [], colocated=True))[:2] == [["learner 0", "rollout 0"], ["learner 1", "rollout 1"]]


def test_a_pair_lies_where_both_may_lie():
    rank = Bundle(role="learner", index=0, cpus=1, gpus=0.6, labels={"a": "1"})
    engine = Bundle(role="rollout", index=0, cpus=2, gpus=0.4, labels={"b": "2"})
    (slot,) = core([engine, rank], [], colocated=True)
    assert slot.whole == Bundle(role="learner", index=0, cpus=3, gpus=1.0, labels={"a": "1", "b": "2"})


def test_pairs_have_a_gpu_each_and_segmenters_lie_beside_them():
    taken = gpus_taken(COLOCATED, colocated=True)
    assert [taken[f"{name} {i}"] for name in ("learner", "rollout") for i in range(4)] == [[0], [1], [2], [3]] * 2
    assert [taken[f"segmenter {i}"] for i in range(4)] == [[0], [1], [2], [3]]
    assert alone("segmenter", COLOCATED, colocated=True) == 0


def test_what_pairs_lack_is_said():
    two = [*role("learner", 0.6, 2), *role("rollout", 0.4, 2)]
    assert shortage(joined(two, colocated=True), [Node(cpus=8, gpus=2)]) is None
    assert "no room for learner 1" in str(shortage(joined(two, colocated=True), [Node(cpus=8, gpus=1)]))


def test_engines_of_pairs_start_before_ranks_and_together():
    engines, others = turns(COLOCATED, colocated=True)
    assert engines == [f"rollout {i}" for i in range(4)] and "learner 0" in others and "segmenter 3" in others
    rehearsal = [*role("learner", 0, 2), *role("rollout", 0, 2)]
    assert turns(rehearsal, colocated=True) == [["rollout 0", "rollout 1"], ["learner 0", "learner 1"]]
