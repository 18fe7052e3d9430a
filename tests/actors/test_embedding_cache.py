"""The cache of embeddings, in memory and on disk: what it returns, what it forgets, and what becomes of it where
writers are killed, files damaged and disks full."""

import fcntl
import hashlib
import logging
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import OrderedDict
from itertools import count
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from actors.config import EmbeddingsConfig, SegmenterConfig
from actors.experts import store as store_module
from actors.experts.cache import EmbeddingCache, open_cache
from actors.experts.protocol import Embedding
from actors.experts.store import EmbeddingStore, rounded
from tests.cache_workers import KEYS, alike, embedding_of, work
from tests.conftest import ROOT
from umrg.frames import Size
from umrg.mistake import Mistake

MIB = 1 << 20


def plain(values: int, fill: float = 0.5) -> Embedding:
    """Features of so many float32 values."""
    return Embedding(features=(torch.full((1, values, 1, 1), fill),), original=Size(1, 1), content=Size(1, 1))


def store_in(folder: Path, *, limit: int = MIB, fingerprint: str = "f") -> EmbeddingStore:
    return EmbeddingStore(folder, limit=limit, fingerprint=fingerprint)


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def embeddings_in(folder: Path) -> list[Path]:
    return list(folder.glob("*.embedding"))


# In memory


def test_it_forgets_what_was_used_longest_ago() -> None:
    cache = EmbeddingCache(limit=100)
    for key in "ab":
        cache.put(key, plain(10))
    assert cache.get("a") is not None
    cache.put("c", plain(10))
    assert cache.get("b") is None
    assert cache.get("a") is not None and cache.get("c") is not None
    assert (cache.bytes, len(cache), cache.hits, cache.misses, cache.read) == (80, 2, 3, 1, 0)


def test_it_keeps_nothing_larger_than_itself_and_counts_what_is_replaced() -> None:
    cache = EmbeddingCache(limit=100)
    cache.put("a", plain(10))
    assert cache.put("large", plain(26)).nbytes == 104
    assert cache.get("large") is None and cache.get("a") is not None
    cache.put("a", plain(25))
    assert (cache.bytes, len(cache)) == (100, 1)
    cache.put("a", plain(26))
    assert (cache.bytes, len(cache)) == (0, 0)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abcdef"), st.integers(1, 40)), max_size=60))
def test_it_is_a_list_in_the_order_of_use_that_is_cut_at_the_bound(steps: list[tuple[bool, str, int]]) -> None:
    cache, model = EmbeddingCache(limit=400), OrderedDict[str, int]()
    for puts, key, values in steps:
        if puts:
            cache.put(key, plain(values))
            model.pop(key, None)
            model[key] = values * 4
            while sum(model.values()) > 400:
                model.popitem(last=False)
        else:
            found = cache.get(key)
            assert (None if found is None else found.nbytes) == model.get(key)
            if key in model:
                model.move_to_end(key)
        assert cache.bytes == sum(model.values()) <= 400 and len(cache) == len(model)


def test_without_a_disk_an_embedding_stays_as_it_is() -> None:
    made = embedding_of(1)
    used = EmbeddingCache(limit=MIB).put("a", made)
    assert alike(used, made) and used.features[0].dtype == torch.float32


def test_ten_thousand_images_stay_within_the_bound() -> None:
    cache = EmbeddingCache(limit=64 << 10)
    tracemalloc.start()
    try:
        for i in range(10_000):
            cache.put(f"{i}", plain(256))
            assert cache.bytes <= 64 << 10
        # torch's own memory is not traced, and is that of the embeddings that are kept.
        assert tracemalloc.get_traced_memory()[0] < MIB
    finally:
        tracemalloc.stop()
    assert len(cache) == 64


