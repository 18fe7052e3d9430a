"""docs/cluster.md: what it names is there."""

import re

import pytest

from cluster.config import TrainConfig, load_config
from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "cluster.md").read_text()


def anchors(text):
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\b(?:deploy|configs)/[\w./-]*\w", TEXT))))
def test_files_that_are_named_are_there(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(
    "file", [path for path in (ROOT / "deploy").rglob("*") if path.is_file()], ids=lambda p: p.name
)
def test_files_name_sections_that_are_there(file):
    for anchor in re.findall(r"docs/cluster\.md#([\w-]+\w)", file.read_text()):
        assert anchor in anchors(TEXT)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)]+)\)", TEXT))))
def test_links_lead_somewhere(link):
    file, _, anchor = link.partition("#")
    text = (ROOT / "docs" / file).read_text() if file else TEXT
    assert not anchor or anchor in anchors(text)


def test_the_keys_of_the_recipes_are_keys_of_the_configuration():
    keys = set(re.findall(r"\b((?:rollout|learner|segmenter|deadlines)\.[\w.-]+=[\w-]+)", TEXT))
    assert len(keys) >= 10
    for key in keys - {"segmenter.checkpoint=", "learner.nodes=2"}:
        load_config(TrainConfig, ROOT / "configs" / "lingshu_7b_soft.yaml", [key])
    load_config(TrainConfig, ROOT / "configs" / "lingshu_7b_soft.yaml", ["learner.ranks=8", "learner.nodes=2"])
