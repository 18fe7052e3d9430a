"""Written aside, then renamed: the old one or the new one, never half of one."""

import errno
import shutil

import pytest

from umrg.atomic import named, written_aside


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


def test_a_full_disk_is_named_by_the_file_that_was_to_be_written(tmp_path):
    target = tmp_path / "file.txt"
    with pytest.raises(OSError, match="No space left on device") as refusal, written_aside(target) as aside:
        aside.write_text("half")
        with open("/dev/full", "w") as full:
            full.write("more")
    assert (refusal.value.errno, refusal.value.filename) == (errno.ENOSPC, str(target))
    assert list(tmp_path.iterdir()) == []


def test_the_file_in_a_folder_is_named_and_not_where_it_lies_aside(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(OSError, match=r"model/weights'$"), written_aside(target) as aside:
        aside.mkdir()
        (aside / "weights").mkdir()
        (aside / "weights").write_text("")
    with pytest.raises(OSError, match=r"model/config.json'$"), written_aside(target) as aside:
        aside.mkdir()
        (aside / "config.json").mkdir()
        shutil.copyfile(__file__, aside / "config.json")
    assert list(tmp_path.iterdir()) == []


def test_other_names_stay(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing'$"), named(tmp_path / "file"):
        (tmp_path / "nothing").read_text()


def test_a_folder_is_no_place_for_a_file(tmp_path):
    (tmp_path / "kept").mkdir()
    with pytest.raises(IsADirectoryError, match=r"kept'$"), written_aside(tmp_path / "kept") as aside:
        aside.write_text("a file")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_name_that_is_too_long_for_aside_is_refused_as_itself(tmp_path):
    target = tmp_path / ("n" * 250)
    with pytest.raises(OSError, match=r"File name too long.*n'$"), written_aside(target) as aside:
        aside.write_text("")
    assert list(tmp_path.iterdir()) == []
