"""Help texts: an example beneath each, which the command line understands; exit codes; what a shell completes."""

import re
import shlex
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from cluster.cli import app
from tests.conftest import ROOT

RUNNER = CliRunner()


def commands(command: Any, name: str = "") -> dict[str, Any]:
    """All commands that do something, by their words, and those above them."""
    beneath = getattr(command, "commands", {})
    found = {} if beneath else {name: command}
    for word, each in beneath.items():
        found |= commands(each, f"{name} {word}".strip())
    return found


COMMANDS = commands(typer.main.get_command(app))


def examples(name: str) -> list[str]:
    """Those beneath a command's help text."""
    lines = COMMANDS[name].epilog.splitlines()
    return [line[2:].replace("\\[", "[") for line in lines if line.startswith("$ ")]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_text_has_examples_that_are_understood(name):
    result = RUNNER.invoke(app, [*name.split(), "--help"], catch_exceptions=False)
    assert result.exit_code == 0 and "Examples" in result.output
    assert examples(name) and all(example.startswith(f"medreasoner {name}") for example in examples(name))
    for example in examples(name):
        words = shlex.split(example)[1 + len(name.split()) :]
        COMMANDS[name].make_context(name, words)  # raises where an option or argument is not known


def test_an_example_with_another_option_is_not_understood():
    with pytest.raises(Exception, match="No such option"):
        COMMANDS["report"].make_context("report", ["runs/demo", "--output", "a.html"])


def test_one_option_has_one_meaning():
    """And one help text; those that differ say so here."""
    said: dict[str, set[str]] = {}
    for command in COMMANDS.values():
        for parameter in command.params:
            for option in getattr(parameter, "opts", ()):
                if option.startswith("--"):
                    said.setdefault(option, set()).add(parameter.help or "")
    several = {option for option, texts in said.items() if len(texts) > 1}
    assert several <= {"--out", "--model", "--name", "--expert", "--checkpoint", "--gpu", "--modality"}


def test_exit_codes_are_told_in_the_help_and_in_one_place_of_the_docs():
    told = RUNNER.invoke(app, ["--help"], catch_exceptions=False).output
    codes = re.findall(r"^ (\d+) +\w", told[told.index("Exit codes") :], re.MULTILINE)
    documented = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert codes == ["0", "1", "2", "130"] == re.findall(r"^\| (\d+) \|", documented, re.MULTILINE)


def test_the_docs_list_every_command():
    listed = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"`medreasoner {name}" not in listed] == []


def completed(line: str) -> list[str]:
    """What a shell offers for the last word of a line."""
    words = line.split(" ")
    environment = {"_MEDREASONER_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    return RUNNER.invoke(app, prog_name="medreasoner", env=environment, catch_exceptions=False).output.split()


def test_keys_files_and_runs_are_completed(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert "configs/demo.yaml" in completed("medreasoner train configs/d")
    assert completed("medreasoner train configs/demo.yaml learner.lora.r") == ["learner.lora.rank="]
    assert completed("medreasoner memory configs/tiny_reasoner_sft.yaml pat") == ["patience="]
    assert completed("medreasoner evaluate configs/evaluate_demo.yaml data.se") == ["data.seen="]
    assert "learner.lr" in completed("medreasoner config learner.l")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "config.yaml").touch()
    for command in ("report", "compare", "export", "scale"):
        assert completed(f"medreasoner {command} ") == ["runs/demo"]
    assert completed("medreasoner train missing.yaml learner.lora.r") == ["learner.lora.rank="]
