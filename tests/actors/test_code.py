"""What is sent of a checkout: its text, and nothing that merely lies there."""

from pathlib import Path
from zipfile import ZipFile

import pytest

from actors.code import PACKAGE_BYTES, TEXT_BYTES, checkout, code, pack, sent_code
from tests.conftest import ROOT
from umrg.mistake import Mistake


def write(folder: Path, *names: str, content: bytes = b"x = 1\n") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_whatever_they_are_called_runs_weights_data_and_environments_are_left_out(tmp_path):
    write(tmp_path, "umrg/sample.py", "configs/mine.yaml", "my_rewards.py", "prompts/short.txt", "models/tiny.py")
    write(tmp_path, "models/tiny-expert/config.json", "models/tiny-expert/model.safetensors")
    write(tmp_path, "weights7b/config.json", "weights7b/model-00001.safetensors", "weights7b/tokenizer.json")
    write(tmp_path, "py311/pyvenv.cfg", "py311/lib/numpy/core.py", "mamba/conda-meta/history", "mamba/lib/six.py")
    write(tmp_path, "trials/a/config.yaml", "trials/a/summary.json", "trials/a/metrics.jsonl")
    write(tmp_path, "cache/CACHEDIR.TAG", "cache/note.txt", ".git/config", ".env", "umrg/__pycache__/sample.txt")
    write(tmp_path, "rows.parquet", "slices/a.png", content=b"PAR1\0\xff\xfe")
    write(tmp_path, "rows.jsonl", content=b"x" * (TEXT_BYTES + 1))
    write(tmp_path, "data/patients.csv", "patients.TSV", "more.jsonl", "more.ndjson", "docs/schemas/train.json")
    write(tmp_path, "notes/secret.txt", "notes/mine.txt")
    write(tmp_path, ".rayignore", content=b"notes/secret.txt\n")
    (tmp_path / "shared").symlink_to("/usr")
    assert sorted(code(tmp_path)) == [
        *(
            "configs/mine.yaml",
            "docs/schemas/train.json",
            "models/tiny-expert/config.json",
            "models/tiny-expert/model.safetensors",
        ),
        *("models/tiny.py", "my_rewards.py", "notes/mine.txt", "prompts/short.txt", "umrg/sample.py"),
    ]


def test_of_this_checkout_all_that_a_job_imports_and_reads_is_sent():
    assert checkout() == ROOT
    sent = code(ROOT)
    packages = (
        "umrg",
        "rewards",
        "phantoms",
        "reasoner",
        "learner",
        "actors",
        "cluster",
        "serving",
        "models",
        "deploy",
    )
    sources = {path.relative_to(ROOT).as_posix() for package in packages for path in (ROOT / package).rglob("*.py")}
    assert sources <= set(sent)
    others = {"pyproject.toml", "configs/demo.yaml", "cluster/report/base.html", "models/tiny-expert/model.safetensors"}
    assert others <= set(sent)


def test_equal_files_make_equal_archives(tmp_path):
    write(tmp_path, "a.py", "b/c.py")
    files = {"a.py": tmp_path / "a.py", "b/c.py": tmp_path / "b" / "c.py"}
    pack(files, tmp_path / "first.zip")
    (tmp_path / "a.py").touch()
    pack(dict(reversed(files.items())), tmp_path / "second.zip")
    assert (tmp_path / "first.zip").read_bytes() == (tmp_path / "second.zip").read_bytes()


def test_a_package_larger_than_ray_accepts_is_refused_with_its_largest_files(tmp_path):
    write(tmp_path, "small.py")
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate(PACKAGE_BYTES)
    with pytest.raises(Mistake, match=r"in 2 files, and Ray accepts 99\.0 MiB; .* The largest: large\.txt \(99\.0 MiB"):
        pack({"small.py": tmp_path / "small.py", "large.txt": tmp_path / "large.txt"}, tmp_path / "code.zip")


def test_a_driver_sends_its_code_to_a_cluster_that_is_there_unless_a_job_was_given_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.chdir(ROOT)
    with sent_code() as sent:
        assert sent is not None and "env_vars" not in sent
    monkeypatch.chdir(tmp_path)
    with sent_code() as sent:
        assert sent is not None and sent["env_vars"] == {"PYTHONPATH": str(tmp_path)}
        assert set(ZipFile(sent["working_dir"]).namelist()) == set(code(ROOT))
    assert not Path(sent["working_dir"]).exists()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with sent_code() as sent:
        assert sent is None
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with sent_code() as sent:
        assert sent is None
