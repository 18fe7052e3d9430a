"""The weights that configurations, manifests and pages name are those of the expert that they select."""

import re

import pytest
import yaml

from tests.conftest import ROOT

CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if "safetensors" in path.read_text()]
PLACES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "deploy").rglob("*.yaml"))]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_names_the_weights_of_its_expert(path):
    config = yaml.safe_load(path.read_text())
    assert config["segmenter"]["checkpoint"] == f"weights/{config['expert']}.safetensors"


def test_commands_and_manifests_give_the_7b_configurations_weights_of_their_expert():
    expert = yaml.safe_load((ROOT / "configs" / "lingshu_7b_soft.yaml").read_text())["expert"]
    named = [
        weights
        for path in PLACES
        for weights in re.findall(r"checkpoint(?:=|: )/shared/([\w.+-]+)\.safetensors", path.read_text())
    ]
    assert len(named) >= 6 and set(named) == {expert}
