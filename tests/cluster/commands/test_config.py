"""What the configuration says of itself: documented keys, files that are made from them, and where a key is used."""

import json

import pytest
import yaml
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from cluster.cli import app
from cluster.commands.config import SCHEMAS, all_keys, generated, uses
from tests.conftest import ROOT


def printed(*arguments):
    result = CliRunner().invoke(app, ["config", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_brackets_are_printed_as_they_are():
    assert "TrackerProcess(name, [python, " in printed("trackers")


def test_every_key_is_documented():
    undocumented = [
        name
        for name, found in all_keys().items()
        for key in found.values()
        if not key.field.description and not (key.section and key.section.__doc__)
    ]
    assert undocumented == []


@pytest.mark.parametrize("path", [path for path, _ in generated()], ids=lambda path: path.name)
def test_the_files_made_from_the_fields_are_true(path):
    assert path.read_text(encoding="utf-8") == dict(generated())[path], "run python -m cluster.commands.config"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_configs_fit_the_schema_that_they_name(path):
    first, *_ = path.read_text().splitlines()
    schema = json.loads((path.parent / first.partition("$schema=")[2]).read_text())
    assert list(Draft202012Validator(schema).iter_errors(yaml.safe_load(path.read_text()))) == []


def test_a_key_is_explained():
    text = printed("learner.micro_batch_tokens")
    assert "the longest prompt with its longest answer must fit" in text
    assert "train     integer > 0, default: 4096; may change on resume" in text
    assert "learner/grpo.py:" in text and "cluster/config.py:" in text


def test_a_section_lists_its_keys_and_a_list_of_all_has_each():
    assert "learner.objective.clip_high" in printed("learner.objective")
    listed = printed()
    assert all(key in listed for key in ("rollout.n", "data.eval", "endpoint.url"))


def test_an_unknown_key_is_answered_with_those_that_end_alike():
    with pytest.raises(ValueError, match=r"did you mean learner\.lr\?"):
        printed("lr")


def test_uses_are_told_apart_by_type():
    """Engine and expert both have a dtype, read from something called `config`."""
    files = {
        name: {use.partition(":")[0] for use in uses(all_keys()[name]["train"])}
        for name in ("rollout.dtype", "segmenter.dtype")
    }
    assert "actors/engine.py" in files["rollout.dtype"] and "actors/engine.py" not in files["segmenter.dtype"]
    assert "actors/experts/drawing.py" in files["segmenter.dtype"]


def test_every_key_is_seen_to_be_used():
    """Otherwise it would be a key without effect."""
    unseen = {name for name, found in all_keys().items() if not any(uses(key) for key in found.values())}
    assert unseen <= UNSEEN, unseen - UNSEEN


UNSEEN = {"staleness"}
"""Only its validator reads it: anything but 0 is refused."""


def test_what_a_class_method_of_a_model_returns_is_followed():
    """`config = ServeConfig.model_validate(args)`"""
    assert any(use.startswith("serving/app.py:") for use in uses(all_keys()["segmenter.num_cpus"]["serve"]))


def test_a_section_may_have_defaults_of_its_own():
    assert "default: its keys' defaults, but num_cpus 0.1 if the section is not given" in printed("segmenter")


def test_schemas_are_named_by_their_commands():
    assert set(SCHEMAS) == {"train", "evaluate", "sft", "serve"}
