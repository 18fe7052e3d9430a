"""Written aside, then renamed: the old one or the new one, never half of one."""

import pytest

from umrg.atomic import written_aside


def test_a_file_appears_whole(tmp_path):
    target = tmp_path / "new" / "file.txt"
    with written_aside(target) as aside:
        aside.write_text("half")
        assert not target.exists()
        aside.write_text("whole")
    assert target.read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_replaces_an_older_one(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    with written_aside(target) as aside:
        aside.mkdir()
        (aside / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"]


@pytest.mark.parametrize("folder", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path, folder):
    target = tmp_path / "kept"
    target.write_text("old")
    with pytest.raises(KeyError), written_aside(target) as aside:
        aside.mkdir() if folder else aside.write_text("half")
        raise KeyError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
