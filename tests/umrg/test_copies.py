"""Copies of what is elsewhere: once, whole, checked; and what is said where one cannot be made."""

import fcntl
from pathlib import Path

import pytest

from tests.s3 import serving
from umrg.config import uri, written
from umrg.copies import Cache, Contents, here
from umrg.durable import Damaged
from umrg.mistake import Mistake
from umrg.remote import Remote


@pytest.fixture(autouse=True)
def credentials(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-the-tests")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "there" / "model"
    (folder / "more").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "more" / "weights").write_bytes(bytes(range(256)) * 1000)
    (folder / ".git").mkdir()
    (folder / ".git" / "history").write_text("much")
    return folder


def held(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def quiet(_line: str) -> None:
    pass


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("s3://bucket/model", "s3://bucket/model"),
        ("s3://bucket/model?region=x&scheme=http", "s3://bucket/model?region=x&scheme=http"),
        ("file:///data/rows.parquet", "file:///data/rows.parquet"),
        ("https://example.org/rows.parquet", "https://example.org/rows.parquet"),
        ("/data/s3:/rows.parquet", None),
        ("weights/Lingshu-7B", None),
        ("tiny", None),
    ],
)
def test_a_uri_is_known_though_it_was_read_as_a_path(text, found):
    assert uri(text) == found and uri(Path(text)) == found and written(Path(text)) == text


@pytest.mark.parametrize("scheme", ["s3", "file"])
def test_a_folder_is_copied_once_and_again_when_it_has_changed(tmp_path, model, scheme):
    cache = Cache(tmp_path / "cache")
    with serving(model.parent) as bucket:
        source = Path(bucket.uri("model") if scheme == "s3" else f"file://{model}")
        copy = here(source, cache, quiet)
        assert held(copy) == {name: data for name, data in held(model).items() if not name.startswith(".git")}
        read = len(bucket.read)
        assert here(source, cache, quiet) == copy and len(bucket.read) == read
        assert cache.source(copy) == written(source)
        assert copy.parent.name == Contents.of(model).digest, "the copy of a folder is found by that of its path"
        (model / "config.json").write_text('{"other": 1}')
        assert (changed := here(source, cache, quiet)) != copy
        assert (changed / "config.json").read_text() == '{"other": 1}'


def test_a_file_is_read_from_a_store_and_from_the_web(tmp_path, model):
    with serving(model.parent) as bucket:
        for number, source in enumerate((bucket.uri("model/more/weights"), bucket.url("model/more/weights"))):
            copy = here(source, Cache(tmp_path / str(number)), quiet)
            assert Path(copy).name == "weights" and Path(copy).read_bytes() == (model / "more" / "weights").read_bytes()


def test_a_path_is_left_as_it_is(tmp_path):
    assert here("tiny", Cache(tmp_path)) == "tiny" and not any(tmp_path.iterdir())


def test_what_a_killed_process_left_is_begun_anew(tmp_path, model):
    cache, contents = Cache(tmp_path / "cache"), Contents.of(model)
    remote = Remote.of(f"file://{model}")
    steps = cache.copying("model", contents.sizes, remote.read, key="key", digest=contents.digest)
    assert next(steps) > 0
    steps.close()  # as the process's end would, this gives the lock back
    left = cache.folder / ".key.part" / "model"
    assert left.is_dir() and not cache.found(contents.digest, "model")
    (left / "junk").write_text("of another time")
    copy = finished(cache.copying("model", contents.sizes, remote.read, key="key", digest=contents.digest))
    assert held(copy).keys() == {"config.json", "more/weights"} and not left.exists()


def test_the_same_from_two_places_is_kept_once(tmp_path, model):
    cache, contents, remote = Cache(tmp_path / "cache"), Contents.of(model), Remote.of(f"file://{model}")
    first, second = (cache.copying("model", contents.sizes, remote.read, key=key) for key in ("one", "two"))
    next(second)
    copy = finished(first)
    assert finished(second) == copy and not list(cache.folder.glob(".*.part"))
    assert finished(cache.copying("model", contents.sizes, remote.read, key="three")) == copy
    assert not list(cache.folder.glob(".*.part"))


def test_a_copy_that_another_process_makes_is_waited_for_until_a_deadline(tmp_path, model):
    cache, source, lines = Cache(tmp_path / "cache"), f"file://{model}", list[str]()
    cache.folder.mkdir()
    with (cache.folder / f"{Remote.of(source).stamp}.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(Mistake, match=r"was not copied within 0.5 s \(another process copies it\)"):
            here(source, cache, lines.append, seconds=0.5)
    assert lines == [f"copying {source}: another process copies it"]


def finished(steps):
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def test_while_another_process_copies_nothing_is_done(tmp_path, model):
    cache, contents, remote = Cache(tmp_path / "cache"), Contents.of(model), Remote.of(f"file://{model}")
    cache.folder.mkdir()
    with (cache.folder / "key.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        steps = cache.copying("model", contents.sizes, remote.read, key="key", digest=contents.digest)
        assert [next(steps) for _ in range(3)] == [0, 0, 0]
        assert not (cache.folder / ".key.part").exists()
    assert finished(steps).exists()
    never = cache.copying(
        "model", contents.sizes, lambda _: pytest.fail("it is there"), key="key", digest=contents.digest
    )
    assert finished(never) == cache.found(contents.digest, "model")


@pytest.mark.parametrize("other", [b"[]", b"{ }"], ids=["as long", "longer"])
def test_what_changes_under_way_is_refused(tmp_path, model, other):
    cache, contents, remote = Cache(tmp_path / "cache"), Contents.of(model), Remote.of(f"file://{model}")
    (model / "config.json").write_bytes(other)
    with pytest.raises(Damaged, match=r"start again"):
        finished(cache.copying("model", contents.sizes, remote.read, key="key", digest=contents.digest))
    assert not cache.found(contents.digest, "model")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("file:///nowhere/at/all", "there is nothing at file:///nowhere/at/all; correct it"),
        ("abc://bucket/x", "abc://bucket/x cannot be read: Unrecognized filesystem"),
        ("http://127.0.0.1:9/x", "http://127.0.0.1:9/x cannot be read: .*refused"),
        ("http://127.0.0.1:9/a b", "http://127.0.0.1:9/a b cannot be read: .*control characters"),
        ("s3://me:secret@bucket/x", r"s3://…@bucket has a secret in it"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, source, said):
    with pytest.raises(Mistake, match=said) as error:
        here(source, Cache(tmp_path))
    assert "secret@" not in str(error.value)


def test_a_bucket_says_what_it_refuses(tmp_path, model, monkeypatch):
    with serving(model.parent) as bucket:
        with pytest.raises(Mistake, match="there is nothing at s3://bucket/other"):
            here(bucket.uri("other"), Cache(tmp_path))
        with pytest.raises(Mistake, match=r"other cannot be read: HTTP Error 404"):
            here(bucket.url("other"), Cache(tmp_path))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "stranger")
        with pytest.raises(Mistake, match=r"s3://bucket/model.* cannot be read: .*; correct it, or give this machine"):
            here(bucket.uri("model"), Cache(tmp_path))
