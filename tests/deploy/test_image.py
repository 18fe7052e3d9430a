"""The image of all nodes: its Dockerfile is read, not built, as no test may need Docker."""

import ast
import fnmatch
import re
import sys

import pytest
import yaml

from tests.conftest import ROOT
from tests.deploy.manifests import NAMES, cluster_of, head, workers

DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
HOME = "/opt/medreasoner"


def instructions():
    """Name and arguments of each, lines that go on joined, and comments left out."""
    lines = [line for line in DOCKERFILE.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines()]


def position(name, pattern):
    (found,) = [i for i, (each, text) in enumerate(instructions()) if each == name and re.search(pattern, text)]
    return found


def copied(text):
    """Sources of a COPY."""
    return [part for part in text.split() if not part.startswith("--")][:-1]


def test_every_instruction_is_one_of_docker():
    assert {name for name, _ in instructions()} == {"FROM", "RUN", "WORKDIR", "ENV", "USER", "COPY", "ARG", "CMD"}
    assert "://" not in DOCKERFILE, "it names no index: TORCH_INDEX is given when it is built"


def test_one_base_with_its_version():
    (base,) = [text for name, text in instructions() if name == "FROM"]
    (version,) = re.findall(r"^python:(\d+\.\d+)\.\d+-slim-\w+$", base)
    assert version in ("3.11", "3.12"), "those of pyproject.toml"
    assert f"PYTHON=python{version}" in DOCKERFILE


def test_packages_come_from_the_makefile_alone():
    """What `make setup` installs on a machine, CPU or GPU, it installs in the image."""
    runs = [text for name, text in instructions() if name == "RUN"]
    assert any(text.startswith("make setup EXTRA=$EXTRA ") for text in runs)
    assert not any(re.search(r"\b(pip|uv|conda|venv)\b", text.replace("/.venv/", "/")) for text in runs)
    assert position("ARG", "^EXTRA") < position("RUN", "make setup")


def test_a_change_of_the_code_installs_nothing_anew():
    """Before `make setup` comes what it reads, and everything else after it."""
    at = position("RUN", "make setup")
    before = [source for name, text in instructions()[:at] if name == "COPY" for source in copied(text)]
    makefile = (ROOT / "Makefile").read_text()
    assert "$(STAMP): pyproject.toml $(wildcard constraints/*.txt)" in makefile
    modules = re.findall(r"\$\(BIN\)/python -m (\S+)\n", makefile[: makefile.index("\ndemo:")])
    assert modules == ["cluster.commands.torchvision_shim"]
    packages = ["cluster/__init__.py", "cluster/commands/__init__.py", "cluster/commands/torchvision_shim.py"]
    assert sorted(before) == sorted(["Makefile", "pyproject.toml", "constraints", "LICENSE", *packages])
    assert all((ROOT / source).exists() for source in before)
    assert position("COPY", r" \. \.$") > at


def test_the_shim_needs_nothing_else_of_the_code():
    tree = ast.parse((ROOT / "cluster/commands/torchvision_shim.py").read_text())
    imported = {
        str(node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert imported <= sys.stdlib_module_names | {"torch", "torchvision"}


def test_it_is_not_roots():
    last = [text for name, text in instructions() if name == "USER"][-1]
    assert last == "medreasoner" and position("USER", "medreasoner") < position("RUN", "make setup")
    (uid,) = map(int, re.findall(r"--uid (\d+)", DOCKERFILE))
    for name in NAMES:
        if cluster_of(name):
            for pod in (head(name), *workers(name)):
                assert pod.spec["securityContext"]["runAsUser"] == uid


def test_commands_are_found_in_every_shell():
    """`ray up` runs login shells, KubeRay others."""
    assert ("ENV", f"PATH={HOME}/.venv/bin:$PATH") in instructions()
    assert re.search(rf"export PATH={HOME}/.venv/bin:\$PATH' > /etc/profile.d/\w+.sh", DOCKERFILE)
    assert dict(instructions())["WORKDIR"] == HOME, "where a job's entrypoint finds configs/"


@pytest.mark.parametrize("line", (ROOT / ".gitignore").read_text().split())
def test_what_git_ignores_is_not_sent_to_docker(line):
    left_out = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().split()
    name = line.strip("/")
    assert any(fnmatch.fnmatch(name, pattern.removeprefix("**/")) for pattern in left_out)


def test_all_manifests_have_one_image():
    images = {pod.ray["image"] for name in NAMES if cluster_of(name) for pod in (head(name), *workers(name))}
    up = yaml.safe_load((ROOT / "deploy" / "ray-up.yaml").read_text())
    assert images == {up["docker"]["image"]} == {"registry.example.org/medreasoner:gpu"}
