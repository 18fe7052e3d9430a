"""The frame of the command line: help is quick, a mistake is one line, our faults keep their traceback."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from cluster.cli import app, one_line, refusal, run_command
from phantoms import rows
from umrg.dataset_writer import write_rows

ROOT = Path(__file__).parents[2]

# A command of each kind, added to the real app in a process of its own.
FRAME = """
import sys
from pydantic import BaseModel
from cluster.cli import app, main
from umrg.mistake import Mistake

class Config(BaseModel):
    steps: int

@app.command()
def mistake() -> None:
    raise Mistake("the file rows.parquet is missing;\\n    write its path after `data stats`")

@app.command()
def malformed() -> None:
    Config.model_validate({"steps": "many"})

@app.command()
def fault() -> None:
    raise ZeroDivisionError("ours")

@app.command()
def library() -> None:
    int("many")

main()
"""


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_users_mistake_is_one_line_and_exit_code_2() -> None:
    outcome = run_python("-c", FRAME, "mistake")
    assert outcome.returncode == 2
    assert outcome.stdout == ""
    assert outcome.stderr == "error: the file rows.parquet is missing; write its path after `data stats`\n"


def test_a_config_mistake_is_one_line_naming_the_key() -> None:
    outcome = run_python("-c", FRAME, "malformed")
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("error: steps: Input should be a valid integer")
    assert outcome.stderr.count("\n") == 1


def test_the_traceback_of_a_mistake_can_be_asked_for() -> None:
    outcome = run_python("-c", FRAME, "mistake", MEDREASONER_TRACEBACK="1")
    assert outcome.returncode == 1
    assert "Traceback" in outcome.stderr


def test_a_librarys_value_error_is_no_mistake_of_the_users() -> None:
    outcome = run_python("-c", FRAME, "library")
    assert outcome.returncode == 1
    assert "Traceback" in outcome.stderr and "invalid literal for int()" in outcome.stderr


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    outcome = run_python("-c", FRAME, "fault")
    assert outcome.returncode == 1
    assert "Traceback" in outcome.stderr
    assert "ZeroDivisionError: ours" in outcome.stderr


def test_an_unknown_command_exits_with_2() -> None:
    outcome = run_python("-m", "cluster.cli", "trian")
    assert outcome.returncode == 2
    assert "trian" in outcome.stderr


def test_help_loads_none_of_the_heavy_libraries() -> None:
    heavy = "{'torch', 'ray', 'vllm', 'transformers', 'deepspeed', 'matplotlib'}"
    program = f"import sys, cluster.cli; print({heavy} & set(sys.modules))"
    assert run_python("-c", program).stdout == "set()\n"
    outcome = run_python("-m", "cluster.cli", "--help")
    assert outcome.returncode == 0
    assert "doctor" in outcome.stdout


def test_every_fault_of_a_config_is_named() -> None:
    class Config(BaseModel):
        steps: int
        lr: float

    try:
        Config.model_validate({"steps": "many"})
    except ValidationError as error:
        line = one_line(error)
    assert line.startswith("steps: ")
    assert "; lr: Field required" in line


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    write_rows(path, rows(6, seed=1, modalities=["CT"]))
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from tests.cluster.test_checkpoints import save

    folder = tmp_path_factory.mktemp("run")
    save(folder / "checkpoints", 10)
    return str(folder)


def outcome(*arguments: str) -> int:
    """Exit code of a command in this process, whose signals stay as they are."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            run_command(lambda: app(arguments))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert isinstance(ended.value.code, int)
    return ended.value.code


WRITERS = {
    "phantoms": ("data", "phantoms", "{out}/a.parquet", "--count", "2"),
    "stats": ("data", "stats", "{data}", "--out", "{out}/a"),
    "split": ("data", "split", "{data}", "--by", "category", "--out", "{out}/a"),
    "check": ("data", "check", "{data}", "--out", "{out}/a"),
    "clean": ("data", "check", "{data}", "--clean", "{out}/a.parquet"),
    "export": ("export", "{run}", "--out", "{out}/a"),
    "train": ("train", "configs/demo.yaml", "runs={out}/a"),
    "sft": ("sft", "configs/tiny_reasoner_sft.yaml", "model=models/tiny-reasoner", "data.train={data}", "runs={out}/a"),
    "evaluate": ("evaluate", "model=models/tiny-reasoner", "data.eval={data}", "expert=tiny", "name=x", "runs={out}/a"),
}


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize(("out", "why"), [("/proc/x", "No such file"), ("{tmp}/file", "File exists|Not a directory")])
def test_what_cannot_be_written_is_one_line(tmp_path, monkeypatch, capfd, data, run, command, out, why):
    monkeypatch.chdir(ROOT)
    (tmp_path / "file").touch()
    out = out.format(tmp=tmp_path)
    assert outcome(*(word.format(out=out, data=data, run=run) for word in WRITERS[command])) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    path, reason = line.removeprefix("error: ").split(": ")
    assert path.startswith(out) and any(each in reason for each in why.split("|")) and "; " in reason
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EACCES, "get the right to it"),
        (errno.EPERM, "get the right to it"),
        (errno.EROFS, "give a path that can be written to"),
        (errno.ENOSPC, "make room there"),
        (errno.EDQUOT, "make room there"),
        (errno.ENAMETOOLONG, "give a shorter name"),
        (errno.EISDIR, "a folder is in the way"),
    ],
)
def test_what_a_user_can_mend_says_how(number, advice):
    line = refusal(OSError(number, "", "/data/a\nb"))
    assert line is not None and line.startswith(f"/data/a b: {os.strerror(number)}; ") and advice in line


@pytest.mark.parametrize(
    "error",
    [ConnectionRefusedError(errno.ECONNREFUSED, "refused"), OSError(errno.EIO, "", "/data/a"), TimeoutError("late")],
)
def test_what_a_user_cannot_mend_passes_through(error):
    assert refusal(error) is None


@pytest.mark.parametrize("words", [("report", "runs/x"), ("compare", "a", "b")])
def test_pages_are_written_without_torch_and_ray(words):
    program = (
        "import sys; from cluster.cli import app, run_command\n"
        "try: run_command(lambda: app(sys.argv[1:]))\n"
        "except SystemExit as ended: print(ended.code, {'torch', 'ray'} & set(sys.modules))"
    )
    assert run_python("-c", program, *words).stdout == "2 set()\n"
