"""What differs between two processes, in words."""

from dataclasses import replace
from pathlib import Path

import pytest

from actors.build import OURS, Build, digest_of, this_build
from actors.code import TEXT_BYTES, code

HERE = Build(versions={"Python": "3.11.7", "vLLM": "0.32.0"}, code="ab" * 32, folder="/here")


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (HERE, None),
        (replace(HERE, folder="/there"), None),
        (replace(HERE, versions={"Python": "3.11.7", "vLLM": "0.31.0"}), "vLLM 0.31.0, and the driver 0.32.0"),
        (replace(HERE, versions={"Python": "3.12.1", "vLLM": "0.32.0"}), "Python 3.12.1, and the driver 3.11.7"),
        (replace(HERE, versions={"Python": "3.11.7", "vLLM": "none"}), "vLLM none, and the driver 0.32.0"),
        (
            replace(HERE, code="cd" * 32, folder="/there"),
            f"other code of medreasoner (digest {'cd' * 6} in /there) than the driver ({'ab' * 6} in /here)",
        ),
    ],
)
def test_what_differs(there, said):
    assert there.unlike(HERE) == said


def test_this_build_is_what_is_installed():
    found = this_build()
    assert all(version[0].isdigit() and "+" not in version for version in found.versions.values()), found
    assert found.code == digest_of(Path(found.folder), OURS)


def test_the_digest_is_of_all_our_code_and_of_nothing_else(tmp_path):
    (tmp_path / "actors" / "experts").mkdir(parents=True)
    (tmp_path / "actors" / "experts" / "sam.py").write_text("x = 1\n")
    before = digest_of(tmp_path, OURS)
    (tmp_path / "actors" / "notes.txt").write_text("none of it")
    (tmp_path / "mine.py").write_text("x = 2\n")
    assert digest_of(tmp_path, OURS) == before
    (tmp_path / "actors" / "experts" / "sam.py").write_text("x = 3\n")
    assert digest_of(tmp_path, OURS) != before


def test_the_digest_is_the_same_where_the_code_was_sent_to(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    large = "# " + "x" * TEXT_BYTES
    own = {"actors/a.py": "", "cluster/b/c.py": "", "actors/._a.py": "", "cluster/.ipynb_checkpoints/c.py": ""}
    for name, text in (own | {"cluster/mine.py": "", "actors/large.py": large, ".gitignore": "mine.py\n"}).items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(text)
    for name, path in code(here).items():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(path.read_bytes())
    assert (there / "cluster/b/c.py").exists() and digest_of(there, OURS) == digest_of(here, OURS)