def test_several_threads_may_use_it(tmp_path: Path) -> None:
    cache = EmbeddingCache(limit=20_000, store=store_in(tmp_path, limit=200_000))
    wrong: list[int] = []

    def use(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(100):
            key = chosen.randrange(20)
            found = cache.get(f"{key}") or cache.put(f"{key}", embedding_of(key))
            if not alike(found, rounded(embedding_of(key))):
                wrong.append(key)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not wrong and cache.bytes <= 20_000 and cache.hits + cache.misses == 400


# On disk


def test_what_was_put_is_found_by_the_next_process_in_float16(tmp_path: Path) -> None:
    first = EmbeddingCache(limit=MIB, store=store_in(tmp_path / "new" / "folder"))
    assert first.get("a") is None
    used = first.put("a", embedding_of(7))
    assert alike(used, rounded(embedding_of(7))) and used.features[0].dtype == torch.float16
    second = EmbeddingCache(limit=MIB, store=store_in(tmp_path / "new" / "folder"))
    for _ in range(2):
        found = second.get("a")
        assert found is not None and alike(found, used)
    assert (second.hits, second.misses, second.read) == (2, 0, 1)


def test_an_embedding_larger_than_the_memory_is_read_each_time(tmp_path: Path) -> None:
    cache = EmbeddingCache(limit=10, store=store_in(tmp_path))
    used = cache.put("a", embedding_of(0))
    for _ in range(2):
        found = cache.get("a")
        assert found is not None and alike(found, used)
    assert (cache.read, cache.bytes) == (2, 0)


def test_the_first_of_two_writers_is_followed_by_both(tmp_path: Path) -> None:
    one, other = (EmbeddingCache(limit=MIB, store=store_in(tmp_path)) for _ in range(2))
    assert one.get("a") is None and other.get("a") is None
    first = one.put("a", plain(8, 0.5))
    assert alike(other.put("a", plain(8, 0.25)), first)


@pytest.mark.parametrize("value", [7e4, float("nan"), float("inf")])
def test_values_that_float16_does_not_have_are_refused(tmp_path: Path, value: float) -> None:
    cache = EmbeddingCache(limit=MIB, store=store_in(tmp_path))
    with pytest.raises(Mistake, match=r"float16.*set segmenter\.embeddings\.folder to null"):
        cache.put("a", plain(8, value))
    assert EmbeddingCache(limit=MIB).put("a", plain(8, 7e4)).features[0].max() == 7e4


def test_experts_that_share_a_folder_keep_apart(tmp_path: Path) -> None:
    one, other = store_in(tmp_path, fingerprint="one"), store_in(tmp_path, fingerprint="other")
    assert one.put("a", rounded(plain(8, 1.0)))
    assert other.get("a") is None and not other.holds("a")
    assert other.put("a", rounded(plain(8, 2.0)))
    found = one.get("a"), other.get("a")
    assert [each and each.features[0].max().item() for each in found] == [1.0, 2.0]


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


DAMAGE = {
    "empty": lambda content: b"",
    "cut within the checksum": lambda content: content[:20],
    "cut within the header": lambda content: content[:60],
    "cut by a byte": lambda content: content[:-1],
    "longer by a byte": lambda content: content + b"\0",
    "another checksum": lambda content: flipped(content, 3),
    "another length of the header": lambda content: flipped(content, 33),
    "another size of the image": lambda content: content.replace(b"[107, 50]", b"[108, 50]"),
    "another value": lambda content: flipped(content, len(content) - 7),
    "zeros at the end": lambda content: content[: len(content) // 2].ljust(len(content), b"\0"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_a_miss_and_goes(tmp_path: Path, damage: str) -> None:
    store = store_in(tmp_path)
    store.put("a", rounded(embedding_of(7)))
    content = store.path("a").read_bytes()
    assert DAMAGE[damage](content) != content
    store.path("a").write_bytes(DAMAGE[damage](content))
    assert store.get("a") is None and not store.path("a").exists()
    assert store.put("a", rounded(embedding_of(7)))
    found = store.get("a")
    assert found is not None and alike(found, rounded(embedding_of(7)))


@settings(max_examples=200)
@given(st.data())
def test_no_flipped_bit_goes_unnoticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    store = store_in(tmp_path_factory.mktemp("flipped"))
    store.put("a", rounded(plain(8)))
    content = bytearray(store.path("a").read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    store.path("a").write_bytes(content)
    assert store.get("a") is None


@pytest.mark.parametrize("other", [("f", "b"), ("g", "a")], ids=["another key", "another expert"])
def test_a_file_under_the_name_of_another_is_a_miss_and_goes(tmp_path: Path, other: tuple[str, str]) -> None:
    store, (fingerprint, key) = store_in(tmp_path), other
    elsewhere = store_in(tmp_path, fingerprint=fingerprint)
    elsewhere.put(key, rounded(plain(8)))
    elsewhere.path(key).rename(store.path("a"))
    assert store.get("a") is None and not embeddings_in(tmp_path)


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "notes.txt", tmp_path / ".hidden.part", tmp_path / "aa.embedding"
    for path in foreign:
        path.write_bytes(b"x" * 5000)
    (tmp_path / "folder").mkdir()
    store = store_in(tmp_path, limit=2000)
    for i in range(10):
        store.put(f"{i}", rounded(plain(200)))
    assert all(path.read_bytes() == b"x" * 5000 for path in foreign)
    assert store.holds("9") and not store.holds("0")


# The bound


@settings(max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abcdef"), st.integers(1, 400)), max_size=40))
def test_the_folder_loses_what_was_used_longest_ago(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[bool, str, int]]
) -> None:
    folder, limit = tmp_path_factory.mktemp("folder"), 3200
    model = OrderedDict[str, int]()
    for i, (puts, key, values) in enumerate(steps):
        store = store_in(folder, limit=limit, fingerprint="f" * (1 + i % 2))  # two processes of two experts
        name = f"{i % 2}{key}"
        if puts and store.put(key, rounded(plain(values))):
            size = store.path(key).stat().st_size
            if 20 + sum(model.values()) + size > limit:
                while model and 20 + sum(model.values()) + size > limit - limit // 32:
                    model.popitem(last=False)
            model[name] = size
        elif not puts:
            assert (store.get(key) is not None) == (name in model)
        if name in model:
            model.move_to_end(name)
        assert {path.name for path in embeddings_in(folder)} == {
            store_in(folder, fingerprint="f" * (1 + int(kept[0]))).path(kept[1:]).name for kept in model
        }
        assert bytes_of(folder) <= limit


def test_the_bound_holds_at_every_line_of_a_write(tmp_path: Path) -> None:
    limit, watched, largest = 4000, (store_module.__file__, "atomic.py"), 0

    def watch(frame, event, argument):
        nonlocal largest
        if frame.f_code.co_filename.endswith(watched):
            largest = max(largest, bytes_of(tmp_path))
            return watch
        return None

    store, before = store_in(tmp_path, limit=limit), sys.gettrace()
    for i in range(12):
        embedding = rounded(plain(100 + 67 * i % 300))
        sys.settrace(watch)
        try:
            store.put(f"{i}", embedding)
        finally:
            sys.settrace(before)
    assert limit // 2 < largest <= limit


@pytest.mark.parametrize("limit", [4000, MIB], ids=["full", "with room"])
def test_the_bound_holds_wherever_a_writer_was_killed(tmp_path: Path, limit: int) -> None:
    # Both processes have looked at the files before, and would not again of their own accord.
    store, embedding = store_in(tmp_path, limit=limit), rounded(plain(300))
    store.put("first", embedding)
    ended, n = False, 0
    while not ended and n < 300:
        n += 1
        if (child := os.fork()) == 0:
            _end_at_line(n)
            store.put(f"killed at {n}", embedding)
            os._exit(0)
        ended = os.waitpid(child, 0)[1] == 0
        assert store.put(f"after {n}", embedding) and bytes_of(tmp_path) <= limit
        assert int((tmp_path / ".lock").read_bytes()) == bytes_of(tmp_path)
    assert ended and n > 30


def _end_at_line(n: int) -> None:
    """End this process, as if it were killed, at the nth line of a write."""
    signal.alarm(60)
    lines = count(1)

    def watch(frame, event, argument):
        if frame.f_code.co_filename.endswith((store_module.__file__, "atomic.py")):
            if event == "line" and next(lines) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return watch
        return None

    sys.settrace(watch)


def test_a_smaller_bound_holds_from_the_next_write_on(tmp_path: Path) -> None:
    for i in range(20):
        store_in(tmp_path).put(f"{i}", rounded(plain(100)))
    assert len(embeddings_in(tmp_path)) == 20
    small = store_in(tmp_path, limit=3000)
    small.put("new", rounded(plain(100)))
    assert small.holds("new") and bytes_of(tmp_path) <= 3000


def test_what_is_larger_than_the_bound_is_used_and_not_stored(tmp_path: Path) -> None:
    cache = EmbeddingCache(limit=MIB, store=store_in(tmp_path, limit=1000))
    assert alike(cache.put("a", plain(1000)), rounded(plain(1000)))
    assert not list(tmp_path.iterdir())


def test_every_file_is_looked_at_only_where_its_size_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = count()
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda *given: next(looks) * 0 or scan(*given))
    store = store_in(tmp_path, limit=100_000)
    for i in range(60):
        store.put(f"{i}", rounded(plain(100)))
    assert next(looks) == 1
    store_in(tmp_path, limit=100_000).put("another process", rounded(plain(100)))
    assert next(looks) == 3  # this count looked once itself


def test_what_a_killed_writer_left_is_counted_and_removed(tmp_path: Path) -> None:
    store = store_in(tmp_path, limit=3000)
    store.put("a", rounded(plain(100)))
    # As if it were killed while it wrote: the sum is gone, and there is a part of a file.
    (tmp_path / ".lock").write_bytes(b"")
    leftover = tmp_path / f".{store.path('b').name}.{'0' * 12}.part"
    leftover.write_bytes(b"x" * 2000)
    store.put("c", rounded(plain(100)))
    assert not leftover.exists() and store.holds("a") and store.holds("c")
    assert int((tmp_path / ".lock").read_bytes()) == bytes_of(tmp_path)


# Disks that fail


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_full_disk_is_told_once_and_the_cache_goes_on_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The system itself refuses larger files, at a byte in their middle, as a full disk does.
    cache = EmbeddingCache(limit=MIB, store=store_in(tmp_path))
    cache.put("before", plain(10))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        for i in range(5):
            monkeypatch.setattr(cache, "_write_again", 0.0)
            assert alike(cache.put(f"{i}", plain(4000, 0.3)), rounded(plain(4000, 0.3)))
            assert cache.get(f"{i}") is not None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (
        len(warned(caplog)) == 1 and "kept in memory alone" in warned(caplog)[0] and str(tmp_path) in warned(caplog)[0]
    )
    assert [path.name for path in embeddings_in(tmp_path)] == [store_in(tmp_path).path("before").name]
    assert {path.name for path in tmp_path.iterdir()} == {".lock", store_in(tmp_path).path("before").name}
    monkeypatch.setattr(cache, "_write_again", 0.0)
    cache.put("after", plain(4000))
    assert store_in(tmp_path).holds("after")


def test_a_disk_that_failed_has_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, times, tries = store_in(tmp_path), [1000.0], count()

    def fail(key: str, embedding: Embedding) -> bool:
        next(tries)
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(store, "put", fail)
    monkeypatch.setattr(time, "monotonic", lambda: times[0])
    cache = EmbeddingCache(limit=MIB, store=store)
    for times[0] in (1000.0, 1001.0, 1059.0, 1061.0, 1062.0):
        cache.put("a", plain(10))
    assert next(tries) == 2


@pytest.mark.parametrize("in_the_way", ["a file", "a folder in place of an embedding"])
def test_a_folder_that_cannot_be_used_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, in_the_way: str
) -> None:
    store = store_in(tmp_path / "folder")
    if in_the_way == "a file":
        (tmp_path / "folder").write_bytes(b"")
    else:
        store.path("a").mkdir(parents=True)
    cache = EmbeddingCache(limit=MIB, store=store)
    for key in "ab":
        assert cache.get(key) is None
        cache.put(key, plain(10))
        assert cache.get(key) is not None
    assert len(warned(caplog)) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_can_only_be_read_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store_in(tmp_path).put("a", rounded(plain(10)))
    tmp_path.chmod(0o500)
    (tmp_path / ".lock").chmod(0o400)
    try:
        cache = EmbeddingCache(limit=MIB, store=store_in(tmp_path))
        cache.put("b", plain(10))
        assert cache.get("a") is not None and cache.get("b") is not None and len(warned(caplog)) == 1
    finally:
        tmp_path.chmod(0o700)


def test_a_file_system_without_locks_is_read_and_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store_in(tmp_path).put("a", rounded(plain(10)))

    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    cache = EmbeddingCache(limit=MIB, store=store_in(tmp_path))
    cache.put("b", plain(10))
    assert cache.get("a") is not None and cache.get("b") is not None
    assert warned(caplog) == [
        f"embeddings are kept in memory alone, for the disk fails: [Errno 37] No locks available: '{tmp_path}/.lock'"
    ]
    assert len(embeddings_in(tmp_path)) == 1


def test_a_lock_that_is_held_for_ever_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_module, "LOCK_S", 0.05)
    with (tmp_path / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        cache = EmbeddingCache(limit=MIB, store=store_in(tmp_path))
        cache.put("a", plain(10))
    assert cache.get("a") is not None
    assert "others have held it for 0.05 s" in warned(caplog)[0]


# Many processes


@pytest.mark.parametrize(
    "seconds", [6, pytest.param(60, marks=(pytest.mark.slow, pytest.mark.chaos))], ids=lambda seconds: f"{seconds} s"
)
def test_killed_readers_and_writers_leave_no_wrong_embedding_and_keep_the_bound(tmp_path: Path, seconds: int) -> None:
    folder, told, limit = tmp_path / "shared", tmp_path / "told", 300_000
    folder.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.cache_workers"])
    chosen = random.Random(0)
    sums: list[int] = []

    def begun() -> multiprocessing.process.BaseProcess:
        worker = context.Process(target=work, args=(folder, limit, told), daemon=True)
        worker.start()
        return worker

    workers = [begun() for _ in range(4)]
    watched, end = store_in(folder, limit=limit), time.monotonic() + seconds
    try:
        # However slow the machine is, the folder becomes full.
        while not sums or (max(sums) <= limit // 2 and time.monotonic() < end + 120) or time.monotonic() < end:
            time.sleep(chosen.uniform(0.0, 0.2))
            at = chosen.randrange(4)
            workers[at].kill()
            workers[at].join(timeout=30)
            # Files come under the lock alone: while it is held, their sum is that of one moment. What is there is what
            # writers left who ended, or were killed, wherever they were.
            with watched._locked():
                sums.append(bytes_of_those_that_stay(folder))
            workers[at] = begun()
    finally:
        for worker in workers:
            worker.kill()
            worker.join(timeout=30)
    assert limit // 2 < max(sums) <= limit
    assert not told.exists() or told.read_text() == ""
    check_that_it_still_works(folder, limit)


def bytes_of_those_that_stay(folder: Path) -> int:
    """Sum of the sizes, without a file that a reader removes meanwhile."""
    total = 0
    for path in list(folder.iterdir()):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def check_that_it_still_works(folder: Path, limit: int) -> None:
    cache = EmbeddingCache(limit=0, store=store_in(folder, limit=limit))
    for key in range(KEYS):
        found = cache.get(f"{key}") or cache.put(f"{key}", embedding_of(key))
        assert alike(found, rounded(embedding_of(key)))
        assert cache.get(f"{key}") is not None
    assert not list(folder.glob(".*.part"))
    assert int((folder / ".lock").read_bytes()) == bytes_of(folder) <= limit


# As it is configured


class Named:
    """An expert of which only its fingerprint is asked."""

    def fingerprint(self) -> str:
        return hashlib.sha256(b"weights").hexdigest()


def test_it_opens_as_configured(tmp_path: Path) -> None:
    memory = open_cache(EmbeddingsConfig(memory_mib=1), Named())  # type: ignore[arg-type]
    memory.put("a", plain(2**18))
    memory.put("b", plain(1))
    assert memory.get("a") is None and memory.get("b") is not None
    disk = EmbeddingsConfig(folder=tmp_path / "embeddings", disk_gib=1)
    for _ in range(2):
        cache = open_cache(disk, Named())  # type: ignore[arg-type]
        cache.get("a") or cache.put("a", plain(8))
    assert cache.read == 1


def test_a_relative_folder_is_the_drivers_even_where_it_is_not_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = SegmenterConfig(embeddings=EmbeddingsConfig(folder=Path("embeddings")))
    assert config.located().embeddings.folder == tmp_path / "embeddings"
    assert SegmenterConfig().located() == SegmenterConfig()


def test_a_cache_in_memory_needs_no_torch() -> None:
    script = "import sys, actors.experts.cache; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)
