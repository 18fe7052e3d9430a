"""The doctor: each check alone, and the whole of it on this machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.commands.doctor import run_probe
from cluster.commands.doctor_result import check_amount
from cluster.commands.doctor_versions import check_python, check_versions, read_constraints

ROOT = Path(__file__).parents[3]


def test_a_wrong_version_fails_and_says_how_to_mend_it() -> None:
    tested = {"torch": "2.13.0", "ray": "2.60.0"}
    wrong, right, others = check_versions(tested, {"torch": "2.12.1+cpu", "ray": "2.60.0"})
    assert (wrong.name, wrong.status, wrong.detail) == ("torch", "fail", "2.12.1+cpu, tested 2.13.0")
    assert wrong.mend == "Run `make clean setup` to install the tested set again."
    assert (right.status, right.mend) == ("ok", "")
    assert others.status == "ok"


def test_a_missing_core_package_fails() -> None:
    finding, _ = check_versions({"ray": "2.60.0"}, {})
    assert (finding.status, finding.detail) == ("fail", "missing, tested 2.60.0")


def test_a_difference_beside_the_core_is_a_remark_and_an_absence_is_none() -> None:
    tested = {"rich": "15.0.0", "torchaudio": "2.11.0"}
    (finding,) = check_versions(tested, {"rich": "14.0.0"})
    assert finding.status == "remark"
    assert "rich 14.0.0 (tested 15.0.0)" in finding.detail
    assert "torchaudio" not in finding.detail


def test_a_local_label_of_the_version_is_no_difference() -> None:
    finding, _ = check_versions({"torch": "2.13.0"}, {"torch": "2.13.0+cpu"})
    assert finding.status == "ok"


def test_names_are_compared_as_the_index_does(tmp_path: Path) -> None:
    constraints = tmp_path / "cpu.txt"
    constraints.write_text("# tested\nsegment_anything==1.0\nPyYAML==6.0.3\n\n")
    assert read_constraints(constraints) == {"segment-anything": "1.0", "pyyaml": "6.0.3"}


@pytest.mark.parametrize(
    ("version", "status"),
    [((3, 10, 9), "fail"), ((3, 11, 0), "ok"), ((3, 12, 4), "ok"), ((3, 13, 0), "fail")],
)
def test_python_is_3_11_or_3_12(version: tuple[int, int, int], status: str) -> None:
    assert check_python(version).status == status


@pytest.mark.parametrize(("amount", "status"), [(0.06, "fail"), (1.0, "remark"), (2.0, "ok")])
def test_too_little_of_something(amount: float, status: str) -> None:
    finding = check_amount("shared memory", amount, need=0.25, wish=2, unit="GiB", mend="Enlarge /dev/shm.")
    assert finding.status == status
    assert bool(finding.mend) == (status != "ok")


def test_a_probe_that_raises_is_a_finding_naming_the_exception() -> None:
    program = "raise OSError('libc10_cuda.so: cannot open [shared] file')"
    finding = run_probe("vllm", [sys.executable, "-c", program], deadline_s=60)
    assert finding.status == "fail"
    assert finding.detail == "OSError: libc10_cuda.so: cannot open [shared] file (exit code 1)"
    assert "torchaudio" in finding.mend


def test_a_probe_that_misses_the_driver_says_how_to_get_it() -> None:
    program = "raise ImportError('libcuda.so.1: cannot open shared object file')"
    assert "--gpus all" in run_probe("vllm", [sys.executable, "-c", program], deadline_s=60).mend


def test_a_probe_that_crashes_is_a_finding() -> None:
    finding = run_probe("torch", [sys.executable, "-c", "import os; os.abort()"], deadline_s=60)
    assert finding.status == "fail"
    assert "signal 6" in finding.detail


def test_a_probe_that_hangs_is_a_finding() -> None:
    finding = run_probe("ray", [sys.executable, "-c", "import time; time.sleep(600)"], deadline_s=0.5)
    assert (finding.status, finding.detail) == ("fail", "no answer within 0.5 s")


def test_a_probe_that_says_nothing_has_failed() -> None:
    assert run_probe("torch", [sys.executable, "-c", "pass"], deadline_s=60).status == "fail"


def test_the_doctor_is_green_on_this_machine() -> None:
    command = [sys.executable, "-m", "cluster.cli", "doctor", "--json"]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    findings = {finding["name"]: finding for finding in json.loads(outcome.stdout)}
    assert [finding for finding in findings.values() if finding["status"] == "fail"] == []
    assert outcome.returncode == 0
    assert findings["ray works"]["detail"] == "a local cluster starts and runs a task"
    assert all(finding["mend"] for finding in findings.values() if finding["status"] != "ok")
