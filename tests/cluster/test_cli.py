"""The frame of the command line: help is quick, a mistake is one line, our faults keep their traceback."""

import os
import subprocess
import sys
from pathlib import Path

from pydantic import BaseModel, ValidationError

from cluster.cli_frame import one_line

ROOT = Path(__file__).parents[2]

# A command of each kind, added to the real app in a process of its own.
FRAME = """
import sys
from pydantic import BaseModel
from cluster.cli import app, main

class Config(BaseModel):
    steps: int

@app.command()
def mistake() -> None:
    raise ValueError("the file rows.parquet is missing;\\n    write its path after `data stats`")

@app.command()
def config() -> None:
    Config.model_validate({"steps": "many"})

@app.command()
def fault() -> None:
    raise ZeroDivisionError("ours")

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
    outcome = run_python("-c", FRAME, "config")
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("error: steps: Input should be a valid integer")
    assert outcome.stderr.count("\n") == 1


def test_the_traceback_of_a_mistake_can_be_asked_for() -> None:
    outcome = run_python("-c", FRAME, "mistake", MEDREASONER_TRACEBACK="1")
    assert outcome.returncode == 1
    assert "Traceback" in outcome.stderr


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
    program = "import sys, cluster.cli; print({'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules))"
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
