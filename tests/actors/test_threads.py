"""The cores that a process may use."""

import os

import pytest

from actors.threads import cores

MANY = float(len(os.sched_getaffinity(0)))


@pytest.mark.parametrize(
    ("told", "files", "share"),
    [
        ("0::/job/actor", {"job/cpu.max": "max 100000", "job/actor/cpu.max": "100000 100000"}, 1.0),
        ("0::/job/actor", {"job/cpu.max": "110000 100000", "job/actor/cpu.max": "max 100000"}, 1.1),
        ("0::/of/the/host", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {}, MANY),
        (
            "3:cpu,cpuacct:/job",
            {f"cpu,cpuacct/job/cpu.cfs_{k}_us": v for k, v in (("quota", "120000"), ("period", "100000"))},
            1.2,
        ),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, MANY),
        ("4:memory:/job", {"memory/job/cpu.max": "100000 100000"}, MANY),
        ("0::/", {"cpu.max": "20000 100000"}, 1.0),  # a fifth of a core still makes a thread
    ],
)
def test_a_containers_quota_bounds_its_cores(tmp_path, told, files, share):
    """As cgroups tell of it, version 2 and version 1, also where the process is told the host's path."""
    process = tmp_path / "cgroup"
    process.write_text(told + "\n")
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    assert cores(process, tmp_path / "fs") == min(share, MANY)


def test_without_cgroups_its_cores_are_those_that_it_is_bound_to(tmp_path):
    assert cores(tmp_path / "nothing", tmp_path) == MANY
