"""`medreasoner key`: a key for a client, shown once, and its digest for the service."""

import hashlib

import pytest
from typer.testing import CliRunner, Result

from cluster.cli import app
from serving.keys import Doorkeeper, parse_keys, read_keys
from umrg.mistake import Mistake


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["key", *words], catch_exceptions=False)


def refused(*words: str) -> str:
    with pytest.raises(Mistake) as mistake:
        run(*words)
    return str(mistake.value)


def test_the_key_alone_goes_to_standard_output_and_opens_the_door(tmp_path):
    file = tmp_path / "new" / "keys.yaml"
    result = run("viewer", "--file", str(file))
    assert result.exit_code == 0
    (secret,) = result.stdout.splitlines()
    assert secret not in file.read_text() and secret not in result.stderr
    with Doorkeeper(read_keys(file)).admit(f"Bearer {secret}") as owner:
        assert owner == "viewer"


def test_without_a_file_the_entry_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("viewer")
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("- "))
    (key,) = parse_keys(line, "the entry")
    assert (key.name, key.sha256) == ("viewer", hashlib.sha256(result.stdout.strip().encode()).hexdigest())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", ["", "\n"])
def test_what_is_in_the_file_stays_as_it_is(tmp_path, end):
    file = tmp_path / "keys.yaml"
    before = f"# of the ward\n- name: anna\n  sha256: {'a' * 64}  # until June{end}"
    file.write_text(before)
    file.chmod(0o600)
    for name in ("on", "1", "null"):  # which YAML would read as something else
        assert run(name, "--file", str(file)).exit_code == 0
    assert file.read_text().startswith(before) and file.stat().st_mode & 0o777 == 0o600
    assert [key.name for key in read_keys(file)] == ["anna", "on", "1", "null"]


def test_an_empty_file_gets_its_first_key(tmp_path):
    file = tmp_path / "keys.yaml"
    file.touch()
    run("viewer", "--file", str(file))
    assert [key.name for key in read_keys(file)] == ["viewer"]


@pytest.mark.parametrize("content", [f"- {{name: anna, sha256: {'a' * 64}}}\n", "{no: list}\n", "[]\n", "- [\n"])
def test_a_second_key_of_a_name_and_a_file_of_another_kind_are_refused(tmp_path, content):
    file = tmp_path / "keys.yaml"
    file.write_text(content)
    assert str(file) in refused("anna", "--file", str(file))
    assert file.read_text() == content


@pytest.mark.parametrize("name", ["", "two words", "a/b", "*", "x" * 65, "zoë"])
def test_what_is_no_name_is_refused(name):
    assert "letters, digits" in refused(name)
